"""Checkpoints that MoE-LLaVA wrote, opened under its own model types: the logits are those of the original's formula.

The reference is a decoder of transformers, its MLPs replaced by a loop over tokens and experts (or by DeepSpeed's
own MoE layer) that reads the checkpoint under MoE-LLaVA's names.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, CLIPVisionModel, SiglipVisionModel

import llava_lite.model as models
from llava_lite.model import LlavaLlamaForCausalLM, LlavaPhiForCausalLM
from llava_lite.model.assemble import assemble
from llava_lite.model.builder import load_pretrained_model
from llava_lite.model.moe.block import RoutingContext

HF_TYPES = {"llama": "llama", "mistral": "mistral", "phi": "phi", "qwen1_5": "qwen2", "stablelm": "stablelm"}
MOE = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "moe_layers_idx": [0, 2],
    "ep_size": 1,
    "top_k_experts": 2,
    "capacity_factor": 1.5,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "use_residual": False,
    "router_aux_loss_coef": 0.01,
    "train_modules": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "wg"],
    "num_experts": [4, 4],
}
IDS = torch.tensor([[1, 50, 60, -200, 70, 80, 90, 31, 32, 33, 34, 35]])
TOWER = "model.image_tower.image_tower."
PROJECTOR = "model.mm_projector.image_spatial_proj."


class Written:
    """A checkpoint as MoE-LLaVA writes it: `config` and `state`, and Hugging Face's parts that they were made of."""

    def __init__(self, decoder, llm_dir, tower_dir, moe, tower_class=CLIPVisionModel):
        torch.manual_seed(7)
        self.tower_dir = tower_dir
        self.hf = AutoModelForCausalLM.from_pretrained(llm_dir, dtype=torch.float32).eval()
        self.moe = moe
        self.config = self.hf.config.to_dict() | {
            "model_type": f"{'moe_' if moe else ''}llava_{decoder}",
            "architectures": [f"MoELLaVA{decoder.title()}ForCausalLM"],
            "mm_image_tower": str(tower_dir),
            "mm_video_tower": None,
            "image_projector_type": "mlp2x_gelu",
            "video_projector_type": "linear",
            "video_global_proj": False,
            "video_temproal_proj": False,
            "video_spatial_proj": False,
            "mm_hidden_size": 32,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "tokenizer_padding_side": "right",
        }
        if decoder == "stablelm":
            # MoE-LLaVA carries StableLM's first code along, which has other names for these.
            self.config["rope_pct"] = 0.25
            self.config["norm_eps"] = self.config.pop("layer_norm_eps")
            for key in ("rope_parameters", "partial_rotary_factor"):
                self.config.pop(key, None)
        self.state = {k: v.clone() for k, v in self.hf.state_dict().items() if k != "lm_head.bias"}
        if moe:
            self.config["moe"] = moe
            for layer, num_experts in zip(moe["moe_layers_idx"], moe["num_experts"], strict=True):
                self.add_experts(layer, num_experts)
        self.projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.state |= {PROJECTOR + k: v.detach() for k, v in self.projector.state_dict().items()}
        self.tower = tower_class.from_pretrained(tower_dir, dtype=torch.float32)
        # A copy in half precision, as Trainer saves it, which counts for nothing while the tower can be found.
        inside = {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in self.tower.state_dict().items()}
        self.state |= {TOWER + k: (v + 1).half() if v.is_floating_point() else v for k, v in inside.items()}
        self.state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    def add_experts(self, layer, num_experts):
        """Replace the MLP of a layer by experts that differ, under DeepSpeed's names."""
        mlp, at = self.hf.model.layers[layer].mlp, f"model.layers.{layer}.mlp."
        self.state = {k: v for k, v in self.state.items() if not k.startswith(at)}
        for expert in range(num_experts):
            for name, weight in mlp.state_dict().items():
                changed = weight + 0.2 * torch.randn_like(weight)
                self.state[f"{at}deepspeed_moe.experts.deepspeed_experts.{expert}.{name}"] = changed
        self.state[f"{at}deepspeed_moe.gate.wg.weight"] = torch.randn(num_experts, 32)
        if self.moe["use_residual"]:
            self.state |= {f"{at}mlp.{name}": torch.randn_like(w) * 0.2 for name, w in mlp.state_dict().items()}
            self.state |= {f"{at}coefficient.weight": torch.randn(2, 32), f"{at}coefficient.bias": torch.randn(2)}

    def write(self, directory, tokenizer=None):
        """Write config.json and pytorch_model.bin, and a tokenizer if given."""
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        torch.save(self.state, directory / "pytorch_model.bin")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return directory

    def expected(self, pixels, layer_class=None, state=None):
        """Return the logits of IDS, computed by Hugging Face's parts with `layer_class` in place of the experts."""
        state = state or self.state
        verify = copy.deepcopy(self.hf)
        if verify.lm_head.bias is not None:
            # MoE-LLaVA's Phi has no bias in its head.
            verify.lm_head.bias.data.zero_()
        for layer in self.moe["moe_layers_idx"] if self.moe else ():
            at = f"model.layers.{layer}.mlp."
            own = {k.removeprefix(at): v for k, v in state.items() if k.startswith(at)}
            block = verify.model.layers[layer]
            block.mlp = (layer_class or LoopOverTokens)(block.mlp, own, self.moe)
        with torch.no_grad():
            features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            features = self.projector(features)[0]
            words = verify.get_input_embeddings()(IDS.clamp(min=0))[0]
            place = int((IDS[0] == -200).nonzero())
            embeds = torch.cat([words[:place], features, words[place + 1 :]])[None]
            return verify(inputs_embeds=embeds).logits


