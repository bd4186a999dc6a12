"""`--train_modules` is written in MoE-LLaVA's names, and finds our fused weights."""

import pytest

from llava_lite.train.moe_names import match_train_modules

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
