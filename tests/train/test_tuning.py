"""What trains is what was asked for, by name; the rest stays frozen."""

from types import SimpleNamespace

import pytest
import torch

from llava_lite.train.arguments.fields import ModelArguments
from llava_lite.train.arguments.tuning import TUNING_NAMES
from llava_lite.train.tuning import (
    TUNINGS,
    choose_what_trains,
    describe,
    get_part,
    loading_dtype,
    parameter_groups,
    resolve_dtypes,
    table_rows,
)

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [2], "top_k_experts": 2}


def training_args(tuning, **more):
    """Return what tuning reads of TrainingArguments, without a device being set up."""
    values = {
        "tuning": tuning,
        "freeze_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "mm_projector_lr": None,
        "mm_vision_tower_lr": None,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "lora_r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "lora_bias": "none",
        "lora_vision_tower": False,
        "bf16": False,
        "fp16": False,
        "uses_deepspeed": False,
    }
    return SimpleNamespace(**(values | more))


def choose(model, tuning, model_flags=None, **more):
    """Return the model and the names of what trains."""
    tuned = choose_what_trains(model, ModelArguments(**(model_flags or {})), training_args(tuning, **more))
    return tuned, {name for name, param in tuned.named_parameters() if param.requires_grad}


def test_every_tuning_has_a_name():
    assert list(TUNINGS) == ["projector", "full", "lora", "moe", "prompts", "bias_norm"] == list(TUNING_NAMES)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision_tower"),
        ("model.mm_projector.0.weight", "mm_projector"),
        ("model.image_start", "mm_projector"),
        ("model.adaption_prompt.query", "prompts"),
        ("model.layers.3.self_attn.adaption_gate", "prompts"),
        ("base_model.model.model.layers.3.self_attn.adaption_new_gate", "prompts"),
        ("base_model.model.model.layers.0.mlp.gate_proj.lora_A.default.weight", "lora"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.gate_proj.weight", "decoder"),
        ("model.layers.0.mlp.coefficient.bias", "router"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("model.norm.weight", "decoder"),
    ],
)
def test_part_of_a_parameter(name, part):
    assert get_part(name) == part


def test_projector_tuning_trains_the_connector_alone(toy_model):
    _, trained = choose(toy_model(), "projector")
    assert trained == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_full_tuning_trains_all_but_the_tower(toy_model):
    model, trained = choose(toy_model(), "full")
    assert trained == {name for name, _ in model.named_parameters() if "vision_tower" not in name}


def test_frozen_backbone_leaves_head_and_connector(toy_model):
    _, trained = choose(toy_model(), "full", {"freeze_backbone": True})
    assert {get_part(name) for name in trained} == {"mm_projector", "embeddings"}
    assert "lm_head.weight" in trained
    assert "model.embed_tokens.weight" not in trained


def test_frozen_connector_stays(toy_model):
    _, trained = choose(toy_model(), "full", freeze_mm_mlp_adapter=True)
    assert not any("mm_projector" in name for name in trained)


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_unfrozen_tower_trains_exactly_what_an_image_reaches(toy_model, tower):
    model, trained = choose(toy_model(tower=tower), "full", unfreeze_mm_vision_tower=True)
    images = torch.randn(1, 3, 32, 32)
    model.encode_images(images).pow(2).sum().backward()
    reached = {name for name, param in model.named_parameters() if "vision_tower" in name and param.grad is not None}
    assert reached == {name for name in trained if "vision_tower" in name}
    assert reached


def test_moe_tuning_trains_routers_experts_mlps_and_connector(toy_model):
    model, trained = choose(toy_model(moe=MOE), "moe")
    expected = {
        n for n, _ in model.named_parameters() if "vision_tower" not in n and (".mlp." in n or "projector" in n)
    }
    assert trained == expected


def test_moe_tuning_by_the_names_of_the_script(toy_model):
    names = {"train_modules": ["gate_proj", "up_proj", "down_proj", "wg"]}
    _, by_default = choose(toy_model(moe=MOE), "moe")
    _, by_name = choose(toy_model(moe=MOE), "moe", names)
    assert by_name == by_default


def test_router_trains_even_if_only_attention_is_named(toy_model):
    _, trained = choose(toy_model(moe=MOE), "moe", {"train_modules": ["q_proj"]})
    assert {get_part(name) for name in trained} == {"mm_projector", "router", "decoder"}
    assert all(".self_attn.q_proj." in name for name in trained if get_part(name) == "decoder")


def test_lora_reaches_every_linear_layer_of_the_decoder_and_no_other(toy_model):
    _, trained = choose(toy_model(), "lora")
    layers = {name.split(".lora_")[0] for name in trained if ".lora_" in name}
    expected = {
        f"base_model.model.model.layers.{i}.{kind}_proj"
        for i in range(4)
        for kind in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert layers == expected
    assert {get_part(name) for name in trained} == {"lora", "mm_projector"}


@pytest.mark.parametrize("model_type", ["phi", "qwen2", "qwen3", "stablelm", "mistral"])
def test_lora_finds_the_layers_of_every_backbone(toy_model, model_type):
    _, trained = choose(toy_model(model_type), "lora")
    assert len({name.split(".layers.")[1].split(".")[0] for name in trained if ".lora_" in name}) == 4
    assert not any("vision_tower" in name for name in trained)


def test_lora_has_the_dtype_of_its_model_as_zero_3_demands(toy_model):
    model, _ = choose(toy_model().to(torch.bfloat16), "lora")
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.bfloat16}


def test_lora_reaches_the_tower_only_if_asked_and_only_what_is_read(toy_model):
    _, trained = choose(toy_model(), "lora", lora_vision_tower=True)
    in_tower = {name for name in trained if "vision_tower" in name}
    assert in_tower
    assert all(".lora_" in name for name in in_tower)
    # Layer -2 of 3: the last layer is never run.
    assert not any(".layers.2." in name for name in in_tower)