class LoopOverTokens(nn.Module):
    """The top two experts of each token, weighted by their probabilities scaled to sum 1 (MoE-LLaVA, eq. 4)."""

    def __init__(self, mlp, state, moe):
        super().__init__()
        self.state, self.moe, self.top_k = state, moe, moe["top_k_experts"]
        self.experts = [copy.deepcopy(mlp) for _ in range(len(state["deepspeed_moe.gate.wg.weight"]))]
        for index, expert in enumerate(self.experts):
            expert.load_state_dict(self.of(f"deepspeed_moe.experts.deepspeed_experts.{index}."))
        if moe["use_residual"]:
            self.dense = copy.deepcopy(mlp)
            self.dense.load_state_dict(self.of("mlp."))

    def of(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}

    def forward(self, hidden):
        rows = []
        for token in hidden[0]:
            probs = (self.state["deepspeed_moe.gate.wg.weight"] @ token).softmax(0)
            values, chosen = probs.topk(self.top_k)
            values = values / values.sum() if self.top_k > 1 else values
            row = sum(v * self.experts[int(e)](token) for v, e in zip(values, chosen, strict=True))
            if self.moe["use_residual"]:
                mixture = self.state["coefficient.weight"] @ token + self.state["coefficient.bias"]
                first, second = mixture.softmax(0)
                row = first * row + second * self.dense(token)
            rows.append(row)
        return torch.stack(rows)[None]


class DeepSpeedsLayer(nn.Module):
    """DeepSpeed's own layer with MoE-LLaVA's arguments, but for the noise on the second assignment."""

    def __init__(self, mlp, state, moe):
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.layer = MoE(
            32,
            expert=mlp,
            num_experts=len(state["deepspeed_moe.gate.wg.weight"]),
            ep_size=moe["ep_size"],
            k=moe["top_k_experts"],
            capacity_factor=moe["capacity_factor"],
            eval_capacity_factor=moe["eval_capacity_factor"],
            min_capacity=moe["min_capacity"],
            use_residual=moe["use_residual"],
            top2_2nd_expert_sampling=False,
        ).eval()
        self.layer.load_state_dict(state)

    def forward(self, hidden):
        return self.layer(hidden)[0]


@pytest.fixture
def written(toy_llm_dir, toy_tower_dir):
    """Return a function: MoE-LLaVA's name of a decoder, changes of `moe` (None: dense) -> Written."""

    def make(decoder="llama", moe=MOE, **changes):
        moe = None if moe is None else {**moe, **changes}
        return Written(decoder, toy_llm_dir(HF_TYPES[decoder]), toy_tower_dir("clip"), moe)

    return make


