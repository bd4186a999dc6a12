"""Checkpoints of strangers: absurd sizes, deep or large JSON, code by name, paths that lead outside."""

import json
import os
import shutil
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel

from llava_lite.checkpoints.partial import check_adapter
from llava_lite.checkpoints.sizes import check_connector, check_sizes
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.tokenizer import load_tokenizer
from llava_lite.hub.json_files import LARGEST_BYTES, read_fields
from llava_lite.media.anyres import read_pinpoints
from llava_lite.media.preprocess import load_image_processor
from llava_lite.media.text import open_tokenizer as open_text_tokenizer
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.builder import load_pretrained_model
from llava_lite.model.encoders.base import open_tower
from llava_lite.model.originals import open_tokenizer
from llava_lite.tower_config import load_vision_config

IS_NO_SIZE = r"config\.json: {}.* is .*; expected a whole number from [01] to"
OTHER = r"belongs to another checkpoint, or was changed"


@pytest.fixture
def directory(checkpoint):
    """Return a LLaVA of toys that was saved, with its tokenizer."""
    return checkpoint()


def change(directory, name="config.json", **fields):
    path = directory / name
    found = json.loads(path.read_text())
    for key, value in fields.items():
        *outer, last = key.split(".")
        part = found
        for one in outer:
            part = part[one]
        part[last] = value
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("value", [10**12, -1, 0, 2.5, "64", True, [64, 10**12]], ids=str)
@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
)
def test_what_is_no_size_is_refused_before_a_config_is_made(directory, key, value):
    change(directory, **{key: value})
    with pytest.raises(ValueError, match=IS_NO_SIZE.format(key)):
        load_pretrained_model(directory, device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 100_000_000}, r"describes [\d,]+ weights \(vocab_size x hidden_size\), and its files hold"),
        ({"num_hidden_layers": 4000}, r"names 4,000 layers \(num_hidden_layers\), and its files hold"),
        (
            {"hidden_size": 65536, "num_attention_heads": 1024},
            r"describes [\d,]+ weights \(num_hidden_layers x hidden",
        ),
        ({"intermediate_size": 10**7}, r"describes [\d,]+ weights \(num_hidden_layers x hidden_size x intermediate"),
        ({"head_dim": 2**20}, r"describes [\d,]+ weights \(num_hidden_layers x num_attention_heads x head_dim"),
        ({"mm_hidden_size": 2**20}, r"says mm_hidden_size 1,048,576, and no side of its connector's"),
    ],
)
def test_sizes_are_compared_with_the_headers_before_a_model_is_built(directory, monkeypatch, fields, message):
    change(directory, **fields)
    monkeypatch.setattr(LlavaLlamaForCausalLM, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    for open_it in (LlavaLlamaForCausalLM.from_pretrained, load_pretrained_model):
        with pytest.raises(ValueError, match=f"{message}.*{OTHER}"):
            open_it(directory)


def test_a_plain_model_and_a_tower_are_compared_too(toy_llm_dir, toy_tower_dir, tmp_path, monkeypatch):
    import shutil

    llm, tower = shutil.copytree(toy_llm_dir("llama"), tmp_path / "llm"), tmp_path / "tower"
    shutil.copytree(toy_tower_dir if not callable(toy_tower_dir) else toy_tower_dir("clip"), tower)
    change(llm, vocab_size=100_000_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=OTHER):
        load_pretrained_model(llm, device="cpu")
    found = json.loads((tower / "config.json").read_text())
    (found.get("vision_config") or found)["image_size"] = 10**6
    (tower / "config.json").write_text(json.dumps(found))
    with pytest.raises(OSError, match=r"image_size is 1000000; expected a whole number"):
        load_vision_config(str(tower))


def test_a_tower_is_compared_with_its_own_weights_before_it_is_built(toy_tower_dir, monkeypatch):
    config = load_vision_config(str(toy_tower_dir("clip")))
    config.intermediate_size = 2**24
    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", lambda *_, **__: pytest.fail("a tower was built"))
    with pytest.raises(ValueError, match=rf"hidden_size x intermediate_size.*{OTHER}"):
        open_tower(CLIPVisionModel, str(toy_tower_dir("clip")), config)


@pytest.mark.parametrize("moe", [{"num_experts": [10**6]}, {"num_experts": 10**6}])
def test_experts_are_counted(moe):
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    config.moe = moe
    shapes = {"model.layers.0.mlp.gate.weight": (4, 64), "x": (64, 64)}
    with pytest.raises(ValueError, match=r"experts x hidden_size x their width"):
        check_sizes("there", config, shapes)
    config.moe = {"num_experts": [4]}
    check_sizes("there", config, shapes)
    check_connector("there", config, shapes)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json"),
        *("processor_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
        *("adapter_config.json", "model.safetensors.index.json"),
    ],
)
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "open"])
def test_deep_json_is_a_sentence(directory, name, opening, is_closed):
    closing = ("]" if opening == "[" else "1" + "}") if is_closed else ""
    (directory / name).write_text(opening * 100_000 + closing[:1] + closing[-1:] * 100_000)
    if name == "generation_config.json":
        # As any broken one: the generation fields of config.json are used instead, with a warning.
        load_pretrained_model(directory, device="cpu")
        return
    with pytest.raises((ValueError, OSError), match=rf"{name} (nests lists and fields more than 64 deep|is no JSON)"):
        load_pretrained_model(directory, device="cpu")


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "vocab.json", "tokenizer.json"])
def test_deep_json_beside_a_tokenizer_alone_is_a_sentence(directory, name):
    if name == "vocab.json":
        (directory / "tokenizer.json").unlink()
    (directory / name).write_text(DEEP)
    with pytest.raises(ValueError, match=rf"{name} nests lists and fields more than 64 deep"):
        load_tokenizer(directory)
    if name == "vocab.json":
        return
    # The tokenizers of other systems' checkpoints and of ImageBind's text branch are opened without a config.
    for open_it in (lambda: open_tokenizer([directory]), lambda: open_text_tokenizer(str(directory))):
        with pytest.raises(ValueError, match=rf"{name} nests lists and fields more than 64 deep"):
            open_it()


