"""Layer bodies of ours against those of transformers: numbers, gradients, memory, and what a model looks like."""

import copy
import pickle

import pytest
import torch
from conftest import BACKBONE_TYPES, float_error, llm_config
from torch import nn
from transformers import AutoModel

from llava_lite.model import BACKBONES
from llava_lite.model.fast_layer import STAND_INS, FastLayer
from llava_lite.model.plain_paths import set_plain_paths

LENGTHS = (9, 5, 7)
MOE = {"moe_enable": True, "moe_layers_idx": [1, 2], "num_experts": [3], "top_k_experts": 2, "moe_drop_tokens": False}
# What changes a backbone's body.
VARIANTS = {
    "llama": [{}],
    "mistral": [{}, {"sliding_window": 4}],
    "qwen2": [{}],
    "qwen3": [{}],
    "phi": [{}, {"qk_layernorm": True}],
    "stablelm": [{}, {"use_parallel_residual": True}, {"qk_layernorm": True, "use_qkv_bias": True}],
}
CASES = [(kind, variant) for kind in BACKBONE_TYPES for variant in VARIANTS[kind]]
EACH = pytest.mark.parametrize(("kind", "variant"), CASES, ids=["-".join([kind, *variant]) for kind, variant in CASES])


def build(kind, variant=None, moe=None, attention="varlen", **more):
    """Return (our stack in training, the stock stack with its weights or None where it has experts)."""
    config = llm_config(kind, 64)
    fields = config.to_dict() | {"resid_pdrop": 0.0, "hidden_dropout": 0.0} | (variant or {}) | more
    fields.pop("model_type")
    torch.manual_seed(0)
    ours = BACKBONES[kind].decoder_class(BACKBONES[kind].config_class(**fields, moe=moe))
    ours.set_attn_implementation(attention)
    for name, weight in ours.named_parameters():
        # Norms that do something, and biases too.
        if weight.dim() == 1:
            nn.init.normal_(weight, mean=float("bias" not in name), std=0.3)
    stock = None
    if moe is None:
        stock = AutoModel.from_config(type(config)(**fields), attn_implementation=attention)
        stock.load_state_dict(ours.state_dict())
        stock.train()
    return ours.train(), stock


def packed():
    """Return the inputs of a packed row of three samples."""
    torch.manual_seed(1)
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return {
        "inputs_embeds": torch.randn(1, sum(LENGTHS), 32),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


def padded():
    """Return the inputs of a batch of two rows, one with padding."""
    torch.manual_seed(1)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    return {"inputs_embeds": torch.randn(2, 11, 32), "attention_mask": mask}


def run(stack, inputs, rows=None, plain=(), **kwargs):
    """Return (hidden states, those of `rows` if given, gradients by name) of a loss over them."""
    set_plain_paths(stack, plain)
    stack.zero_grad()
    inputs = dict(inputs, inputs_embeds=inputs["inputs_embeds"].clone().requires_grad_())
    hidden = stack(**inputs, use_cache=False, **kwargs).last_hidden_state
    if "attention_mask" in inputs:
        hidden = hidden * inputs["attention_mask"][..., None]
    if rows is not None and "supervised_rows" not in kwargs:
        hidden = hidden.flatten(0, 1)[rows][None]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights).sum().backward()
    grads = {name: param.grad for name, param in stack.named_parameters() if param.grad is not None}
    return hidden.detach(), grads | {"inputs": inputs["inputs_embeds"].grad}


