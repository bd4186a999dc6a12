"""Full checkpoints that LLaVA wrote, in every form of its releases: the logits are those of Hugging Face's parts."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, CLIPVisionModel

from llava_lite.formats.llava import claims, config_from, plain_name
from llava_lite.model import LlavaLlamaForCausalLM
from llava_lite.model.assemble import assemble
from llava_lite.model.builder import load_pretrained_model

IDS = torch.tensor([[1, 50, 60, -200, 70, 80, 90, 31, 32, 33]])
# What config.json of llava-v1.5-7b has beside the decoder's fields.
FIELDS = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_aspect_ratio": "pad",
    "max_length": 4096,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava_llama",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
    "a_key_that_nobody_knows": [1, 2],
}
TOWER = "model.vision_tower.vision_tower."


class Written:
    """A LLaVA checkpoint: `config` and `state`, and Hugging Face's parts whose logits it must give."""

    def __init__(self, llm_dir, tower_dir, projector="mlp2x_gelu"):
        torch.manual_seed(5)
        self.hf = AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.float32).eval()
        self.tower = CLIPVisionModel.from_pretrained(tower_dir, dtype=torch.float32)
        fields = self.hf.config.to_dict()
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        self.config = fields | FIELDS | {"mm_vision_tower": str(tower_dir), "mm_projector_type": projector}
        layers = [nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)]
        self.projector = layers[0] if projector == "linear" else nn.Sequential(*layers)
        self.state = {k: v.clone() for k, v in self.hf.state_dict().items()}
        self.state |= {f"model.mm_projector.{k}": v.detach() for k, v in self.projector.state_dict().items()}
        # Saved by transformers 4.31, made by the constructor today.
        for layer in range(4):
            self.state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    def tower_state(self, change=0.0, dtype=torch.float16):
        """Return the tower's weights under LLaVA's names, changed so that it shows which copy counts."""
        named = {
            f"{TOWER}vision_model.{k.removeprefix('vision_model.')}": v for k, v in self.tower.state_dict().items()
        }
        return {k: (v + change).to(dtype) if v.is_floating_point() else v for k, v in named.items()}

    def write(self, directory, form="one bin", tokenizer=None):
        """Write config.json and the weights: "one bin", "bin shards", "one safetensors" or "safetensors shards"."""
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.state)
        halves = [names] if form.startswith("one") else [names[::2], names[1::2]]
        stem, ending = ("pytorch_model", "bin") if "bin" in form else ("model", "safetensors")
        weight_map = {}
        for number, half in enumerate(halves, 1):
            file = f"{stem}.{ending}" if len(halves) == 1 else f"{stem}-{number:05}-of-00002.{ending}"
            tensors = {name: self.state[name].clone().contiguous() for name in half}
            torch.save(tensors, directory / file) if ending == "bin" else save_file(
                tensors, directory / file, {"format": "pt"}
            )
            weight_map |= dict.fromkeys(half, file)
        if len(halves) > 1:
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return directory

    def expected(self, pixels):
        """Return the logits of IDS by Hugging Face's decoder and tower and the connector."""
        with torch.no_grad():
            features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            words = self.hf.get_input_embeddings()(IDS.clamp(min=0))[0]
            embeds = torch.cat([words[:3], self.projector(features)[0], words[4:]])[None]
            return self.hf(inputs_embeds=embeds).logits


@pytest.fixture
def written(toy_llm_dir, toy_tower_dir):
    """Return a function: model_type of the decoder, connector -> Written."""
    return lambda decoder="llama", **kwargs: Written(toy_llm_dir(decoder), toy_tower_dir("clip"), **kwargs)


@pytest.fixture
def pixels():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits_of(model, pixels):
    with torch.no_grad():
        return model(IDS, images=pixels).logits


FORMS = ("one bin", "bin shards", "one safetensors", "safetensors shards")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tower_inside", [False, True], ids=["tower absent", "tower inside"])
@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
def test_a_release_opens_in_every_form_of_its_files(
    form, tower_inside, model_type, written, pixels, toy_tokenizer, tmp_path
):
    there = written()
    there.config["model_type"] = model_type
    if tower_inside:
        # LLaVA saves the tower in half precision and does not read it again; neither is it read here.
        there.state |= there.tower_state(change=1.0)
    directory = there.write(tmp_path / "qwen-lora-x91", form, toy_tokenizer)
    _, loaded, image_processor, _ = load_pretrained_model(str(directory), None, "mpt-7b-lora", device="cpu")
    assert type(loaded) is LlavaLlamaForCausalLM
    assert image_processor.crop_size["height"] == 32
    # The same matmul summed in another order.
    torch.testing.assert_close(logits_of(loaded, pixels), there.expected(pixels), rtol=0, atol=1e-5)
    direct = LlavaLlamaForCausalLM.from_pretrained(directory)
    assert torch.equal(logits_of(direct, pixels), logits_of(loaded, pixels))
    assert loaded.config.a_key_that_nobody_knows == [1, 2]