def test_lora_bias_never_reaches_the_tower(toy_model):
    _, trained = choose(toy_model("phi"), "lora", lora_bias="all")
    assert not any("vision_tower" in name for name in trained)
    assert any(name.endswith("bias") and "layers" in name for name in trained)


def test_lora_leaves_router_and_experts_alone(toy_model):
    _, trained = choose(toy_model(moe={**MOE, "use_residual": True}), "lora")
    assert not any("experts" in name or ".mlp.gate." in name or "coefficient" in name for name in trained)


def test_nothing_to_train_is_an_error(toy_model):
    with pytest.raises(
        ValueError, match=r"--tuning projector trains no parameter .* no connector: give --vision_tower"
    ):
        choose(toy_model(tower=None), "projector")


def test_groups_hold_every_trained_parameter_once_with_its_rate(toy_model):
    args = training_args(
        "full", mm_projector_lr=1e-5, weight_decay=0.1, unfreeze_mm_vision_tower=True, mm_vision_tower_lr=2e-6
    )
    model = choose_what_trains(toy_model(), ModelArguments(), args)
    decays = [name for name, param in model.named_parameters() if param.dim() > 1]
    groups = {group.name: group for group in parameter_groups(model, args, decays)}
    name_of = {param: name for name, param in model.named_parameters()}
    names = [name_of[param] for group in groups.values() for param in group.parameters]
    assert sorted(names) == sorted(name for name, param in model.named_parameters() if param.requires_grad)
    assert groups["mm_projector"].learning_rate == groups["mm_projector_no_decay"].learning_rate == 1e-5
    assert groups["vision_tower"].learning_rate == 2e-6
    assert groups["decoder"].learning_rate == 1e-3
    assert groups["decoder"].weight_decay == 0.1
    assert groups["decoder_no_decay"].weight_decay == 0
    without_decay = {name_of[param] for param in groups["mm_projector_no_decay"].parameters}
    assert without_decay == {"model.mm_projector.0.bias", "model.mm_projector.2.bias"}


def test_without_weight_decay_a_part_is_one_group(toy_model):
    args = training_args("full")
    model = choose_what_trains(toy_model(), ModelArguments(), args)
    groups = parameter_groups(model, args, [name for name, _ in model.named_parameters()])
    assert sorted(group.name for group in groups) == ["decoder", "embeddings", "mm_projector"]
    assert groups[0].for_optimizer()["params"] == list(groups[0].parameters)


def test_table_counts_every_parameter(toy_model):
    args = training_args("projector")
    model = choose_what_trains(toy_model(), ModelArguments(), args)
    rows = table_rows(model, args)
    total = sum(param.numel() for param in model.parameters())
    assert sum(row["trained"] + row["frozen"] for row in rows.values()) == total
    # Two linear layers of 32 x 32 with bias.
    assert rows["mm_projector"]["trained"] == 2 * (32 * 32 + 32)
    assert rows["decoder"]["learning_rate"] is None
    assert "2,112" in describe(model, args)


def test_without_deepspeed_what_trains_is_float32_and_the_rest_half(toy_model):
    args = training_args("projector", bf16=True)
    model = choose_what_trains(toy_model(), ModelArguments(), args)
    assert loading_dtype(args) == torch.bfloat16
    resolve_dtypes(model, args)
    for param in model.parameters():
        assert param.dtype == (torch.float32 if param.requires_grad else torch.bfloat16)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
def test_biases_of_the_connector_train_if_asked_and_nothing_else_of_it(toy_model, lora):
    model = toy_model(mm_projector_type="linear_norm", mm_boundary_vectors=True)
    _, trained = choose(model, "bias_norm", lora_enable=lora)
    assert not any(get_part(name) == "mm_projector" for name in trained)
    model = toy_model(mm_projector_type="linear_norm", mm_boundary_vectors=True)
    _, more = choose(model, "bias_norm", {"bias_connector": True}, lora_enable=lora)
    added = {name.removeprefix("base_model.model.") for name in more - trained}
    assert added == {"model.mm_projector.0.bias", "model.mm_projector.1.bias"}
    assert trained < more


def test_a_connector_without_biases_cannot_train_them(toy_model):
    with pytest.raises(ValueError, match="trains the biases of the connector, and 'identity' has none"):
        choose(toy_model(mm_projector_type="identity"), "bias_norm", {"bias_connector": True}, lora_enable=False)


def test_without_deepspeed_biases_of_a_connector_and_their_norms_are_float32(toy_model):
    args = training_args("bias_norm", bf16=True, lora_enable=False)
    model = toy_model(mm_projector_type="linear_norm").bfloat16()
    model = choose_what_trains(model, ModelArguments(bias_connector=True), args)
    assert loading_dtype(args) == torch.bfloat16
    resolve_dtypes(model, args)
    dtypes = {name: param.dtype for name, param in model.model.mm_projector.named_parameters()}
    full, half = torch.float32, torch.bfloat16
    assert dtypes == {"0.weight": half, "0.bias": full, "1.weight": full, "1.bias": full}
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode_images(torch.randn(1, 3, 32, 32))
    # The sum of what a norm returns does not depend on its input.
    (features * torch.randn_like(features)).sum().backward()
    assert all(layer.bias.grad.any() for layer in model.model.mm_projector)


def test_full_tuning_without_deepspeed_loads_float32():
    assert loading_dtype(training_args("full", bf16=True)) == torch.float32
    assert loading_dtype(training_args("full", bf16=True, uses_deepspeed=True)) == torch.bfloat16
    assert loading_dtype(training_args("full", fp16=True, uses_deepspeed=True)) == torch.float16
