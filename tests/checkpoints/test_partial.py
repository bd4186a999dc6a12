"""Directories of trained weights, as LLaVA writes them, on their base: equal to the formula, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import llm_config
from hub_client import run_client, serving
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel

from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.builder import load_pretrained_model

IDS = torch.tensor([[1, 50, 60, -200, 70, 80, 90, 31, 32, 33]])
R, ALPHA = 4, 6
FIELDS = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "use_mm_proj": True,
}


class Tuned:
    """What LLaVA trained on a Llama: its files, and Hugging Face's parts with the expected weights."""

    def __init__(self, llm_dir, tower_dir):
        torch.manual_seed(11)
        self.base = str(llm_dir)
        self.hf = AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.float32).eval()
        self.tower = CLIPVisionModel.from_pretrained(tower_dir, dtype=torch.float32)
        self.projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.config = self.hf.config.to_dict() | FIELDS | {"mm_vision_tower": str(tower_dir)}

    def connector(self, prefix="model."):
        return {f"{prefix}mm_projector.{k}": v.detach().clone() for k, v in self.projector.state_dict().items()}

    def write_config(self, directory):
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        return directory

    def write_projector(self, directory, **more):
        """Write what stage 1 leaves: config.json and mm_projector.bin."""
        self.write_config(directory)
        torch.save(self.connector() | more, directory / "mm_projector.bin")
        return directory

    def write_lora(self, directory, form="safetensors", **more):
        """Write what finetune_lora.sh leaves; Hugging Face's decoder becomes W + alpha / r * B A."""
        self.write_config(directory)
        adapter = {}
        for name, weight in self.hf.named_parameters():
            if name.endswith(("q_proj.weight", "down_proj.weight")):
                down, up = torch.randn(R, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], R) * 0.1
                weight.data += ALPHA / R * up @ down
                layer = f"base_model.model.{name.removesuffix('.weight')}"
                adapter |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
        fields = {
            "auto_mapping": None,
            "base_model_name_or_path": self.base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.05,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": R,
            "target_modules": ["q_proj", "down_proj"],
            "task_type": "CAUSAL_LM",
        }
        (directory / "adapter_config.json").write_text(json.dumps(fields))
        if form == "safetensors":
            save_file({k: v.contiguous() for k, v in adapter.items()}, directory / "adapter_model.safetensors")
        else:
            torch.save(adapter, directory / "adapter_model.bin")
        torch.save(self.connector("base_model.model.model.") | more, directory / "non_lora_trainables.bin")
        return directory

    def expected(self, pixels, ids=IDS):
        """Return the logits by Hugging Face's decoder and tower and the connector."""
        with torch.no_grad():
            features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            words = self.hf.get_input_embeddings()(ids.clamp(min=0))[0]
            place = int((ids[0] == -200).nonzero())
            embeds = torch.cat([words[:place], self.projector(features)[0], words[place + 1 :]])[None]
            return self.hf(inputs_embeds=embeds).logits


@pytest.fixture
def tuned(toy_llm_dir, toy_tower_dir):
    return Tuned(toy_llm_dir("llama"), toy_tower_dir("clip"))


@pytest.fixture
def pixels():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits_of(model, pixels, ids=IDS):
    with torch.no_grad():
        return model(ids, images=pixels).logits


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_projector_opens_on_the_base_that_is_given(tuned, pixels, tmp_path):
    directory = tuned.write_projector(tmp_path / "x91")
    tokenizer, model, _, _ = load_pretrained_model(str(directory), tuned.base, "mpt-lora", device="cpu")
    torch.testing.assert_close(logits_of(model, pixels), tuned.expected(pixels), rtol=0, atol=1e-5)
    assert len(tokenizer) == len(tuned.hf.get_input_embeddings().weight)
    edit(directory / "config.json", base_model_name_or_path=tuned.base)
    for opened in (LlavaLlamaForCausalLM.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)):
        assert torch.equal(logits_of(opened, pixels), logits_of(model, pixels))


