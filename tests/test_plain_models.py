"""Language models that LLaVA never trained: prompted by their own chat template, and refused in a sentence."""

import json
import shutil

import pytest
import torch
from conftest import BACKBONE_TYPES, build_tokenizer
from jinja2 import TemplateError
from PIL import Image
from toy_chat_templates import CASES, with_template
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from llava_lite import ImageFeatureCache, load, reply, stream
from llava_lite.inference import prepare
from llava_lite.processing.processor import LlavaLiteProcessor

# As instruct models have one, and unlike any template of LLaVA's.
OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Without one: the recipe of the decoder, else Vicuna's.
OF_BASE = {
    "llama": "v1",
    "mistral": "mistral_instruct",
    "phi": "phi",
    "qwen2": "qwen",
    "qwen3": "v1",
    "stablelm": "stablelm",
}
OTHERS = ("gemma2", "gpt2")
ROLES = ("user", "assistant")
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def other_model(kind, num_words):
    """Return a model of transformers of a decoder that LLaVA has no recipe for, or that is none."""
    torch.manual_seed(4)
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(vocab_size=num_words, num_key_value_heads=2, head_dim=8, **SHAPE))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=num_words, n_embd=32, n_layer=2, n_head=4))
    if kind == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=num_words, **SHAPE))
    return T5ForConditionalGeneration(T5Config(vocab_size=num_words, d_model=32, d_ff=64, num_layers=2, num_heads=4))


@pytest.fixture(scope="module")
def directory(tmp_path_factory, toy_llm_dir):
    """Return a function: decoder, own chat template or not -> the directory of a model of transformers."""
    built = {}

    def make(kind, is_instruct=False):
        if (kind, is_instruct) not in built:
            path = tmp_path_factory.mktemp(kind)
            tokenizer = build_tokenizer("llama")
            if kind in BACKBONE_TYPES:
                shutil.copytree(toy_llm_dir(kind), path, dirs_exist_ok=True)
            else:
                other_model(kind, len(tokenizer)).save_pretrained(path)
            tokenizer.chat_template = OWN if is_instruct else None
            tokenizer.save_pretrained(path)
            built[kind, is_instruct] = path
        return built[kind, is_instruct]

    return make


def answer_of_transformers(path, messages):
    """Return what transformers alone answers to messages, greedily."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", BACKBONE_TYPES + OTHERS)
def test_instruct_model_is_asked_in_its_own_template(kind, directory):
    path = directory(kind, True)
    model, processor = load(path, device="cpu")
    assert processor.conv_template == "chat"
    first = reply(model, processor, "Hello!", max_new_tokens=8)
    asked = [{"role": "user", "content": "Hello!"}]
    assert first == answer_of_transformers(path, asked)
    history = [("Hello!", "There are three.")]
    asked += [{"role": "assistant", "content": "There are three."}, {"role": "user", "content": "How many?"}]
    second = reply(model, processor, "How many?", history=history, max_new_tokens=8)
    assert second == answer_of_transformers(path, asked)
    cache = ImageFeatureCache()
    assert "".join(stream(model, processor, "Hello!", max_new_tokens=8, image_cache=cache)) == first


@pytest.mark.parametrize("kind", BACKBONE_TYPES + OTHERS)
def test_base_model_is_asked_in_the_recipe_of_its_decoder(kind, directory):
    model, processor = load(directory(kind), device="cpu")
    assert processor.conv_template == OF_BASE.get(kind, "v1")
    assert reply(model, processor, "Hello!", max_new_tokens=4) == "".join(
        stream(model, processor, "Hello!", max_new_tokens=4)
    )


@pytest.mark.parametrize("is_instruct", [False, True])
def test_image_for_a_plain_model_is_one_sentence(is_instruct, directory):
    path = directory("llama", is_instruct)
    model, processor = load(path, device="cpu")
    image = Image.new("RGB", (8, 8))
    words = rf"^'{path}' has no vision tower: it reads text alone\."
    with pytest.raises(ValueError, match=words):
        reply(model, processor, "What?", images=image)
    with pytest.raises(ValueError, match=words):
        reply(model, processor, ["What?", "And?"], images=[None, [image]])
    with pytest.raises(ValueError, match=words):
        next(stream(model, processor, "What?", images=image))


def write_config(path, **fields):
    build_tokenizer("llama").save_pretrained(path)
    (path / "config.json").write_text(json.dumps(fields))
    return path


REMOTE = {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.Y"}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "foobar"}, "has the model_type 'foobar', which transformers .* does not know"),
        ({"hidden_size": 32}, "names no model_type"),
        ({"model_type": "qwen", **REMOTE}, r"\(model_type 'qwen'\) is opened by Python code of its own"),
        ({"model_type": "qwen2_vl"}, r"is no language model that generates text \(model_type 'qwen2_vl'\)"),
        ({"model_type": "clip_vision_model"}, "is no language model"),
        ({"model_type": "llava_mpt"}, "is a LLaVA on a decoder that is not known here"),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(fields, words, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("somebody was asked whether to run code"))
    with pytest.raises(ValueError, match=words) as refused:
        load(write_config(tmp_path / "model", **fields), device="cpu")
    assert len(str(refused.value)) < 300
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(("kind", "what"), [("bert", "BertForMaskedLM"), ("t5", "model_type 't5'")])
def test_model_that_writes_no_text_is_refused_before_its_weights_are_read(kind, what, directory, capfd):
    with pytest.raises(ValueError, match=rf"is no language model that generates text \({what}\)"):
        load(directory(kind), device="cpu")
    assert "Loading weights" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_training_on_another_decoder_names_those_that_are_known(kind, directory):
    from llava_lite.model.assemble import assemble

    with pytest.raises(ValueError, match=f"unknown language model of model_type '{kind}'; known: llama, mistral"):
        assemble(str(directory(kind)))


# Where the prompt is another: texts are given in parts, or an answer without reasoning is asked for.
OTHER_PROMPTS = {
    "chatml without a prompt of its own",
    "qwen3: an empty block of reasoning before the last answer",
    "qwen3.5: the prompt opens the reasoning",
    "an empty block of reasoning that the prompt lacks",
    "hunyuan: an empty block of reasoning in the prompt alone",
    "idefics3: parts alone",
    "llava-next of mistral: images first, parts alone",
    "llava-1.5 of transformers: no end token, parts alone",
    "gpt-oss: a channel before an answer, another end token after the last",
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("history", [[], [("Why one?", "Because one.")]], ids=["first turn", "second turn"])
def test_model_is_asked_by_every_kind_of_chat_template(name, history, toy_tokenizer_for):
    """Fit for training or not: answers that cannot be located do not matter to a question."""
    tokenizer = with_template(toy_tokenizer_for("gpt2"), CASES[name])
    processor = LlavaLiteProcessor(None, tokenizer, conv_template="chat")
    messages = [{"role": role, "content": text} for turn in history for role, text in zip(ROLES, turn, strict=True)]
    messages.append({"role": "user", "content": "Why two?"})
    try:
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError:
        # A template of parts alone takes ours, and not the texts that transformers hands it.
        expected = None
    if expected is None and name not in OTHER_PROMPTS:
        with pytest.raises(ValueError, match="refuses this conversation"):
            prepare(processor, ["Why two?"], [None], None, [history])
        return
    inputs, _ = prepare(processor, ["Why two?"], [None], None, [history])
    reported = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert inputs["input_ids"].tolist() == reported.tolist()
    assert (inputs["input_ids"][0].tolist() == expected) == (name not in OTHER_PROMPTS)
