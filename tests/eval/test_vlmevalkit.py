"""VLMEvalKit's class for LLaVA under the alias: what it imports is there, and the page's file starts it."""

import json
import subprocess
import sys

import pytest
from conftest import draw_image
from pages import ROOT, blocks

from llava_lite import load
from llava_lite.media.preprocess import load_image_processor

PAGE = ROOT / "docs/evaluation.md"
# A program in the place of its run.py, which calls as vlmeval/vlm/llava/llava.py does: everything on "cuda".
PROGRAM = """
import argparse, json
from types import SimpleNamespace

import torch
from PIL import Image

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import (
    KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
)
from llava.model.builder import load_pretrained_model

parser = argparse.ArgumentParser()
parser.add_argument("--config")
config = json.load(open(parser.parse_args().config))
(model,), (data,) = config["model"].values(), config["data"].values()
path = model["model_path"]
tokenizer, model, image_processor, _ = load_pretrained_model(
    model_path=path, model_base=None, model_name=get_model_name_from_path(path), device="cpu", device_map="cpu"
)
model = model.cuda()
images = [Image.open("image.png").convert("RGB")]
pixels = process_images(images, image_processor, SimpleNamespace(image_aspect_ratio="pad"))
prompt = "A chat. USER:  <image> What colour is the square? ASSISTANT: "
ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0).cuda()
with torch.inference_mode():
    output = model.generate(
        ids,
        images=pixels.to("cuda", dtype=torch.float16),
        stopping_criteria=[KeywordsStoppingCriteria(["</s>"], tokenizer, ids)],
        do_sample=False, temperature=0, max_new_tokens=9, top_p=None, num_beams=1, use_cache=True,
    )
print("answer:", tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip())
"""


@pytest.mark.parametrize("moe", [None, {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}])
def test_the_file_of_the_page_starts_the_class_under_the_alias(moe, toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    directory = tmp_path / "llava-v1.5-toy"
    toy_model(moe=moe, conv_template="v1").save_pretrained(directory)
    toy_tokenizer.save_pretrained(directory)
    load_image_processor(toy_tower_dir("clip")).save_pretrained(directory)
    config = next(json.loads(block) for block in blocks(PAGE, "json") if '"model"' in block)
    config["model"]["mine"]["model_path"] = str(directory)
    assert config["model"]["mine"]["class"] == "LLaVA"
    (tmp_path / "mine.json").write_text(json.dumps(config))
    (tmp_path / "run.py").write_text(PROGRAM)
    draw_image(1).save(tmp_path / "image.png")
    command = [sys.executable, "-m", "llava_lite.alias", "run.py", "--config", "mine.json"]
    assert " ".join(command[1:]) in blocks(PAGE, "bash")[-1]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    model, processor = load(str(directory), device="cpu")
    processor.image_aspect_ratio = "pad"
    prompt = "A chat. USER:  <image> What colour is the square? ASSISTANT: "
    inputs = processor(text=[prompt], images=[[draw_image(1)]])
    output = model.generate(**inputs, do_sample=False, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(output, skip_special_tokens=True).strip()
    assert f"answer: {expected}" in done.stdout
    assert expected