def test_a_projector_without_a_base_says_what_to_give(tuned, tmp_path):
    directory = tuned.write_projector(tmp_path / "x91")
    for opened in (
        LlavaLlamaForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        lambda path: load_pretrained_model(path, device="cpu"),
    ):
        with pytest.raises(
            ValueError, match=r"only what was trained \(mm_projector.bin\) and names no base.*model_base"
        ):
            opened(directory)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_llavas_lora_is_the_formula(form, tuned, pixels, tmp_path):
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    directory = tuned.write_lora(tmp_path / "x91", form)
    tokenizer, model, image_processor, _ = load_pretrained_model(str(directory), tuned.base, "phi-moe", device="cpu")
    for name, weight in tuned.hf.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight.detach(), rtol=0, atol=1e-6, check_device=False)
    torch.testing.assert_close(logits_of(model, pixels), tuned.expected(pixels), rtol=0, atol=1e-5)
    assert image_processor.crop_size["height"] == 32
    # The directory has no tokenizer: it is the base's.
    assert tokenizer.get_vocab() == load_pretrained_model(tuned.base, device="cpu")[0].get_vocab()


def test_biases_of_tower_and_connector_in_an_adapter_count(tuned, pixels, tmp_path):
    """With --lora_bias all LLaVA's filter takes every bias into the adapter, those of the frozen tower too."""
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    directory = tuned.write_lora(tmp_path / "x91")
    names = [name for name, _ in LlavaLlamaForCausalLM.from_pretrained(directory).named_parameters()]
    towers = tuned.tower.state_dict()
    biases = {
        f"base_model.model.{name}": next(
            v for k, v in towers.items() if name.endswith(k.removeprefix("vision_model."))
        )
        for name in names
        if "vision_tower" in name and name.endswith("bias")
    }
    biases |= {k: v for k, v in tuned.connector("base_model.model.model.").items() if k.endswith("bias")}
    save_file(load_file(directory / "adapter_model.safetensors") | biases, directory / "adapter_model.safetensors")
    edit(directory / "adapter_config.json", bias="all")
    model = LlavaLlamaForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(logits_of(model, pixels), tuned.expected(pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lost", ["adapter_config.json", "config.json"])
def test_a_lora_directory_without_one_of_its_configs_is_not_opened_in_part(lost, tuned, tmp_path):
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    directory = tuned.write_lora(tmp_path / "x91")
    (directory / lost).unlink()
    with pytest.raises(OSError, match=f"no {lost}, which names .*Copy it beside them"):
        load_pretrained_model(directory, tuned.base, device="cpu")


@pytest.mark.parametrize("way", ["builder", "class", "auto"])
def test_llavas_lora_finds_the_base_that_its_adapter_names(way, tuned, pixels, tmp_path):
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    directory = tuned.write_lora(tmp_path / "x91")
    opened = {
        "builder": lambda: load_pretrained_model(directory, device="cpu")[1],
        "class": lambda: LlavaLlamaForCausalLM.from_pretrained(directory),
        "auto": lambda: AutoModelForCausalLM.from_pretrained(directory),
    }[way]()
    assert type(opened) is LlavaLlamaForCausalLM
    assert not hasattr(opened, "peft_config")
    torch.testing.assert_close(logits_of(opened, pixels), tuned.expected(pixels), rtol=0, atol=1e-5)


def test_llavas_lora_without_any_base_says_what_to_give(tuned, tmp_path):
    directory = tuned.write_lora(tmp_path / "x91")
    edit(directory / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"non_lora_trainables.bin, adapter_model.safetensors\) and names no base"):
        load_pretrained_model(directory, device="cpu")
    edit(directory / "adapter_config.json", base_model_name_or_path="/nowhere/vicuna")
    with pytest.raises(OSError, match="its base '/nowhere/vicuna' is not there"):
        load_pretrained_model(directory, device="cpu")


def test_lora_keys_that_do_not_fit_are_named(tuned, tmp_path):
    """PEFT itself warns of them and continues."""
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    directory = tuned.write_lora(tmp_path / "x91")
    file = directory / "adapter_model.safetensors"
    adapter = load_file(file)
    layer = "base_model.model.model.layers"
    adapter[f"{layer}.7.self_attn.q_proj.lora_A.weight"] = adapter.pop(f"{layer}.1.self_attn.q_proj.lora_A.weight")
    save_file(adapter, file)
    with pytest.raises(ValueError, match=r"1 missing.*layers\.1\.self_attn.*1 unexpected.*layers\.7\.self_attn"):
        load_pretrained_model(directory, tuned.base, device="cpu")
    file.unlink()
    with pytest.raises(OSError, match=r"has an adapter_config\.json and no weights"):
        load_pretrained_model(directory, tuned.base, device="cpu")


def test_a_connector_that_neither_directory_nor_base_holds_is_an_error(tuned, tmp_path):
    directory = tuned.write_lora(tmp_path / "x91")
    (directory / "non_lora_trainables.bin").unlink()
    for opened in (LlavaLlamaForCausalLM.from_pretrained, lambda path: load_pretrained_model(path, device="cpu")):
        with pytest.raises(ValueError, match=r"4 missing, such as \['model.mm_projector.0.bias'"):
            opened(directory)


def test_trained_weights_that_the_model_lacks_are_named(tuned, tmp_path):
    directory = tuned.write_projector(tmp_path / "x91", **{"model.vision_resampler.query": torch.ones(1)})
    with pytest.raises(ValueError, match=r"the model has no \['model.vision_resampler.query'\]"):
        load_pretrained_model(directory, tuned.base, device="cpu")
    edit(directory / "config.json", mm_projector_type="mlp3x_gelu")
    torch.save(tuned.connector(), directory / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"2 missing.*mm_projector\.4\.weight"):
        load_pretrained_model(directory, tuned.base, device="cpu")


def test_a_full_model_with_a_base_says_to_leave_the_base_out(tuned, toy_model, tmp_path):
    toy_model().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"holds nothing to put on a base.*It is a complete model: open it without"):
        load_pretrained_model(tmp_path, tuned.base, device="cpu")


def test_a_pickle_with_code_in_it_is_refused(tuned, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    directory = tuned.write_projector(tmp_path / "x91", attack=Attack())
    with pytest.raises(ValueError, match=r"mm_projector.bin' cannot be read.*a pickle with code in it, .*open"):
        load_pretrained_model(directory, tuned.base, device="cpu")
    lora = tuned.write_lora(tmp_path / "x92", "bin")
    torch.save({"a": Attack()}, lora / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin' cannot be read.*a pickle with code in it"):
        load_pretrained_model(lora, tuned.base, device="cpu")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("form", ["full", "two rows"])
def test_the_vocabulary_rows_of_new_tokens_are_found(form, tuned, pixels, toy_tokenizer, tmp_path):
    """With mm_use_im_start_end stage 1 trains embeddings of <im_start> and <im_end>; head rows are the mean of all."""
    rows = torch.randn(2, 32)
    table, head = tuned.hf.get_input_embeddings().weight.data, tuned.hf.lm_head.weight.data
    num_words = len(table)
    table = torch.cat([table + 0.5 if form == "full" else table, rows])
    tuned.config |= {"mm_use_im_start_end": True, "vocab_size": num_words + 2}
    embedding = table if form == "full" else rows
    directory = tuned.write_projector(tmp_path / "x91", **{"model.embed_tokens.weight": embedding})
    tuned.hf.resize_token_embeddings(num_words + 2)
    tuned.hf.get_input_embeddings().weight.data = table
    tuned.hf.lm_head.weight.data = torch.cat([head, head.mean(dim=0, keepdim=True).expand(2, -1)])
    tokenizer, model, _, _ = load_pretrained_model(directory, tuned.base, device="cpu")
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [num_words, num_words + 1]
    ids = torch.cat(
        [IDS[:, :3], torch.tensor([[num_words]]), IDS[:, 3:4], torch.tensor([[num_words + 1]]), IDS[:, 4:]], 1
    )
    torch.testing.assert_close(logits_of(model, pixels, ids), tuned.expected(pixels, ids), rtol=0, atol=1e-5)
    direct = LlavaLlamaForCausalLM.from_pretrained(directory, config=with_base(directory, tuned.base))
    assert torch.equal(logits_of(direct, pixels, ids), logits_of(model, pixels, ids))


@pytest.mark.parametrize("inside", ["adapter", "trainables"])
def test_embeddings_saved_with_a_lora_count(inside, tuned, pixels, tmp_path):
    """PEFT writes both tables into the adapter where words were added, LLaVA into non_lora_trainables.bin."""
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    num_words = len(tuned.hf.get_input_embeddings().weight) + 2
    tuned.hf.resize_token_embeddings(num_words)
    tables = {
        "model.embed_tokens.weight": torch.randn(num_words, 32),
        "lm_head.weight": torch.randn(num_words, 32) * 0.2,
    }
    for name, table in tables.items():
        tuned.hf.get_parameter(name).data = table.clone()
    tuned.config |= {"mm_use_im_start_end": True, "vocab_size": num_words}
    tables = {f"base_model.model.{name}": table for name, table in tables.items()}
    directory = tuned.write_lora(tmp_path / "x91", **(tables if inside == "trainables" else {}))
    if inside == "adapter":
        file = directory / "adapter_model.safetensors"
        save_file(load_file(file) | tables, file)
    ids = torch.cat([IDS, torch.tensor([[num_words - 2, num_words - 1]])], dim=1)
    _, model, _, _ = load_pretrained_model(directory, device="cpu")
    torch.testing.assert_close(logits_of(model, pixels, ids), tuned.expected(pixels, ids), rtol=0, atol=1e-5)


def with_base(directory, base):
    config = AutoConfig.from_pretrained(directory)
    config.base_model_name_or_path = base
    return config


def test_a_stage_on_a_stage_takes_the_tokenizer_of_the_last_base(tuned, pixels, tmp_path):
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    first = tuned.write_projector(tmp_path / "first")
    edit(first / "config.json", base_model_name_or_path=tuned.base)
    tuned.projector[0].weight.data *= 2
    tuned.base = str(first)
    second = tuned.write_lora(tmp_path / "second")
    tokenizer, model, _, _ = load_pretrained_model(second, device="cpu")
    torch.testing.assert_close(logits_of(model, pixels), tuned.expected(pixels), rtol=0, atol=1e-5)
    assert tokenizer("Hello!")["input_ids"]


def test_llavas_lora_opens_from_the_hub(tuned, pixels, tmp_path):
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    code = f"""
    import shutil
    from huggingface_hub import HfApi
    from llava_lite.model.builder import load_pretrained_model
    for name in ("base", "lora"):
        HfApi().create_repo(f"tester/{{name}}")
        HfApi().upload_folder(repo_id=f"tester/{{name}}", folder_path="{tmp_path}/" + name)
    shutil.rmtree("{tmp_path}/base")
    pixels, expected = torch.load("{tmp_path}/expected.pt")
    ids = torch.tensor({IDS.tolist()})
    for given in ("tester/base", None):
        tokenizer, model, image_processor, _ = load_pretrained_model("tester/lora", given, "qwen-moe", device="cpu")
        print((model(ids, images=pixels).logits - expected).abs().max().item() < 1e-5, len(tokenizer))
    model = llava_lite.model.LlavaLlamaForCausalLM.from_pretrained("tester/lora")
    print((model(ids, images=pixels).logits - expected).abs().max().item() < 1e-5)
    """
    shutil.copytree(tuned.base, tmp_path / "base")
    num_words = len(tuned.hf.get_input_embeddings().weight)
    tuned.base = "tester/base"
    tuned.write_lora(tmp_path / "lora")
    torch.save([pixels, tuned.expected(pixels)], tmp_path / "expected.pt")
    with serving() as hub:
        reported = run_client(hub, tmp_path / "home", code)
    assert reported.split() == ["True", str(num_words), "True", str(num_words), "True"]


def test_our_lora_on_the_hub_opens_through_the_auto_class(tuned, pixels, tmp_path):
    """The Auto class follows adapter_config.json of a hub id, so what is published points at itself there."""
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    tower = tuned.config["mm_vision_tower"]
    code = f"""
    from huggingface_hub import HfApi
    from llava_lite.hub.push import push_directory
    HfApi().create_repo("tester/base")
    HfApi().upload_folder(repo_id="tester/base", folder_path="{tuned.base}")
    HfApi().create_repo("tester/tower")
    HfApi().upload_folder(repo_id="tester/tower", folder_path="{tower}")
    push_directory("{tmp_path}/lora", "tester/lora", base="tester/base", tower="tester/tower")
    model = AutoModelForCausalLM.from_pretrained("tester/lora")
    pixels, expected = torch.load("{tmp_path}/expected.pt")
    logits = model(torch.tensor({IDS.tolist()}), images=pixels).logits
    print(type(model).__name__, (logits - expected).abs().max().item() < 1e-5)
    """
    directory = tuned.write_lora(tmp_path / "lora")
    edit(directory / "config.json", base_model_name_or_path=tuned.base)
    torch.save([pixels, tuned.expected(pixels)], tmp_path / "expected.pt")
    with serving() as hub:
        reported = run_client(hub, tmp_path / "home", code)
    assert reported.split() == ["LlavaLlamaForCausalLM", "True"]


def test_lora_alone_is_loaded_on_a_llava_model_too(tuned, toy_model, toy_tokenizer, pixels, tmp_path):
    """What PEFT saves by itself: an adapter without a config.json, on a full LLaVA model."""
    peft = pytest.importorskip("peft", reason="needs the extra 'peft'")
    full = toy_model()
    full.save_pretrained(tmp_path / "full")
    toy_tokenizer.save_pretrained(tmp_path / "full")
    target = r"model\.layers\.\d+\.self_attn\.v_proj"
    wrapped = peft.get_peft_model(full, peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "full"))
    _, model, _, _ = load_pretrained_model(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits_of(model, pixels), logits_of(wrapped, pixels), rtol=0, atol=1e-5)
    shutil.move(tmp_path / "full", tmp_path / "moved")
    _, moved, _, _ = load_pretrained_model(tmp_path / "adapter", tmp_path / "moved", device="cpu")
    assert torch.equal(logits_of(moved, pixels), logits_of(model, pixels))
    # The Auto class keeps the adapter beside the weights, as it does for every model.
    beside = AutoModelForCausalLM.from_pretrained(point_at(tmp_path / "adapter", tmp_path / "moved"))
    assert beside.peft_config
    torch.testing.assert_close(logits_of(beside, pixels), logits_of(model, pixels), rtol=0, atol=1e-5)


def point_at(adapter, base):
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    return adapter


def test_lora_alone_on_a_plain_model_finds_the_base_that_it_names(tuned, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra 'peft'")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32), lora).eval()
    wrapped.save_pretrained(tmp_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(point_at(tmp_path, tuned.base), device="cpu")
    ids = IDS.clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wrapped(ids).logits, rtol=0, atol=1e-5)
    assert image_processor is None
    assert tokenizer("Hello!")["input_ids"]
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{name}.x": weight for name, weight in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"8 missing.*8 unexpected"):
        load_pretrained_model(tmp_path, device="cpu")


def test_the_newline_of_any_resolution_comes_with_the_connector(tuned, tmp_path):
    tuned.config |= {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}
    newline = torch.randn(32)
    directory = tuned.write_projector(tmp_path / "x91", **{"model.image_newline": newline})
    _, model, _, _ = load_pretrained_model(directory, tuned.base, device="cpu")
    assert torch.equal(model.model.image_newline.data, newline)
    tuned.write_projector(directory)
    with pytest.raises(ValueError, match=r"1 missing, such as \['model\.image_newline'\]"):
        load_pretrained_model(directory, tuned.base, device="cpu")


@pytest.mark.slow
def test_under_zero3_every_directory_opens_as_it_does_without(toy_llm_dir, toy_tower_dir, toy_model, tmp_path):
    """A partitioned weight has no rows to count, and PEFT cannot add to it."""
    pytest.importorskip("deepspeed", reason="ZeRO-3 is DeepSpeed's")
    pytest.importorskip("peft", reason="needs the extra 'peft'")
    parts = [Tuned(toy_llm_dir("llama"), toy_tower_dir("clip")) for _ in range(3)]
    num_words = parts[0].config["vocab_size"] + 2
    parts[1].config |= {"vocab_size": num_words, "mm_use_im_start_end": True}
    rows = {"model.embed_tokens.weight": torch.randn(2, 32)}
    directories = [parts[0].write_lora(tmp_path / "lora"), parts[1].write_projector(tmp_path / "rows", **rows)]
    directories.append(parts[2].write_projector(tmp_path / "projector"))
    for directory in directories[1:]:
        edit(directory / "config.json", base_model_name_or_path=str(toy_llm_dir("llama")))
    toy_model(moe={"num_experts": 4, "moe_mode": "sparse"}).save_pretrained(tmp_path / "moe")
    edit(tmp_path / "moe" / "config.json", model_type="moe_llava_llama")
    toy_model().save_pretrained(tmp_path / "extra")
    weights = load_file(tmp_path / "extra" / "model.safetensors") | {"model.extra.weight": torch.ones(1)}
    save_file(weights, tmp_path / "extra" / "model.safetensors", {"format": "pt"})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("zero3_loading_worker.py")
    run = subprocess.run(
        [
            *launcher,
            str(worker),
            str(tmp_path / "out.json"),
            *map(str, directories),
            *map(str, tmp_path.glob("[em]*")),
        ],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = {
        Path(directory).name: reported
        for directory, reported in json.loads((tmp_path / "out.json").read_text()).items()
    }
    assert "1 unexpected, such as ['model.extra.weight']" in found.pop("extra")
    assert found == {"lora": 0, "rows": 0, "projector": 0, "moe": 0}


@pytest.mark.parametrize("is_grown", [True, False], ids=["grown", "padded"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_with_rows_of_single_tokens_answers_as_peft_does(is_tied, is_grown, toy_tokenizer_for, tmp_path):
    from peft import LoraConfig, get_peft_model

    tokenizer = toy_tokenizer_for("llama")
    num_words = len(tokenizer)
    ids = [num_words, num_words + 1]
    config = llm_config("llama", num_words + (0 if is_grown else 8))
    config.tie_word_embeddings = is_tied
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config)
    hf.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<seg>", "<loc_1>"])
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if is_grown:
        hf.resize_token_embeddings(len(tokenizer))
    rows = ids if is_tied else {"embed_tokens": ids, "lm_head": ids}
    tuned = get_peft_model(hf, LoraConfig(r=R, target_modules=["q_proj"], trainable_token_indices=rows)).eval()
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape) * 0.1)
        expected = tuned(input_ids=torch.tensor([[1, 5, *ids, 9]])).logits
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    _, model, _, _ = load_pretrained_model(tmp_path / "tuned", device="cpu")
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[1, 5, *ids, 9]])).logits
    # Merging adds in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