def logits_of(model, pixels):
    with torch.no_grad():
        return model(IDS, images=pixels).logits


@pytest.fixture
def pixels():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("decoder", HF_TYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_residual": True}, {"num_experts": [2, 5]}, {"top_k_experts": 1}, {"moe": None}],
    ids=["four", "residual", "two and five", "top 1", "dense"],
)
def test_logits_are_those_of_the_originals_formula(decoder, changes, written, pixels, toy_tokenizer, tmp_path):
    there = written(decoder, **changes)
    directory = there.write(tmp_path / "x91", toy_tokenizer)
    expected = there.expected(pixels)
    _, model, _, _ = load_pretrained_model(str(directory), None, "llava-mpt-7b-lora", device="cpu")
    assert type(model).config_class.model_type == f"llava_{HF_TYPES[decoder]}"
    # Sums of 32 to 64 terms in another order.
    torch.testing.assert_close(logits_of(model, pixels), expected, rtol=0, atol=1e-5)


def test_an_answer_ends_where_the_tokenizer_says(written, toy_tokenizer_for, tmp_path):
    """MoE-LLaVA takes the tokenizer's end for the model's, whatever is in config.json."""
    there = written("phi")
    there.config["eos_token_id"] = 50
    tokenizer = toy_tokenizer_for("qwen")
    _, model, _, _ = load_pretrained_model(there.write(tmp_path / "x", tokenizer), device="cpu")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("decoder", ["llama", "phi"])
@pytest.mark.parametrize("use_residual", [False, True])
def test_logits_are_those_of_deepspeeds_own_layer(decoder, use_residual, written, pixels, tmp_path):
    pytest.importorskip("deepspeed", reason="the reference is DeepSpeed's MoE layer")
    there = written(decoder, use_residual=use_residual)
    model = AutoModelForCausalLM.from_pretrained(there.write(tmp_path / "x"), dtype=torch.float32)
    expected = there.expected(pixels, DeepSpeedsLayer)
    torch.testing.assert_close(logits_of(model, pixels), expected, rtol=0, atol=1e-5)


def test_dropping_as_the_original_does_can_be_asked_for(written, pixels, toy_tokenizer, tmp_path):
    """Nothing is dropped by default; with eval_capacity_factor 0.5 an expert takes 27 / 4 * 2 * 0.5, so 7 tokens."""
    pytest.importorskip("deepspeed", reason="the reference is DeepSpeed's MoE layer")
    there = written("llama", eval_capacity_factor=0.5)
    directory = there.write(tmp_path / "x", toy_tokenizer)
    dropping = {"moe": {"moe_drop_tokens": True}}
    model = load_pretrained_model(directory, device="cpu", overwrite_config=dropping)[1]
    expected = there.expected(pixels, DeepSpeedsLayer)
    torch.testing.assert_close(logits_of(model, pixels), expected, rtol=0, atol=1e-5)
    routing = RoutingContext()
    model(IDS, images=pixels, routing=routing)
    assert sum(layer["dropped"] for layer in routing.stats().values()) > 0
    dropless = load_pretrained_model(directory, device="cpu")[1]
    torch.testing.assert_close(logits_of(dropless, pixels), there.expected(pixels), rtol=0, atol=1e-5)
    assert (logits_of(dropless, pixels) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("decoder", HF_TYPES)
def test_the_auto_classes_know_moe_llavas_model_types(decoder, written, pixels, toy_tokenizer, tmp_path):
    there = written(decoder)
    directory = there.write(tmp_path / "x91", toy_tokenizer)
    config = AutoConfig.from_pretrained(directory)
    assert config.model_type == f"llava_{HF_TYPES[decoder]}"
    assert (config.mm_vision_tower, config.mm_projector_type) == (str(there.tower_dir), "mlp2x_gelu")
    assert config.moe["num_experts"] == [4, 4]
    model = AutoModelForCausalLM.from_pretrained(directory)
    direct = type(model).from_pretrained(directory)
    assert torch.equal(logits_of(model, pixels), logits_of(direct, pixels))
    assert AutoProcessor.from_pretrained(directory).image_aspect_ratio == "pad"


def test_siglip_gives_all_patches_but_the_first_as_it_was_trained(toy_llm_dir, toy_tower_dir, pixels, tmp_path):
    """MoE-LLaVA's -384 releases: its tower takes SigLIP's first patch for a class token."""
    there = Written("phi", toy_llm_dir("phi"), toy_tower_dir("siglip"), MOE, SiglipVisionModel)
    model = AutoModelForCausalLM.from_pretrained(there.write(tmp_path / "x"), dtype=torch.float32)
    assert model.encode_images(pixels).shape[1] == model.config.num_image_tokens == 15
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)