def test_a_large_tokenizer_is_not_read(directory):
    with (directory / "tokenizer.json").open("r+b") as file:
        file.truncate(2**34)
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json has 17,179,869,184 bytes, and .* at most {LARGEST_BYTES:,}"
    ):
        load_tokenizer(directory)


def test_deep_json_beside_a_plain_model_and_a_tower_is_a_sentence(toy_llm_dir, toy_tower_dir, tmp_path):
    llm, tower = (
        shutil.copytree(path, tmp_path / path.name) for path in (toy_llm_dir("llama"), toy_tower_dir("clip"))
    )
    config = load_vision_config(str(tower))
    for directory in (llm, tower):
        (directory / "adapter_config.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"adapter_config\.json nests lists and fields more than 64 deep"):
        load_pretrained_model(llm, device="cpu")
    with pytest.raises(ValueError, match=r"adapter_config\.json nests lists and fields more than 64 deep"):
        open_tower(CLIPVisionModel, str(tower), config)


def test_a_config_that_another_version_reads_is_bounded_too(directory):
    change(directory, model_type="mistral", configuration_files=["config.4.0.0.json"])
    (directory / "config.4.0.0.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"config\.4\.0\.0\.json nests lists and fields more than 64 deep"):
        Checkpoint(directory).config  # noqa: B018


def test_deep_json_from_the_hub_is_a_sentence(client, directory):
    (directory / "added_tokens.json").write_text(DEEP)
    client(
        f"""
        from huggingface_hub import HfApi
        HfApi().create_repo("tester/deep")
        HfApi().upload_folder(repo_id="tester/deep", folder_path={str(directory)!r})
        """
    )
    found = client('load("tester/deep", device="cpu")', cache="other", succeeds=False)
    assert "added_tokens.json nests lists and fields more than 64 deep" in found
    assert "RecursionError" not in found


def test_json_of_moderate_depth_is_refused_too(directory):
    change(directory, more=json.loads("[" * 200 + "]" * 200))
    with pytest.raises(ValueError, match="more than 64 deep"):
        Checkpoint(directory).fields  # noqa: B018


def test_a_large_json_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**34)
    started_s = time.monotonic()
    with pytest.raises(ValueError, match=rf"has 17,179,869,184 bytes, and such .* at most {LARGEST_BYTES:,}"):
        read_fields(tmp_path / "config.json")
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation_internal"])
@pytest.mark.parametrize("place", ["", "vision_config."])
def test_code_of_the_hub_is_not_asked_for(directory, key, place):
    change(directory, **({"vision_config": {}} if place else {}))
    change(directory, **{f"{place}{key}": "somebody/kernels"})
    with pytest.raises(ValueError, match=rf"{key} is 'somebody/kernels', code of a repository of the Hub"):
        load_pretrained_model(directory, device="cpu")


def test_a_tokenizer_with_code_of_its_own_is_not_asked_about(directory, monkeypatch):
    (directory / "evil.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass Evil: pass\n")
    change(directory, "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(ValueError, match=r"custom code|Evil"):
        load_pretrained_model(directory, device="cpu")
    assert not (directory / "ran").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_no_shard_lies_outside(directory, name):
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names weights outside its directory"):
        load_pretrained_model(directory, device="cpu")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 10**9}, "has the rank 1000000000, and its weights have ranks up to 4"),
        ({"r": "4"}, "has the rank '4'"),
        ({"r": 4, "rank_pattern": {"q_proj": 10**9}}, "has the rank 1000000000"),
        ({"r": 4, "megatron_config": {}, "megatron_core": "evil"}, "names a module to import"),
        ({"r": 4, "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "of the kind 'PROMPT_TUNING'"),
    ],
)
def test_an_adapter_has_the_rank_of_its_weights_and_imports_nothing(fields, message):
    weights = {"base_model.model.q_proj.lora_A.weight": torch.ones(4, 64)}
    with pytest.raises(ValueError, match=message):
        check_adapter("adapter_config.json", {"peft_type": "LORA", **fields}, weights)
    check_adapter("adapter_config.json", {"peft_type": "LORA", "r": 4}, weights)


