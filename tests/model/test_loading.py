"""Directories opened as models: full, on a base, LLaVA's own layout; nothing missing in silence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.assemble import assemble, load_connector

MOE = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "num_experts": [2, 3],
    "top_k_experts": 2,
    "router_aux_loss_coef": 0.01,
}


def same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("model_type", ["llama", "phi"])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_a_saved_model_reopens_bit_equal_from_a_random_directory_name(
    model_type, moe, tower, toy_model, tmp_path, toy_tower_dir
):
    model = toy_model(model_type, moe=moe, tower=tower)
    directory = tmp_path / "x91"
    model.save_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert type(again) is type(model)
    assert same_weights(model, again)
    assert AutoConfig.from_pretrained(directory).mm_projector_type == "mlp2x_gelu"


def test_weights_on_disk_carry_llavas_names(toy_model, tmp_path):
    toy_model().save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias", "lm_head.weight"} <= names
    assert "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding" in names


def test_missing_and_unexpected_weights_are_named(toy_model, tmp_path):
    toy_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.mm_projector.9.weight"] = weights.pop("model.mm_projector.0.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 missing, such as .*mm_projector.0.weight.*1 unexpected.*mm_projector.9.weight"
    ):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path)


def llava_layout(model, directory, tower):
    """Save as LLaVA does: no vision_config, the tower named, its stale copy among the weights."""
    model.save_pretrained(directory)
    edit_config(directory, vision_config=None, mm_vision_tower=str(tower))
    weights = load_file(directory / "model.safetensors")
    stale = {k: v + 1 if "vision_tower" in k else v for k, v in weights.items()}
    save_file(stale, directory / "model.safetensors", metadata={"format": "pt"})
    return weights


def test_llavas_own_checkpoint_takes_the_tower_that_it_names(toy_model, toy_tower_dir, tmp_path):
    model = toy_model()
    llava_layout(model, tmp_path, toy_tower_dir("clip"))
    assert same_weights(LlavaLlamaForCausalLM.from_pretrained(tmp_path), model)


def test_a_trained_tower_is_taken_from_the_checkpoint(toy_model, toy_tower_dir, tmp_path):
    model = toy_model()
    llava_layout(model, tmp_path, toy_tower_dir("clip"))
    edit_config(tmp_path, unfreeze_mm_vision_tower=True)
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.state_dict()[name], model.state_dict()[name] + 1)


def test_a_tower_that_cannot_be_found_is_read_off_the_checkpoint_with_a_warning(toy_model, tmp_path, caplog):
    torch.manual_seed(0)
    model = toy_model()
    llava_layout(model, tmp_path, tmp_path / "gone")
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert "cannot be found" in caplog.text
    vision = again.get_vision_tower().config
    assert (vision.hidden_size, vision.patch_size, vision.image_size, vision.num_hidden_layers) == (32, 8, 32, 3)
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name] + 1)


def test_a_tower_that_is_nowhere_is_an_error_that_says_what_to_do(toy_llm_dir, tmp_path):
    with pytest.raises(OSError, match=r"^vision tower 'no/such-tower': there is no such directory\."):
        assemble(str(toy_llm_dir()), "no/such-tower")


def test_a_missing_tower_is_reported_before_weights_are_read(toy_model, toy_llm_dir, tmp_path, capfd):
    write_partial(toy_model(), tmp_path / "part", toy_llm_dir(), ["mm_projector"])
    gone = str(tmp_path / "clip")
    edit_config(tmp_path / "part", mm_vision_tower=gone)
    capfd.readouterr()
    with pytest.raises(
        OSError, match=rf"^vision tower '{gone}': there is no such directory\..*names it as mm_vision_tower"
    ):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path / "part")
    assert "Loading weights" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_a_tower_of_another_kind_is_no_copy_of_the_own_one(kind, toy_model, toy_llm_dir, toy_tower_dir, tmp_path):
    write_partial(toy_model(), tmp_path / "part", toy_llm_dir(), ["mm_projector"])
    with pytest.raises(ValueError, match=r"is not the CLIPVisionModel that the model was made for: \d+ weights are"):
        assemble(str(tmp_path / "part"), str(toy_tower_dir(kind)))


def write_partial(model, directory, base, names):
    """Write a directory that holds only the named weights and names its base."""
    model.config.save_pretrained(directory)
    edit_config(directory, base_model_name_or_path=str(base), architectures=["LlavaLlamaForCausalLM"])
    state = {k: v for k, v in model.state_dict().items() if any(n in k for n in names)}
    save_file(state, directory / "trained.safetensors", metadata={"format": "pt"})


def test_a_tower_of_several_scales_is_refused(toy_model, tmp_path):
    toy_model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"s2": True, "s2_scales": "32,64"}))
    with pytest.raises(ValueError, match=r"has s2, a tower that reads an image at several scales"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_projector_directory_opens_on_its_plain_llm(toy_model, toy_llm_dir, tmp_path):
    model = toy_model()
    with torch.no_grad():
        model.model.mm_projector[0].weight.add_(1)
    write_partial(model, tmp_path, toy_llm_dir(), ["mm_projector"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_weights(again, model)
    assert again.config.base_model_name_or_path is None


def test_a_projector_directory_with_llavas_bin_file_alone_opens_too(toy_model, toy_llm_dir, tmp_path):
    model = toy_model()
    write_partial(model, tmp_path, toy_llm_dir(), ["mm_projector"])
    (tmp_path / "trained.safetensors").unlink()
    torch.save({k: v for k, v in model.state_dict().items() if "mm_projector" in k}, tmp_path / "mm_projector.bin")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_partial_directory_may_name_a_base_relative_to_itself(toy_model, toy_llm_dir, tmp_path):
    model = toy_model()
    shutil.copytree(toy_llm_dir(), tmp_path / "base")
    (tmp_path / "stage1").mkdir()
    write_partial(model, tmp_path / "stage1", "../base", ["mm_projector"])
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "stage1"), model)


def test_a_base_that_moved_is_an_error_that_says_what_to_do(toy_model, tmp_path):
    write_partial(toy_model(), tmp_path, "/nowhere/vicuna", ["mm_projector"])
    with pytest.raises(OSError, match=r"its base '/nowhere/vicuna' is not there.*--save_full True"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", "model.mm_projector.image_spatial_proj."]
)
def test_connector_weights_load_under_every_prefix_in_use(prefix, toy_model, tmp_path):
    model, other = toy_model(), toy_model()
    with torch.no_grad():
        for parameter in other.model.mm_projector.parameters():
            parameter.normal_()
    torch.save(
        {prefix + k: v for k, v in other.model.mm_projector.state_dict().items()}, tmp_path / "mm_projector.bin"
    )
    load_connector(model, str(tmp_path / "mm_projector.bin"))
    assert same_weights(model.model.mm_projector, other.model.mm_projector)


def test_a_connector_of_the_wrong_width_is_refused_with_both_shapes(toy_model, tmp_path):
    wrong = {"model.mm_projector.0.weight": torch.zeros(48, 32), "model.mm_projector.0.bias": torch.zeros(48)}
    wrong |= {"model.mm_projector.2.weight": torch.zeros(48, 48), "model.mm_projector.2.bias": torch.zeros(48)}
    torch.save(wrong, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"0.weight has shape \(48, 32\), the model expects \(32, 32\)"):
        load_connector(toy_model(), str(tmp_path / "mm_projector.bin"))


def test_unknown_connector_and_decoder_are_refused_with_the_known_ones(toy_llm_dir, toy_tower_dir, tmp_path):
    with pytest.raises(ValueError, match="unknown connector 'mlp3x'; known: gated_mlpNx, identity, linear"):
        assemble(str(toy_llm_dir()), str(toy_tower_dir()), config_overrides={"mm_projector_type": "mlp3x"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="unknown language model of model_type 'gpt2'; known: llama, mistral"):
        assemble(str(tmp_path), str(toy_tower_dir()))


@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
@pytest.mark.parametrize("content", [b"junk", b"", b"\x80\x04cut"])
def test_file_that_is_no_weights_is_named(toy_model, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}' cannot be read as weights \(.+\)\. Copy it again"):
        load_connector(toy_model(), str(tmp_path / name))
