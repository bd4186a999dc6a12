"""Experts of Qwen3 as transformers' qwen3_moe: fields and weights there and back, measured against transformers."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from llava_lite.formats import hf_llava as layout
from llava_lite.formats import hf_qwen3_moe as qwen3_moe
from llava_lite.model import model_class_for
from llava_lite.model.moe.block import MoeBlock
from llava_lite.model.moe.config import read_moe_config

IMAGE_ID = 60
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
OURS = {
    "model_type": "llava_qwen3",
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 4,
}


def fields_with(**moe):
    """Return fields of our config, with experts as MoeConfig writes them out."""
    return OURS | {"moe": read_moe_config({"moe_mode": "sparse", **moe}, 4).to_dict()}


def hf_model(**text):
    """Return a seeded LLaVA of transformers on qwen3_moe, in eval mode, whose experts are all different."""
    text = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True} | text
    words = Qwen3MoeConfig(**SHAPE | text, vocab_size=64, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)
    vision = CLIPVisionConfig(**SHAPE, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=words, image_token_index=IMAGE_ID)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def asked():
    """Return ids [1, L] with the 16 features of an image, and pixels."""
    torch.manual_seed(1)
    ids = torch.tensor([[1, 5, *[IMAGE_ID] * 16, 7, 9, 11]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}


@pytest.mark.parametrize("is_split", [False, True], ids=["fused", "an expert a name"])
@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ({}, [0, 1, 2]),
        ({"mlp_only_layers": [1]}, [0, 2]),
        ({"decoder_sparse_step": 2}, [1]),
        ({"moe_intermediate_size": 24}, [0, 1, 2]),
        ({"num_experts_per_tok": 1, "norm_topk_prob": False}, [0, 1, 2]),
        ({"head_dim": 8, "attention_bias": True}, [0, 1, 2]),
        ({"use_sliding_window": True, "sliding_window": 6}, [0, 1, 2]),
    ],
    ids=str,
)
def test_model_of_transformers_with_experts_answers_the_same_under_our_names(text, layers, is_split):
    hf = hf_model(**text)
    config, weights = hf.config.to_dict(), dict(hf.state_dict())
    if is_split:
        weights = qwen3_moe.split_experts(weights)
    fields = layout.config_from(config)
    model_class = model_class_for("llava_qwen3")
    ours = model_class(model_class.config_class.from_dict(fields)).eval()
    ours.load_state_dict(layout.weights_from(weights, config), strict=True)
    assert list(ours.moe_layers()) == layers
    with torch.no_grad():
        torch.testing.assert_close(ours(**asked()).logits, hf(**asked()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_block_routes_as_that_of_transformers_where_norm_topk_prob_is_as_written(top_k):
    fields = qwen3_moe.fields_to(fields_with(top_k_experts=top_k))
    config = Qwen3MoeConfig(**SHAPE, **{key: value for key, value in fields.items() if key != "mlp_only_layers"})
    config._experts_implementation = "eager"
    theirs = Qwen3MoeSparseMoeBlock(config)
    moe = read_moe_config({"top_k_experts": top_k, "moe_mode": "dense"}, 1)
    dense = torch.nn.Module()
    dense.gate_proj, dense.up_proj = (torch.nn.Linear(32, 48, bias=False) for _ in range(2))
    dense.down_proj = torch.nn.Linear(48, 32, bias=False)
    ours = MoeBlock(config, moe, 4, dense).eval()
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        ours.get_parameter(name).data.copy_(parameter)
    tokens = torch.randn(2, 50, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("moe", "reason"),
    [
        ({"num_experts": [4, 8]}, r"num_experts is \[4, 8\] in layers \[0, 2\], and it has one number for all"),
        ({"use_residual": True}, "use_residual is True, and it has no dense MLP beside its experts"),
        (
            {"moe_drop_tokens": True, "eval_capacity_factor": 1.5},
            r"eval_capacity_factor 1.5, and it drops no token \(2 and more drop none of 4 experts, 2 a token\)",
        ),
        ({"moe_second_expert_sampling": "always"}, "moe_second_expert_sampling is 'always', and it draws no expert"),
    ],
)
def test_experts_that_qwen3_moe_cannot_express_are_refused_with_their_values(moe, reason):
    with pytest.raises(ValueError, match=rf"qwen3_moe cannot express this model: .*{reason}.*stays loadable here"):
        layout.config_to(fields_with(**moe), IMAGE_ID)


def test_all_reasons_are_given_at_once():
    reason = qwen3_moe.refusal(fields_with(use_residual=True, moe_second_expert_sampling="always"))
    assert "use_residual" in reason
    assert "moe_second_expert_sampling" in reason


def test_a_sliding_window_in_some_layers_is_refused():
    fields = fields_with() | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}
    assert "layers from 3 on alone have a sliding window" in qwen3_moe.refusal(fields)
    assert qwen3_moe.refusal(fields_with() | {"layer_types": ["sliding_attention"] * 4}) is None


@pytest.mark.parametrize(
    "moe",
    [
        {"moe_drop_tokens": True, "eval_capacity_factor": 2.0},
        {"moe_count_padding": True},
        {"moe_second_expert_sampling": True},
        {"capacity_factor": 0.1, "router_aux_loss_coef": 0.5, "train_modules": ["gate_proj"]},
    ],
    ids=str,
)
def test_what_is_of_training_alone_is_no_reason(moe):
    assert qwen3_moe.refusal(fields_with(**moe)) is None


@pytest.mark.parametrize("decoder", ["llama", "mistral", "phi", "qwen2", "stablelm"])
def test_experts_of_other_decoders_are_refused_by_name(decoder):
    reason = layout.refusal(fields_with() | {"model_type": f"llava_{decoder}"})
    assert "for Qwen3 alone (qwen3_moe)" in reason
    assert f"in a decoder '{decoder}'" in reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob False and num_experts_per_tok 2"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob True and num_experts_per_tok 1"),
        ({"moe_intermediate_size": 24, "mlp_only_layers": [0]}, "experts of width 24 .* dense layers of width 48"),
    ],
)
def test_experts_of_transformers_that_this_package_has_not_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        layout.config_from(hf_model(**text).config.to_dict())


def test_a_model_without_a_layer_of_experts_is_a_dense_one():
    fields = layout.config_from(hf_model(mlp_only_layers=[0, 1, 2]).config.to_dict())
    assert fields["model_type"] == "llava_qwen3"
    assert fields.get("moe") is None


def test_what_text_config_says_counts_more_than_what_convert_recorded():
    config = hf_model(mlp_only_layers=[1]).config.to_dict()
    recorded = read_moe_config({"moe_mode": "dense", "num_experts": 8, "router_aux_loss_coef": 0.5}, 3).to_dict()
    config[layout.RECORD] = {"config": {"moe": recorded, "conv_template": "qwen"}}
    fields = layout.config_from(config)
    found = read_moe_config(fields["moe"], 3)
    assert (found.layers, found.num_experts, found.router_aux_loss_coef) == ((0, 2), (4, 4), 0.5)
    assert fields["conv_template"] == "qwen"


def test_a_missing_expert_is_named():
    weights = qwen3_moe.split_experts(hf_model().state_dict())
    del weights["model.language_model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(
        ValueError, match=r"experts of model.language_model.layers.1.mlp are incomplete: .*'up_proj'.*2"
    ):
        qwen3_moe.join_experts(weights)


def test_split_weights_are_views():
    fused = {"model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 6, 5), "lm_head.weight": torch.randn(2, 2)}
    split = qwen3_moe.split_experts(fused)
    assert len(split) == 9
    first = split["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert first.data_ptr() == fused["model.layers.0.mlp.experts.gate_up_proj"][1, 3:].data_ptr()
