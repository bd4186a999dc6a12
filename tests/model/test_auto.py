"""What transformers' Auto classes and pipelines make of a saved directory, beside transformers' own LLaVA."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import draw_image
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPVisionModel,
    pipeline,
)
from transformers.integrations.moe import ExpertsInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llava_lite.model
from llava_lite.media.preprocess import load_image_processor
from llava_lite.model import BACKBONES, LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_lite.processing.processor import LlavaLiteProcessor

QUESTION = "What colour is the square?"


@pytest.fixture(params=["-200", "vocabulary"])
def directory(request, toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """A model with its processor, with -200 or an id of the vocabulary as image placeholder."""
    overrides = {"conv_template": "v1"}
    if request.param == "vocabulary":
        toy_tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        overrides["image_token_index"] = toy_tokenizer.convert_tokens_to_ids("<image>")
    model = toy_model(**overrides)
    model.resize_token_embeddings(len(toy_tokenizer))
    processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, load_image_processor(toy_tower_dir()))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def message(image, text=QUESTION):
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}


def expected_answer(directory, prompt, images, **generate):
    """Return the new text by the model and the processor alone."""
    model = LlavaLlamaForCausalLM.from_pretrained(directory)
    processor = LlavaLiteProcessor.from_pretrained(directory)
    inputs = processor(text=prompt, images=images)
    tokens = model.generate(**inputs, do_sample=False, **generate)
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_every_auto_class_opens_a_directory_as_what_it_is(directory):
    assert type(AutoConfig.from_pretrained(directory)) is LlavaLlamaConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(directory)) is LlavaLlamaForCausalLM
    stack = AutoModel.from_pretrained(directory)
    assert type(stack) is LlavaLlamaForCausalLM.decoder_class
    full = LlavaLlamaForCausalLM.from_pretrained(directory).model
    assert all(torch.equal(weight, full.state_dict()[name]) for name, weight in stack.state_dict().items())
    assert type(AutoProcessor.from_pretrained(directory)) is LlavaLiteProcessor


def test_stack_takes_its_tower_from_where_llava_keeps_it(directory, toy_tower_dir):
    path = Path(directory) / "config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("vision_config")["model_type"] == "clip_vision_model"
    path.write_text(json.dumps(fields | {"mm_vision_tower": str(toy_tower_dir())}))
    names = [key for key in load_file(Path(directory) / "model.safetensors") if "vision_tower" not in key]
    weights = load_file(Path(directory) / "model.safetensors")
    save_file({key: weights[key] for key in names}, Path(directory) / "model.safetensors", metadata={"format": "pt"})
    tower = CLIPVisionModel.from_pretrained(toy_tower_dir())
    stack = AutoModel.from_pretrained(directory)
    opened = stack.get_vision_tower().encoder.state_dict()
    expected = tower.state_dict()
    assert all(torch.equal(opened[name], expected[name]) for name in opened)


def test_every_backbone_is_registered_under_its_own_name():
    for name, model_class in BACKBONES.items():
        config = AutoConfig.for_model(f"llava_{name}")
        assert type(config) is model_class.config_class
        for mapping in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            assert mapping._model_mapping[type(config)] is model_class
        assert AutoModel._model_mapping[type(config)] is model_class.decoder_class


def test_transformers_own_llava_stays_what_it_is():
    config = AutoConfig.for_model("llava")
    assert type(config) is transformers.LlavaConfig is not llava_lite.model.LlavaConfig
    assert AutoModelForImageTextToText._model_mapping[type(config)] is transformers.LlavaForConditionalGeneration
    assert AutoModel._model_mapping[type(config)] is transformers.LlavaModel
    assert type(AutoConfig.for_model("llava_next")) is transformers.LlavaNextConfig
    assert AutoModelForCausalLM._model_mapping[transformers.LlamaConfig] is transformers.LlamaForCausalLM
    assert transformers.LlavaProcessor.__module__.startswith("transformers.")


def test_both_llavas_are_saved_and_opened_in_one_process(directory, tmp_path):
    text = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 8}
    small = {"num_hidden_layers": 2, "num_attention_heads": 2}
    hf = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text | small, vision_config=vision | small | {"patch_size": 4})
    )
    hf.save_pretrained(tmp_path / "hf")
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert type(opened) is transformers.LlavaForConditionalGeneration
    assert type(AutoModelForImageTextToText.from_pretrained(directory)) is LlavaLlamaForCausalLM


def test_importing_the_package_once_more_registers_its_classes_again(monkeypatch):
    # The other tests get the classes and functions of the first import back.
    for interface in (AttentionInterface, AttentionMaskInterface, ExpertsInterface):
        monkeypatch.setattr(interface, "_global_mapping", interface._global_mapping.copy())
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", CONFIG_MAPPING._extra_content.copy())
    for name in [name for name in sys.modules if name.split(".")[0] == "llava_lite"]:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("llava_lite.model")
    assert again is not llava_lite.model
    assert type(AutoConfig.for_model("llava_llama")) is again.LlavaLlamaConfig
    mapped = AutoModelForImageTextToText._model_mapping[again.LlavaLlamaConfig]
    assert mapped is again.LlavaLlamaForCausalLM


def test_pipeline_answers_a_prompt_with_its_image(directory):
    pipe = pipeline("image-text-to-text", model=directory)
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    answer = expected_answer(directory, prompt, [draw_image(1)], max_new_tokens=5)
    (full,) = pipe(images=draw_image(1), text=prompt, max_new_tokens=5)
    # Alone, the tokenizer leaves the space before the first word out.
    assert full["generated_text"].startswith(prompt)
    assert full["generated_text"].removeprefix(prompt).strip() == answer.strip() != ""
    (new,) = pipe(images=draw_image(1), text=prompt, max_new_tokens=5, return_full_text=False)
    assert new["generated_text"].strip() == answer.strip()
    (longer,) = pipe(images=draw_image(1), text=prompt, max_new_tokens=9, return_full_text=False)
    assert longer["generated_text"].strip() == expected_answer(directory, prompt, [draw_image(1)], max_new_tokens=9)
    (words,) = pipe(text="How many circles are", max_new_tokens=5, return_full_text=False)
    assert words["generated_text"].strip() == expected_answer(
        directory, "How many circles are", None, max_new_tokens=5
    )


def test_pipeline_answers_a_batch_as_one_by_one(directory):
    pipe = pipeline("image-text-to-text", model=directory)
    prompts = [f"USER: <image>\n{QUESTION} ASSISTANT:", "USER: <image>\nHello! ASSISTANT:"]
    images = [draw_image(1), draw_image(2)]
    together = pipe(images=images, text=prompts, max_new_tokens=5, return_full_text=False, batch_size=2)
    alone = [
        pipe(images=image, text=prompt, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert [entry["generated_text"] for entry in together] == alone


PROMPTS = {"mm_injection": "adaption_prompt", "adaption_prompt_len": 4, "adaption_prompt_layers": 3}
PROMPTS |= {"mm_projector_type": "query_vit", "mm_query_len": 4, "mm_query_hidden": 16, "mm_query_depth": 1}
PROMPTS |= {"mm_query_heads": 2, "mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}


@pytest.fixture
def prompted(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """A model that reads images in its attention, its gates wide open, with its processor."""
    model = toy_model(conv_template="v1", **PROMPTS)
    for name, weight in model.named_parameters():
        if name.endswith("adaption_gate"):
            weight.data.fill_(2.0)
    # transformers puts no inputs together without it.
    toy_tokenizer.pad_token = toy_tokenizer.unk_token
    processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, load_image_processor(toy_tower_dir()))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
@pytest.mark.parametrize("seeds", [(1, 2, 3), (1, None, 2), (None, 3), (None, None)], ids=str)
def test_pipelines_answer_batches_as_one_by_one_where_attention_reads_the_images(prompted, task, seeds):
    """The inputs are prepared item by item, and put together to batches of two; the last may be one."""
    pipe = pipeline(task, model=prompted)
    texts = [QUESTION, "Hello! How many circles are there?", "Hello!"]
    chats = []
    for seed, text in zip(seeds, texts, strict=False):
        part = {"type": "text", "text": text}
        one = message(draw_image(seed), text) if seed is not None else {"role": "user", "content": [part]}
        chats.append([one])
    options = {"max_new_tokens": 6, "return_full_text": False}
    together = pipe(text=chats, batch_size=2, **options)
    alone = [pipe(text=[chat], **options)[0] for chat in chats]
    assert [found[0]["generated_text"] for found in together] == [found[0]["generated_text"] for found in alone]
    if seeds == (1, None, 2):
        blind = pipe(text=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}], **options)
        assert blind[0]["generated_text"] != alone[0][0]["generated_text"]


def test_pipeline_answers_a_batch_of_prompts_with_their_images_in_the_attention(prompted):
    pipe = pipeline("image-text-to-text", model=prompted)
    prompts = [f"USER: <image>\n{QUESTION} ASSISTANT:", "USER: <image>\nHello! ASSISTANT:"]
    entries = [{"images": draw_image(i), "text": prompt} for i, prompt in enumerate(prompts)]
    # A list would be read as a conversation.
    together = list(pipe((entry for entry in entries), batch_size=2, max_new_tokens=5, return_full_text=False))
    for entry, found in zip(entries, together, strict=True):
        (expected,) = pipe(**entry, max_new_tokens=5, return_full_text=False)
        assert found[0]["generated_text"] == expected["generated_text"]


def test_pipeline_answers_chat_messages_in_the_format_of_the_checkpoint(directory):
    pipe = pipeline("image-text-to-text", model=directory)
    messages = [message(draw_image(1))]
    prompt = LlavaLiteProcessor.from_pretrained(directory).render([(f"<image>\n{QUESTION}", None)]).text
    answer = expected_answer(directory, prompt, [draw_image(1)], max_new_tokens=5)
    (new,) = pipe(text=messages, max_new_tokens=5, return_full_text=False)
    assert new["generated_text"] == answer
    (full,) = pipe(text=messages, max_new_tokens=5)
    assert full["generated_text"][-1] == {"role": "assistant", "content": answer}
    several = pipe(text=[messages, messages], max_new_tokens=5, return_full_text=False)
    assert [entry[0]["generated_text"] for entry in several] == [answer, answer]


def test_what_generate_returns_is_decoded_with_and_without_the_prompt(directory):
    model, processor = AutoModelForCausalLM.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    messages = [[message(draw_image(1))], [{"role": "user", "content": "Hello!"}]]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    full = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = model.generate(
        inputs["input_ids"],
        images=inputs["pixel_values"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
    )
    assert torch.equal(full[:, inputs["input_ids"].shape[1] :], new)
    spoken = processor.batch_decode(full, skip_special_tokens=True)
    answers = processor.batch_decode(new, skip_special_tokens=True)
    for text, answer, question in zip(spoken, answers, (QUESTION, "Hello!"), strict=True):
        before, _, after = text.partition("ASSISTANT:")
        assert before.strip().endswith(question)
        assert "<image>" not in text
        assert after.strip() == answer.strip()
    assert processor.decode(new[0], skip_special_tokens=True) == answers[0]
