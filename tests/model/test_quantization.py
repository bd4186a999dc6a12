"""Directories of 4- and 8-bit weights open at every door; what is quantised on request spares tower and connector."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_image, llm_config, write_tower
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from llava_lite import load, reply
from llava_lite.export.convert import convert
from llava_lite.export.merge import merge
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.assemble import assemble
from llava_lite.model.builder import load_pretrained_model
from llava_lite.model.moe.upcycle import upcycle
from llava_lite.model.quantization import agreed, get_quantization_kind, one_request, with_kept_modules
from llava_lite.train.build import quantization

pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
from transformers import BitsAndBytesConfig

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [2], "top_k_experts": 2, "use_residual": True}
CLASSES = {4: "Linear4bit", 8: "Linear8bitLt"}


@pytest.fixture(scope="session")
def wide_llm_dir(tmp_path_factory, toy_tokenizer_for):
    """A plain language model 64 wide: on a CPU, 4 bits come in blocks of 64."""
    tokenizer = toy_tokenizer_for("llama")
    config = llm_config("llama", len(tokenizer))
    config.hidden_size, config.head_dim, config.intermediate_size, config.initializer_range = 64, 16, 128, 0.1
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("wide_llm")
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def wide_tower_dir(tmp_path_factory):
    """A tower 64 wide, for the same reason: where transformers' own LLaVA has its tower in 4 bits."""
    return write_tower(tmp_path_factory.mktemp("wide_tower"), "clip", 64, 128)


@pytest.fixture(scope="session")
def full_dir(wide_llm_dir, wide_tower_dir, tmp_path_factory):
    """Return a function: moe dict or None -> directory of a LLaVA model in full precision."""
    built = {}

    def make(moe=None):
        if str(moe) not in built:
            torch.manual_seed(3)
            model = assemble(
                str(wide_llm_dir),
                str(wide_tower_dir),
                config_overrides={"mm_projector_type": "mlp2x_gelu", "conv_template": "v1"},
                dtype=torch.float32,
            )
            if moe is not None:
                upcycle(model, moe)
            directory = tmp_path_factory.mktemp("full")
            model.save_pretrained(directory)
            AutoTokenizer.from_pretrained(wide_llm_dir).save_pretrained(directory)
            shutil.copy(wide_tower_dir / "preprocessor_config.json", directory)
            built[str(moe)] = directory
        return built[str(moe)]

    return make


@pytest.fixture(scope="session")
def quantised_dir(full_dir, tmp_path_factory):
    """Return a function: bits, moe -> directory of weights in few bits, written by save_pretrained."""
    built = {}

    def make(bits=4, moe=None):
        if (bits, str(moe)) not in built:
            model, processor = load(full_dir(moe), device="cpu", **{f"load_{bits}bit": True})
            directory = tmp_path_factory.mktemp(f"bits{bits}")
            model.save_pretrained(directory)
            processor.save_pretrained(directory)
            built[bits, str(moe)] = directory, logits(model)
        return built[bits, str(moe)]

    return make


def logits(model):
    ids = torch.tensor([[1, 50, 60, -200, 70, 80]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, images=pixels).logits.float()


def in_bits(model):
    """Return the names of the modules that bitsandbytes holds."""
    return {name for name, module in model.named_modules() if type(module).__name__ in CLASSES.values()}


def is_decoder(name):
    return name.startswith("model.layers.") and ".experts" not in name


DOORS = {
    "load": lambda path, bits: load(path, device="cpu")[0],
    "load with the switch": lambda path, bits: load(path, device="cpu", **{f"load_{bits}bit": True})[0],
    "load with a config": lambda path, bits: load(path, device="cpu", quantization_config=load_config(bits))[0],
    "load_pretrained_model": lambda path, bits: load_pretrained_model(path, None, "llava", device="cpu")[1],
    "a map of one place": lambda path, bits: load_pretrained_model(path, device_map={"": "cpu"})[1],
    "from_pretrained": lambda path, bits: LlavaLlamaForCausalLM.from_pretrained(path),
    "Auto": lambda path, bits: AutoModelForImageTextToText.from_pretrained(path, device_map="cpu"),
    "Auto with a dict": lambda path, bits: AutoModelForCausalLM.from_pretrained(
        path, quantization_config={f"load_in_{bits}bit": True}
    ),
}


def load_config(bits, **more):
    return BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **more)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("bits", [4, 8])
def test_saved_weights_open_again_and_answer_the_same(quantised_dir, bits, moe, door):
    directory, expected = quantised_dir(bits, moe)
    model = DOORS[door](directory, bits)
    assert torch.equal(logits(model), expected)
    assert in_bits(model)
    assert all(is_decoder(name) for name in in_bits(model))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_few_bits_are_saved_once_more(quantised_dir, tmp_path, bits):
    directory, expected = quantised_dir(bits)
    model, processor = load(directory, device="cpu")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, device="cpu")[0]), expected)


