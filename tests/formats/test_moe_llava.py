"""Names of MoE-LLaVA's checkpoints, there and back."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi.modeling_phi import PhiMLP

from llava_lite.formats.moe_llava import (
    config_from,
    from_moe_llava,
    match_train_modules,
    moe_llava_names,
    to_moe_llava,
)
from llava_lite.model.moe.experts import Experts, MlpShape

SHAPE = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
LAYER = "model.layers.0.mlp.deepspeed_moe"
KINDS = {"llama": (LlamaConfig(**SHAPE), LlamaMLP), "phi": (PhiConfig(**SHAPE), PhiMLP)}


def their_layer(kind, num_experts=3):
    """Return MLPs as MoE-LLaVA's experts, and a state dict as its checkpoints name them."""
    config, mlp_class = KINDS[kind]
    torch.manual_seed(0)
    mlps = [mlp_class(config) for _ in range(num_experts)]
    state = {f"{LAYER}.gate.wg.weight": torch.randn(num_experts, 8)}
    for e, mlp in enumerate(mlps):
        state |= {f"{LAYER}.experts.deepspeed_experts.{e}.{k}": v for k, v in mlp.state_dict().items()}
    state |= {
        "model.layers.0.mlp.mlp.fc1.weight": torch.randn(2, 2),
        "model.layers.0.mlp.coefficient.weight": torch.randn(2, 8),
        "model.layers.1.mlp.gate_proj.weight": torch.randn(2, 2),
        "model.mm_projector.image_spatial_proj.0.weight": torch.randn(2, 2),
        "model.image_tower.image_tower.vision_model.post_layernorm.weight": torch.randn(2),
        "lm_head.weight": torch.randn(2, 2),
    }
    return mlps, state


@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts_compute_what_their_experts_do(kind):
    mlps, state = their_layer(kind)
    config, _ = KINDS[kind]
    ours = from_moe_llava(state)
    experts = Experts(config, 3, MlpShape.of(mlps[0]))
    experts.has_gate, experts.has_bias = kind == "llama", kind == "phi"
    experts.load_state_dict(
        {k.removeprefix("model.layers.0.mlp.experts."): v for k, v in ours.items() if ".mlp.experts." in k}
    )
    tokens = torch.randn(6, 8)
    chosen = torch.tensor([[0], [1], [2], [2], [1], [0]])
    out = experts(tokens, chosen, torch.ones(6, 1))
    expected = torch.stack([mlps[int(e)](token) for token, e in zip(tokens, chosen, strict=True)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_names_go_there_and_back(kind):
    _, theirs = their_layer(kind)
    ours = from_moe_llava(theirs)
    back = to_moe_llava(ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert from_moe_llava(ours).keys() == ours.keys()
    assert {"model.layers.0.mlp.gate.weight", "model.mm_projector.0.weight"} <= ours.keys()
    assert "model.vision_tower.vision_tower.vision_model.post_layernorm.weight" in ours


def test_a_parameter_is_found_by_the_names_of_train_modules():
    experts = f"{LAYER}.experts.deepspeed_experts"
    layer = "model.layers.0.mlp"
    assert moe_llava_names(f"{layer}.gate.weight") == [f"{LAYER}.gate.wg.weight"]
    assert moe_llava_names(f"{layer}.experts.gate_up_proj", 2) == [
        f"{experts}.{e}.{linear}.weight" for e in range(2) for linear in ("gate_proj", "up_proj")
    ]
    assert moe_llava_names(f"{layer}.experts.up_proj_bias") == [f"{experts}.0.fc1.bias"]
    assert moe_llava_names(f"{layer}.experts.down_proj", gated=False) == [f"{experts}.0.fc2.weight"]
    assert len(moe_llava_names(f"{layer}.experts.down_proj")) == 2
    assert moe_llava_names("model.layers.1.mlp.gate_proj.weight") == ["model.layers.1.mlp.gate_proj.weight"]


def test_a_checkpoint_with_one_ranks_experts_is_refused():
    _, theirs = their_layer("llama")
    del theirs[f"{LAYER}.experts.deepspeed_experts.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp are incomplete: missing \[\('up_proj', 'weight', 1\)\]"):
        from_moe_llava(theirs)


def test_config_fields_get_our_names():
    theirs = {"model_type": "moe_llava_qwen1_5", "mm_image_tower": "tower", "image_projector_type": "mlp2x_gelu"}
    assert config_from(theirs) == {
        "model_type": "llava_qwen2",
        "mm_vision_tower": "tower",
        "mm_projector_type": "mlp2x_gelu",
    }
    ours = {"model_type": "llava_llama", "mm_vision_tower": "ours", "mm_image_tower": "theirs", "moe": {}}
    assert config_from(ours) == {"model_type": "llava_llama", "mm_vision_tower": "ours", "moe": {}}


def test_a_siglip_tower_stays_without_its_first_patch_as_it_was_trained():
    fields = {"model_type": "moe_llava_phi", "mm_image_tower": "google/siglip-so400m-patch14-384"}
    assert config_from(fields)["mm_vision_select_feature"] == "drop_first"
    assert config_from(fields | {"mm_vision_select_feature": "patch"})["mm_vision_select_feature"] == "drop_first"
    assert config_from(fields | {"mm_vision_select_feature": "cls_patch"})["mm_vision_select_feature"] == "cls_patch"
    fields |= {"mm_image_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_feature": "patch"}
    assert config_from(fields)["mm_vision_select_feature"] == "patch"


def test_state_of_a_dense_model_passes_unchanged():
    state = nn.Linear(2, 2).state_dict()
    assert from_moe_llava(state) == state
    assert to_moe_llava(state) == state


# The names that --train_modules is written in.

GATED = [
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.down_proj",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "lm_head.weight",
]
PHI = [
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.up_proj",
    "model.layers.0.mlp.experts.up_proj_bias",
    "model.layers.0.mlp.experts.down_proj",
    "model.layers.0.mlp.experts.down_proj_bias",
    "model.layers.1.mlp.fc1.weight",
    "model.layers.1.mlp.fc2.bias",
    "model.layers.1.self_attn.dense.weight",
]
EXPERTS = {0: 2}


def test_recipe_of_the_gated_backbones_takes_experts_dense_mlps_and_router():
    matched = match_train_modules(GATED, ["gate_proj", "up_proj", "down_proj", "wg"], EXPERTS)
    assert set(GATED) - set(matched) == {"model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}


def test_recipe_of_phi():
    matched = match_train_modules(PHI, ["fc1", "fc2", "wg"], EXPERTS)
    assert set(PHI) - set(matched) == {"model.layers.1.self_attn.dense.weight"}


def test_without_entries_all_mlps_train():
    assert match_train_modules(GATED, None, EXPERTS) == [name for name in GATED if ".mlp." in name]


def test_down_projections_alone():
    assert match_train_modules(GATED, ["down_proj"], EXPERTS) == [GATED[2], GATED[6]]


@pytest.mark.parametrize("entry", ["w1", "mlp.c_proj", "fc1", "gate_up_proj"])
def test_an_entry_that_trains_nothing_is_an_error(entry):
    with pytest.raises(ValueError, match=f"--train_modules {entry} trains nothing.*known: .*gate_proj.*wg"):
        match_train_modules(GATED, ["down_proj", entry], EXPERTS)


def test_half_of_a_fused_weight_is_an_error():
    with pytest.raises(ValueError, match=r"--train_modules up_proj names .*up_proj.weight but not .*gate_proj.weight"):
        match_train_modules(GATED, ["up_proj"], EXPERTS)