@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_the_auto_classes_open_llavas_own_model_types(decoder, written, pixels, toy_tokenizer, tmp_path):
    there = written(decoder)
    there.config["model_type"] = f"llava_{decoder}"
    directory = there.write(tmp_path / "x91", tokenizer=toy_tokenizer)
    assert AutoConfig.from_pretrained(directory).mm_vision_tower == there.config["mm_vision_tower"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)
    assert AutoProcessor.from_pretrained(directory).image_aspect_ratio == "pad"


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
def test_training_starts_from_a_release(model_type, written, pixels, tmp_path):
    there = written()
    there.config["model_type"] = model_type
    model = assemble(str(there.write(tmp_path / "x")), dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)


def test_llava_v1_has_a_linear_connector(written, pixels, tmp_path):
    there = written(projector="linear")
    del there.config["mm_projector_type"]
    there.config["model_type"] = "llava"
    model = LlavaLlamaForCausalLM.from_pretrained(there.write(tmp_path / "x"))
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)


def test_a_tower_that_was_trained_is_read_from_the_checkpoint(written, pixels, tmp_path):
    there = written()
    there.state |= there.tower_state(change=0.1, dtype=torch.float32)
    there.config["unfreeze_mm_vision_tower"] = True
    model = LlavaLlamaForCausalLM.from_pretrained(there.write(tmp_path / "x"))
    hf = logits_of(model, pixels)
    for parameter in there.tower.parameters():
        parameter.data += 0.1
    torch.testing.assert_close(hf, there.expected(pixels), rtol=0, atol=1e-5)


def test_a_tower_that_the_config_does_not_use_is_left_out(written, tmp_path):
    there = written()
    there.state = {k: v for k, v in there.state.items() if "mm_projector" not in k} | there.tower_state()
    there.config["mm_vision_tower"] = None
    model = LlavaLlamaForCausalLM.from_pretrained(there.write(tmp_path / "x"))
    assert model.get_vision_tower() is None
    ids = IDS.clamp(min=0)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, there.hf(ids).logits, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
@pytest.mark.parametrize("form", FORMS)
def test_missing_and_unexpected_weights_are_named(model_type, form, written, toy_tokenizer, tmp_path):
    there = written()
    there.config["model_type"] = model_type
    del there.state["model.mm_projector.2.bias"], there.state["model.layers.3.mlp.up_proj.weight"]
    there.state["model.vision_resampler.query"] = torch.ones(2)
    there.state["model.layers.9.mlp.up_proj.weight"] = torch.ones(2)
    directory = there.write(tmp_path / "x", form, toy_tokenizer)
    for opened in (LlavaLlamaForCausalLM.from_pretrained, lambda path: load_pretrained_model(path, device="cpu")):
        with pytest.raises(ValueError, match=r"2 missing, such as .* 2 unexpected, such as") as error:
            opened(directory)
        for name in ("mm_projector.2.bias", "layers.3.mlp.up_proj", "vision_resampler.query", "layers.9.mlp.up_proj"):
            assert name in str(error.value)


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
def test_a_weight_of_another_shape_is_named_with_both_shapes(model_type, written, tmp_path):
    there = written()
    there.config["model_type"] = model_type
    there.state["model.mm_projector.0.weight"] = torch.ones(48, 32)
    with pytest.raises(ValueError, match=r"mm_projector.0.weight has shape \(48, 32\), the model expects \(32, 32\)"):
        LlavaLlamaForCausalLM.from_pretrained(there.write(tmp_path / "x"))


def test_a_tower_of_another_size_that_is_not_read_does_no_harm(written, pixels, tmp_path):
    there = written()
    there.state |= {k: torch.ones(3) for k in there.tower_state()}
    model = LlavaLlamaForCausalLM.from_pretrained(there.write(tmp_path / "x"))
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)


def test_only_what_has_another_model_type_than_ours_is_claimed():
    assert claims({"model_type": "llava", "mm_vision_tower": "x"})
    assert claims({"model_type": "llava_qwen", "mm_vision_tower": "x"})
    assert config_from({"model_type": "llava_qwen"}) == {"model_type": "llava_qwen2"}
    others = [{"model_type": "llava", "text_config": {}}, {"model_type": "llava_llama"}, {"model_type": "llama"}]
    others += [{"model_type": "llava_qwen", "kv_channels": 128}, {"model_type": "llava_qwen", "mm_image_tower": "x"}]
    assert not any(claims(fields) for fields in others)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("base_model.model.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("base_model.model.lm_head.weight", "lm_head.weight"),
        ("model.model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.embed_tokens.modules_to_save.default.weight", "model.embed_tokens.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.mm_projector.0.weight", "model.mm_projector.0.weight"),
    ],
)
def test_pefts_wrapping_comes_off_a_name(wrapped, plain):
    assert plain_name(wrapped) == plain