def test_an_answer_of_weights_in_few_bits_is_that_of_the_model_that_was_saved(quantised_dir, full_dir):
    question = ("What colour is the square?", None)
    before = reply(*load(full_dir(), device="cpu", load_4bit=True), *question, max_new_tokens=6)
    assert reply(*load(quantised_dir(4)[0], device="cpu"), *question, max_new_tokens=6) == before


GIVEN = {
    "object": lambda bits: load_config(bits),
    "dict": lambda bits: {f"load_in_{bits}bit": True},
    "dict of config.json": lambda bits: load_config(bits).to_dict(),
    "more fields": lambda bits: {f"load_in_{bits}bit": True, "bnb_4bit_quant_type": "nf4"},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantization_config_spares_tower_connector_head_and_experts(full_dir, bits, given):
    config = GIVEN[given](bits)
    before = dict(config) if isinstance(config, dict) else config.to_dict()
    for model in (
        load(full_dir(MOE), device="cpu", quantization_config=config)[0],
        AutoModelForImageTextToText.from_pretrained(full_dir(MOE), quantization_config=config),
    ):
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert in_bits(model) == {name for name in linear if is_decoder(name) and not name.endswith("coefficient")}
        assert torch.isfinite(logits(model)).all()
    assert (dict(config) if isinstance(config, dict) else config.to_dict()) == before


@pytest.mark.parametrize(
    "spared",
    [[], ["model.vision_tower"], ["model.mm_projector", "model.vision_tower", "model.layers.0"], ["model.layers.1"]],
)
def test_modules_that_the_caller_names_are_spared_instead(full_dir, spared):
    model, _ = load(full_dir(), device="cpu", quantization_config=load_config(8, llm_int8_skip_modules=spared))
    found = in_bits(model)
    # The head is a class of its own, which bitsandbytes never takes.
    for part in ("model.vision_tower", "model.mm_projector", "model.layers.0", "model.layers.1"):
        assert any(name.startswith(part) for name in found) == (part not in spared)


REFUSED = [
    ({"load_8bit": True, "load_4bit": True}, "exclude each other"),
    (
        {"load_4bit": True, "quantization_config": {"load_in_4bit": True}},
        "load_4bit=True and quantization_config",
    ),
    ({"quantization_config": "4bit"}, "quantization_config is '4bit'"),
    ({"quantization_config": True}, "quantization_config is True"),
    ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "only one can be used"),
    ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quanttype": "nf4"}}, "has no 'bnb_4bit_quanttype'"),
    ({"quantization_config": {"bits": 4}}, "none that transformers knows"),
    ({"quantization_config": BitsAndBytesConfig()}, "no bits; set load_in_4bit or load_in_8bit"),
    ({"load_in_4bit": True}, "load_in_4bit is no keyword of from_pretrained since transformers 5.*load_4bit=True"),
]


@pytest.mark.parametrize(("arguments", "output"), REFUSED, ids=lambda value: str(value)[:40])
def test_inconsistent_requests_are_refused(full_dir, arguments, output):
    with pytest.raises(ValueError, match=output):
        load(full_dir(), device="cpu", **arguments)


@pytest.mark.parametrize(("stored", "asked"), [(4, 8), (8, 4)])
def test_other_bits_than_the_stored_ones_are_refused(quantised_dir, stored, asked):
    directory, _ = quantised_dir(stored)
    output = f"holds {stored}-bit weights, and {asked}-bit were asked for"
    with pytest.raises(ValueError, match=output):
        load(directory, device="cpu", **{f"load_{asked}bit": True})
    with pytest.raises(ValueError, match=output):
        AutoModelForImageTextToText.from_pretrained(directory, quantization_config=load_config(asked))


def test_other_settings_for_the_same_bits_are_reported(quantised_dir, caplog):
    load(quantised_dir(4)[0], device="cpu", quantization_config=load_config(4, bnb_4bit_quant_type="fp4"))
    assert "holds 4-bit weights, which stay as they are: not" in caplog.text
    assert "bnb_4bit_quant_type 'fp4'" in caplog.text


def test_weights_of_another_method_are_named():
    stored = {"quant_method": "gptq", "bits": 4}
    assert get_quantization_kind(stored) == "gptq 4-bit"
    with pytest.raises(ValueError, match="holds gptq 4-bit weights, and 4-bit were asked for"):
        agreed("path", stored, load_config(4))
    assert one_request(False, False, None) is None
    assert with_kept_modules(None) is None


def test_stored_weights_without_bitsandbytes_say_what_to_install(quantised_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"holds 4-bit weights, and reading them needs bitsandbytes: .*\[quant\]"):
        load(quantised_dir(4)[0], device="cpu")