def test_a_tower_that_is_nowhere_else_is_read_off_the_checkpoint(written, tmp_path, caplog):
    there = written("llama")
    there.config["mm_image_tower"] = str(tmp_path / "gone")
    model = AutoModelForCausalLM.from_pretrained(there.write(tmp_path / "x"), dtype=torch.float32)
    assert "cannot be found" in caplog.text
    assert model.get_vision_tower().config.num_hidden_layers == 3
    for name, weight in model.get_vision_tower().encoder.named_parameters():
        assert torch.equal(weight, there.state[f"{TOWER}vision_model.{name}"].float())


def test_a_stage_1_directory_opens_on_its_base(written, toy_llm_dir, pixels, tmp_path):
    """config.json and mm_projector.bin, the connector under image_spatial_proj."""
    there = written("phi", moe=None)
    directory = there.write(tmp_path / "x91")
    (directory / "pytorch_model.bin").unlink()
    torch.save({k: v for k, v in there.state.items() if k.startswith(PROJECTOR)}, directory / "mm_projector.bin")
    _, model, _, _ = load_pretrained_model(directory, str(toy_llm_dir("phi")), "llava-qwen", device="cpu")
    # The base's head has a bias here, which MoE-LLaVA drops.
    expected = there.expected(pixels) + there.hf.lm_head.bias.detach()
    torch.testing.assert_close(logits_of(model, pixels), expected, rtol=0, atol=1e-5)


def test_training_starts_from_what_moe_llava_wrote(written, pixels, tmp_path):
    for name, there in (("dense", written("qwen1_5", moe=None)), ("moe", written("qwen1_5"))):
        model = assemble(str(there.write(tmp_path / name)), dtype=torch.float32)
        torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)


def test_what_was_opened_is_saved_under_our_names_and_reopens(written, pixels, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(written("phi").write(tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["model_type"] == "llava_phi"
    assert not {"mm_image_tower", "image_projector_type", "mm_video_tower"} & fields.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits_of(again, pixels), logits_of(model, pixels))


def test_moe_llavas_class_names_lead_to_the_same_classes(written, tmp_path):
    for name in ("Llama", "Mistral", "Phi", "Qwen1_5", "Stablelm"):
        model_class = getattr(models, f"MoELLaVA{name}ForCausalLM")
        assert model_class is getattr(models, f"EvalMoELLaVA{name}ForCausalLM")
        config = getattr(models, f"MoELLaVA{name}Config")(hidden_size=64, num_experts=[3], top_k_experts=1)
        assert type(config) is model_class.config_class
        assert (config.hidden_size, config.moe) == (64, {"num_experts": [3], "top_k_experts": 1})
    directory = written("llama").write(tmp_path / "x")
    assert type(models.EvalMoELLaVALlamaForCausalLM.from_pretrained(directory)) is LlavaLlamaForCausalLM


def test_a_complete_pickle_beside_incomplete_safetensors_counts(written, pixels, tmp_path, caplog):
    there = written("llama")
    directory = there.write(tmp_path / "x")
    some = {k: v + 1 for k, v in there.state.items() if "experts" not in k and "self_attn" not in k}
    save_file(some, directory / "model.safetensors", metadata={"format": "pt"})
    model = LlavaLlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert "weights in safetensors and" in caplog.text
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)


def test_safetensors_that_are_complete_count(written, pixels, tmp_path):
    there = written("llama")
    directory = there.write(tmp_path / "x")
    save_file({k: v.contiguous() for k, v in there.state.items()}, directory / "model.safetensors")
    torch.save({"lm_head.weight": torch.zeros(1)}, directory / "pytorch_model.bin")
    model = LlavaLlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels), rtol=0, atol=1e-5)
    assert len(load_file(directory / "model.safetensors")) == len(there.state)