def assert_same(ours, theirs):
    """Compare forward to what float32 sums over 64 terms a layer differ by, backward to 1e-5 of the largest."""
    torch.testing.assert_close(ours[0], theirs[0], atol=float_error(theirs[0], num_terms=3 * 64), rtol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        largest = max(float(grad.abs().max()), 1.0)
        torch.testing.assert_close(ours[1][name], grad, atol=1e-5 * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@EACH
@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("batch", [packed, padded])
def test_body_is_that_of_transformers(kind, variant, attention, batch):
    ours, stock = build(kind, variant, attention=attention)
    inputs = batch()
    if attention == "varlen" and kind == "stablelm" and batch is packed:
        # Stock StableLM does not tell its attention where samples end; the mask of sdpa does.
        stock.set_attn_implementation("sdpa")
    theirs = run(stock, {k: v for k, v in inputs.items() if attention == "varlen" or "len" not in k})
    assert_same(run(ours, inputs), theirs)


@EACH
@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("batch", [packed, padded])
def test_plain_path_gives_the_same_numbers(kind, variant, moe, batch):
    ours, _ = build(kind, variant, moe)
    assert_same(run(ours, batch()), run(ours, batch(), plain=["layers"]))


@EACH
@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
def test_last_layer_gives_the_wanted_rows_and_their_gradients(kind, variant, moe, attention):
    ours, _ = build(kind, variant, moe, attention)
    assert ours.selects_rows
    rows = torch.tensor([3, 4, 5, 13, 20])
    few = run(ours, packed(), rows, supervised_rows=rows)
    assert few[0].shape == (1, 5, 32)
    assert_same(few, run(ours, packed(), rows))


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_rows_of_a_batch_with_padding_are_counted_over_all_positions(kind):
    ours, _ = build(kind)
    rows = torch.tensor([2, 9, 14, 17])
    batch = padded()
    whole = run(ours, batch, rows)
    mask = batch.pop("attention_mask")
    real = mask.flatten().nonzero().squeeze(1)
    assert set(rows.tolist()) <= set(real.tolist())
    set_plain_paths(ours, ())
    out = ours(**batch, attention_mask=mask, use_cache=False, supervised_rows=rows).last_hidden_state
    torch.testing.assert_close(out, whole[0], atol=1e-5, rtol=0)


def test_no_supervised_row_at_all_is_an_empty_result_with_zero_gradients():
    ours, _ = build("llama")
    hidden, grads = run(ours, packed(), torch.tensor([], dtype=torch.long), supervised_rows=torch.tensor([]).long())
    assert hidden.shape == (1, 0, 32)
    assert float(grads["layers.0.mlp.up_proj.weight"].abs().max()) == 0


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_only_a_dense_last_layer_selects_rows_and_no_plain_one(kind):
    ours, _ = build(kind)
    assert [layer.selects_rows for layer in ours.layers] == [False, False, False, True]
    for plain in (["rows"], ["layers"]):
        set_plain_paths(ours, plain)
        assert not ours.selects_rows
    with_experts, _ = build(kind, moe=MOE | {"moe_layers_idx": [3]})
    assert not with_experts.selects_rows
    hidden = with_experts(**packed(), use_cache=False, supervised_rows=torch.tensor([1])).last_hidden_state
    assert hidden.shape == (1, sum(LENGTHS), 32)


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
@pytest.mark.parametrize("moe", [None, MOE])
def test_checkpointing_changes_nothing(kind, moe):
    ours, _ = build(kind, moe=moe)
    rows = torch.tensor([1, 2, 15])
    without = run(ours, packed(), rows, supervised_rows=rows)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    # The first part of a layer: a recompute stops as soon as it has made the last tensor that was kept.
    ours.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    with_it = run(ours, packed(), rows, supervised_rows=rows)
    assert len(calls) == 2
    assert torch.equal(with_it[0], without[0])
    assert_same(with_it, without)


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_frozen_decoder_hands_the_gradient_to_its_input(kind):
    ours, stock = build(kind)
    assert_same(run(ours.requires_grad_(False), packed()), run(stock.requires_grad_(False), only_positions(stock)))


def only_positions(stock):
    """Return the packed row for a stock stack: by the mask that positions make."""
    stock.set_attn_implementation("sdpa")
    return {k: v for k, v in packed().items() if "len" not in k}


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_no_gradient_runs_below_the_first_trained_weight(kind):
    ours, _ = build(kind)
    ours.requires_grad_(False)
    ours.layers[2].mlp.requires_grad_(True)
    needs = {}
    for index, layer in enumerate(ours.layers):
        layer.register_forward_hook(lambda _, args, out, i=index: needs.update({i: out.requires_grad}))
    ours(**packed(), use_cache=False)
    assert needs == {0: False, 1: False, 2: True, 3: True}


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_adapters_train_as_on_stock_layers(kind):
    peft = pytest.importorskip("peft", reason="LoRA needs the extra `peft`")
    stacks = build(kind)
    inputs = only_positions(stacks[1])
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "dense", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]
    present = [name for name in names if any(key.endswith(name) for key, _ in stacks[0].named_modules())]
    results = []
    for stack, batch in zip(stacks, (packed(), inputs), strict=True):
        config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=present, lora_dropout=0.0, init_lora_weights=False)
        torch.manual_seed(3)
        results.append(run(peft.get_peft_model(stack, config), batch))
    assert any("lora_B" in name for name in results[0][1])
    assert_same(*results)


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_half_precision_is_as_near_to_float32_as_the_stock_layers_are(kind):
    ours, stock = build(kind)
    exact = run(ours, packed())[0]
    inputs, positions = packed(), only_positions(stock)
    for batch in (inputs, positions):
        batch["inputs_embeds"] = batch["inputs_embeds"].bfloat16()
    near = run(ours.bfloat16(), inputs)[0].float()
    stock_near = run(stock.bfloat16(), positions)[0].float()
    assert (near - exact).norm() <= 1.2 * (stock_near - exact).norm()


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_autocast_gives_what_it_gives_on_stock_layers(kind):
    ours, stock = build(kind)
    positions = only_positions(stock)
    exact = run(ours, packed())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, stock_near = run(ours, packed())[0].float(), run(stock, positions)[0].float()
    assert (near - exact).norm() <= 1.2 * (stock_near - exact).norm()