def write_part(directory, model, base, **fields):
    """Write what stage 1 leaves: a connector of other weights, and the base's name."""
    directory.mkdir()
    torch.manual_seed(8)
    weights = {
        f"model.mm_projector.{name}": torch.randn_like(weight) * 0.1
        for name, weight in model.get_model().mm_projector.state_dict().items()
    }
    save_file(weights, directory / "trained.safetensors")
    config = json.loads((base / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {"base_model_name_or_path": str(base), "model_type": "llava_llama"} | fields
    (directory / "config.json").write_text(json.dumps(config))
    return weights


@pytest.mark.parametrize("bits", [4, 8])
def test_a_part_on_a_base_of_few_bits_opens(quantised_dir, tmp_path, bits):
    base, _ = quantised_dir(bits)
    model, _ = load(base, device="cpu")
    weights = write_part(tmp_path / "part", model, base)
    opened, _ = load(tmp_path / "part", device="cpu")
    assert in_bits(opened) == in_bits(model)
    model.load_state_dict(weights, strict=False)
    assert torch.equal(logits(opened), logits(model))
    with pytest.raises(ValueError, match=f"{bits}-bit weights, which cannot be written"):
        merge(tmp_path / "part", tmp_path / "full", report=str)


def test_a_part_that_was_trained_beside_four_bits_opens_on_its_base_in_full_precision(full_dir, tmp_path):
    """A QLoRA run held its base in 4 bits; that is no property of the base's weights."""
    base = full_dir()
    model, _ = load(base, device="cpu")
    weights = write_part(tmp_path / "part", model, base, quantization_config=load_config(4).to_dict())
    opened, _ = load(tmp_path / "part", device="cpu")
    model.load_state_dict(weights, strict=False)
    assert not in_bits(opened)
    assert torch.equal(logits(opened), logits(model))
    held, _ = load(tmp_path / "part", device="cpu", load_4bit=True)
    assert in_bits(held)


@pytest.mark.parametrize("skip", [None, ["lm_head"]])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_plain_language_model_of_few_bits_gets_a_tower_in_full_precision(
    wide_llm_dir, toy_tower_dir, tmp_path, bits, skip
):
    config = load_config(bits, llm_int8_skip_modules=skip)
    AutoModelForCausalLM.from_pretrained(wide_llm_dir, quantization_config=config).save_pretrained(tmp_path / "llm")
    model = assemble(str(tmp_path / "llm"), str(toy_tower_dir()), config_overrides={"mm_projector_type": "mlp2x_gelu"})
    assert in_bits(model)
    assert all(is_decoder(name) for name in in_bits(model))
    model.eval().save_pretrained(tmp_path / "llava")
    assert torch.equal(logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "llava")), logits(model))


@pytest.mark.parametrize("skip", [None, ["lm_head", "model.vision_tower", "model.multi_modal_projector"]])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_directory_of_transformers_own_llava_in_few_bits_opens(full_dir, tmp_path, bits, skip):
    convert(full_dir(), tmp_path / "hf", report=str)
    config = load_config(bits, llm_int8_skip_modules=skip)
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", quantization_config=config).eval()
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "bits").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "hf" / name, tmp_path / "bits")
    hf.save_pretrained(tmp_path / "bits")
    model, processor = load(tmp_path / "bits", device="cpu")
    inputs = processor(text="<image>\nHello!", images=draw_image(1))
    with torch.no_grad():
        expected = hf(**inputs).logits
        found = model(**inputs).logits
    assert torch.equal(found, expected)
    is_spared = not any(name.startswith(("model.vision_tower", "model.mm_projector")) for name in in_bits(model))
    assert is_spared == (skip is not None)


def test_convert_refuses_weights_in_few_bits(quantised_dir, tmp_path):
    with pytest.raises(ValueError, match="holds 4-bit weights, which cannot be written in another layout"):
        convert(quantised_dir(4)[0], tmp_path / "hf", report=str)


def test_half_precision_beside_few_bits_is_read_as_float32_on_the_cpu(full_dir, tmp_path):
    model, processor = load(full_dir(), device="cpu")
    model.half().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, _ = load(tmp_path, device="cpu", load_4bit=True)
    assert model.lm_head.weight.dtype == torch.float32
    assert load(tmp_path, device="cpu", load_4bit=True, dtype="float16")[0].lm_head.weight.dtype == torch.float16


FOUR, EIGHT = load_config(4).to_dict(), load_config(8).to_dict()


@pytest.mark.parametrize(
    ("bits", "stored", "expected"),
    [
        (16, None, {}),
        (4, FOUR, {}),
        (8, EIGHT, {}),
        (16, FOUR, r"'path' holds 4-bit weights, and --bits is 16. Train LoRA beside them \(.* --bits 4\)"),
        (8, FOUR, "holds 4-bit weights, and --bits is 8"),
        (4, EIGHT, "holds 8-bit weights, and --bits is 4"),
        (16, {"quant_method": "awq", "bits": 4}, r"holds awq 4-bit weights, and --bits is 16. Start from"),
    ],
)
def test_training_starts_from_stored_bits_only_with_the_same_flag(bits, stored, expected):
    arguments = SimpleNamespace(bits=bits, bf16=False, fp16=False)
    if isinstance(expected, dict):
        assert quantization(arguments, stored, "path") == expected
        return
    with pytest.raises(ValueError, match=expected):
        quantization(arguments, stored, "path")