@pytest.mark.parametrize(
    "pinpoints",
    ["(1x1),...,(1000000x1000000)", [[336, 336]] * 10**6, [[10**6, 10**6]], "[" * 100_000, str([[1, 1]] * 10**5)],
    ids=["range", "many", "large", "deep", "text"],
)
def test_grids_are_few_and_small(pinpoints):
    with pytest.raises(ValueError, match="image_grid_pinpoints") as error:
        read_pinpoints(pinpoints, 336)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "value", [10**6, {"height": 10**6, "width": 10**6}, {"shortest_edge": 10**7}, -1, "224", True]
)
@pytest.mark.parametrize("key", ["size", "crop_size"])
def test_an_image_processor_makes_images_for_towers(directory, key, value):
    name = next(name for name in ("preprocessor_config.json", "processor_config.json") if (directory / name).is_file())
    fields = json.loads((directory / name).read_text())
    (fields.get("image_processor") or fields)[key] = value
    (directory / name).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"{name}: {key} is .*; expected pixels, at most 8,192 a side"):
        load_image_processor(str(directory))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "latest"])
def test_no_pipe_or_device_stands_for_a_file(directory, name):
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    if name == "latest":
        load_pretrained_model(directory, device="cpu")
        return
    with pytest.raises((ValueError, OSError)):
        load_pretrained_model(directory, device="cpu")