@pytest.mark.parametrize("base_layer", [False, True], ids=["peft 0.4", "later peft"])
def test_lora_beside_the_experts_is_added_in(base_layer, written, pixels, tmp_path):
    """MoE-LLaVA writes a model with experts and LoRA as one pickle: W + lora_alpha / lora_r * B A."""
    there = written("qwen1_5")
    there.config["lora"] = {"lora_enable": True, "lora_r": 2, "lora_alpha": 6, "target_modules": ["up_proj"]}
    merged = dict(there.state)
    for name in [name for name in merged if name.endswith("up_proj.weight")]:
        layer, weight = name.removesuffix(".weight"), there.state[name]
        down, up = torch.randn(2, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], 2) * 0.2
        there.state |= {f"{layer}.lora_A.default.weight": down, f"{layer}.lora_B.default.weight": up}
        if base_layer:
            there.state[f"{layer}.base_layer.weight"] = there.state.pop(name)
        merged[name] = weight + 6 / 2 * up @ down
        if ".experts." not in name:
            there.hf.get_parameter(name).data.copy_(merged[name])
    directory = there.write(tmp_path / "x")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model, pixels), there.expected(pixels, state=merged), rtol=0, atol=1e-5)
    del there.config["lora"]
    with pytest.raises(ValueError, match=r"LoRA weights of \d+ layers, such as .*up_proj.*lacks the field lora"):
        AutoModelForCausalLM.from_pretrained(there.write(tmp_path / "y"))
    there.config["lora"] = {"lora_alpha": 6}
    there.state.pop(next(name for name in there.state if ".lora_B." in name))
    with pytest.raises(ValueError, match="is incomplete: lora_A, lora_B and the weight itself"):
        AutoModelForCausalLM.from_pretrained(there.write(tmp_path / "z"))


def test_missing_and_unexpected_weights_are_named(written, toy_tokenizer, tmp_path):
    there = written("llama")
    there.state["model.extra.weight"] = torch.ones(1)
    there.state["model.mm_projector.video_patch_proj.weight"] = torch.ones(1)
    del there.state[f"{PROJECTOR}2.bias"], there.state["model.layers.0.mlp.deepspeed_moe.gate.wg.weight"]
    directory = there.write(tmp_path / "x")
    toy_tokenizer.save_pretrained(directory)
    for opened in (AutoModelForCausalLM.from_pretrained, lambda path: load_pretrained_model(path, device="cpu")):
        with pytest.raises(ValueError, match="2 missing") as error:
            opened(directory)
        for name in ("layers.0.mlp.gate.weight", "mm_projector.2.bias", "model.extra.weight", "video_patch_proj"):
            assert name in str(error.value)


def test_a_phi_that_has_a_bias_in_its_head_keeps_it(written, pixels, tmp_path):
    there = written("phi")
    there.state["lm_head.bias"] = torch.arange(len(there.state["lm_head.weight"])) * 0.1
    model = LlavaPhiForCausalLM.from_pretrained(there.write(tmp_path / "x"), dtype=torch.float32)
    expected = there.expected(pixels) + there.state["lm_head.bias"]
    torch.testing.assert_close(logits_of(model, pixels), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "moe_llava_qwen"}, "Qwen's first generation"),
        ({"model_type": "llava_qwen", "kv_channels": 128}, "Qwen's first generation"),
        ({"model_type": "moe_llava_minicpm"}, "MiniCPM's decoder is not in transformers"),
        ({"mm_video_tower": "LanguageBind/LanguageBind_Video_merge"}, "has a video tower, 'LanguageBind"),
    ],
)
def test_what_cannot_run_here_is_refused_with_the_reason(changes, reason, written, tmp_path):
    there = written("llama")
    there.config |= changes
    directory = there.write(tmp_path / "x")
    for opened in (AutoConfig.from_pretrained, lambda path: load_pretrained_model(path, device="cpu")):
        with pytest.raises(ValueError, match=reason):
            opened(directory)