def saved_bytes(stack, inputs):
    """Return the bytes that a forward pass of the layers keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # A tensor is held, or its memory would be handed out again.
        kept.setdefault(storage.data_ptr(), tensor)
        return tensor

    embeds = inputs["inputs_embeds"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = stack(**{**inputs, "inputs_embeds": embeds}, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
@pytest.mark.parametrize("trains", [True, False])
def test_layers_keep_less_than_stock_ones(kind, trains):
    ours, _ = build(kind)
    ours.requires_grad_(trains)
    kept = {}
    for plain in ((), ("layers",)):
        set_plain_paths(ours, plain)
        kept[plain] = saved_bytes(ours, packed())
    num_floats = 4 * len(ours.layers) * sum(LENGTHS)
    # silu(gate) [64] a token, and more of Phi's activation; in training the activation's output [64] and the normed
    # rows [32] of each RMSNorm too.
    least = num_floats * (64 + trains * (64 + 2 * 32 * (kind not in ("phi", "stablelm"))))
    assert kept[()] <= kept[("layers",)] - least


@pytest.mark.parametrize("trains", [True, False])
def test_what_a_layer_keeps_a_token_can_be_counted(trains):
    ours, _ = build("llama")
    ours.requires_grad_(trains)
    ours.layers, ours.config.num_hidden_layers = ours.layers[:1], 1
    hidden, keys, inner = 32, 16, 64
    # Input of both norms, queries, keys, values, gate, up; to train: both norms' outputs and attention's.
    each = 3 * hidden + 2 * keys + 2 * inner + trains * 3 * hidden
    # A number for a row of both norms; the last norm's input, its number, and what training keeps of it.
    each += 2 + hidden + 1
    angles = 2 * 8
    assert saved_bytes(ours, packed()) == 4 * sum(LENGTHS) * (each + angles)


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_model_looks_like_the_stock_one(kind):
    ours, stock = build(kind)
    assert list(ours.state_dict()) == list(stock.state_dict())
    layer, stock_layer = ours.layers[0], stock.layers[0]
    assert isinstance(layer, FastLayer)
    for name, part in stock.named_modules():
        mine = ours.get_submodule(name)
        assert isinstance(mine, type(part)) or name == ""
        assert type(mine).__name__ == type(part).__name__ or name == "" or isinstance(part, nn.Linear)
    assert type(layer).__name__ in ours._no_split_modules
    assert type(layer) is not type(stock_layer)
    assert list(STAND_INS).count(type(stock_layer)) == 1


def test_copies_and_pickles_run_by_themselves():
    ours, _ = build("llama")
    copied, pickled = copy.deepcopy(ours.layers), pickle.loads(pickle.dumps(ours.layers))
    rope = ours.rotary_emb(torch.zeros(1, 6, 32), torch.arange(6)[None])
    hidden = torch.randn(1, 6, 32)
    for layers in (copied, pickled):
        assert type(layers[0]) is type(ours.layers[0])
        for mine, theirs in zip(layers, ours.layers, strict=True):
            assert mine.mlp.up_proj.weight is not theirs.mlp.up_proj.weight
            assert torch.equal(mine(hidden, position_embeddings=rope), theirs(hidden, position_embeddings=rope))


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_hidden_states_and_attentions_are_recorded(kind):
    ours, stock = build(kind, attention="eager")
    inputs = {k: v for k, v in packed().items() if "len" not in k}
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    mine, theirs = ours(**inputs, **options), stock(**inputs, **options)
    assert len(mine.hidden_states) == 5
    assert len(mine.attentions) == 4
    for a, b in zip(mine.hidden_states + mine.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BACKBONE_TYPES)
def test_training_with_a_cache_goes_the_stock_way(kind):
    ours, stock = build(kind, attention="sdpa")
    embeds = torch.randn(1, 6, 32)
    mine = ours(inputs_embeds=embeds[:, :4], use_cache=True)
    rest = ours(inputs_embeds=embeds[:, 4:], past_key_values=mine.past_key_values, use_cache=True).last_hidden_state
    torch.testing.assert_close(rest, stock(inputs_embeds=embeds).last_hidden_state[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "varlen"])
def test_a_compiled_model_trains_to_the_same_gradients(toy_model, implementation):
    model = toy_model().train()
    model.set_attn_implementation(implementation)
    ids = torch.arange(30, 46).view(2, 8)

    def gradient(called):
        model.zero_grad()
        called(input_ids=ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    plain = gradient(model)
    torch.testing.assert_close(gradient(torch.compile(model, backend="aot_eager")), plain, atol=1e-6, rtol=1e-4)
    torch._dynamo.reset()
