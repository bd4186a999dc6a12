"""Our experts compute what DeepSpeed's layers compute, and our loss is MoE-LLaVA's: theirs run in a process apart."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_lite.formats.moe_llava import from_moe_llava, to_moe_llava
from llava_lite.model import LlavaConfig, LlavaLlamaForCausalLM
from llava_lite.model.moe.block import MoeBlock, RoutingContext, read_moe_config, use_routing
from tests.model.moe.deepspeed_moe_worker import CASES, CONFIGS, MODEL

# How MoE-LLaVA routes; the default here drops nothing and leaves padding out.
ORIGINAL = {"moe_drop_tokens": True, "moe_count_padding": True}
PREFIX = "model.layers.0.mlp."


@pytest.fixture(scope="module")
def deepspeeds(tmp_path_factory):
    """What DeepSpeed computed."""
    pytest.importorskip("deepspeed")
    path = tmp_path_factory.mktemp("deepspeed") / "results.pt"
    worker = Path(__file__).with_name("deepspeed_moe_worker.py")
    run = subprocess.run(
        [sys.executable, str(worker), str(path)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(path, weights_only=True)


def under_our_names(weights):
    """Return the weights of one layer, or their gradients, under the names of our block."""
    named = from_moe_llava({PREFIX + name: weight for name, weight in weights.items()})
    return {name.removeprefix(PREFIX): weight for name, weight in named.items()}


def block_of(case, weights):
    config, mlp_class = CONFIGS[case["kind"]]
    settings = {key: value for key, value in case.items() if key != "kind"}
    moe = read_moe_config({"num_experts": 4, "moe_mode": "dense", **ORIGINAL, **settings}, 1)
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    block = MoeBlock(config, moe, 4, mlp_class(config))
    block.load_state_dict(under_our_names(weights))
    return block


@pytest.mark.parametrize("name", CASES)
def test_a_layer_with_deepspeeds_weights_has_its_outputs_balance_loss_and_gradients(deepspeeds, name):
    theirs = deepspeeds["layers"][name]
    block = block_of(CASES[name], theirs["weights"])
    for mode in ("train", "eval"):
        hidden = theirs["hidden"].clone().requires_grad_()
        context = RoutingContext(training=mode == "train")
        block.zero_grad()
        with use_routing(context):
            output = block(hidden)
        (loss,) = context.balance_losses()
        (output.square().sum() + loss).backward()
        expected = theirs[mode]
        torch.testing.assert_close(output, expected["output"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden.grad, expected["hidden"], rtol=1e-4, atol=1e-4)
        grads = {n: p.grad for n, p in block.named_parameters()}
        torch.testing.assert_close(grads, under_our_names(expected["grads"]), rtol=1e-4, atol=1e-4)


def test_the_cases_drop_and_keep(deepspeeds):
    """The comparison above covers dropping."""
    dropped = {}
    for name, case in CASES.items():
        block = block_of(case, deepspeeds["layers"][name]["weights"])
        context = RoutingContext(training=True)
        with use_routing(context):
            block(deepspeeds["layers"][name]["hidden"])
        dropped[name] = context.stats()[0]["dropped"]
    assert all(fraction > 0.2 for name, fraction in dropped.items() if " 0.5 " in name)
    assert all(fraction == 0 for name, fraction in dropped.items() if " 4.0 " in name)


@pytest.mark.parametrize("batch", ["unpadded", "padded"])
def test_a_model_with_experts_has_moe_llavas_logits_loss_and_gradients(deepspeeds, batch):
    theirs = deepspeeds["model"][batch]
    config = LlavaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    config.moe = MODEL | ORIGINAL
    config._attn_implementation = "eager"
    model = LlavaLlamaForCausalLM(config).train()
    model.load_state_dict(from_moe_llava(deepspeeds["model"]["weights"]))
    output = model(theirs["ids"], attention_mask=theirs["mask"], labels=theirs["labels"])
    output.loss.backward()
    torch.testing.assert_close(output.loss, theirs["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(output.moe_loss_list), theirs["balance"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output.moe_loss, MODEL["router_aux_loss_coef"] * theirs["balance"], rtol=1e-5, atol=1e-5
    )
    grads = to_moe_llava({name: param.grad for name, param in model.named_parameters()})
    assert set(grads) == set(theirs["grads"])
    torch.testing.assert_close(grads, theirs["grads"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        # In training the vocabulary head runs where there are labels alone.
        logits = model(theirs["ids"], attention_mask=theirs["mask"]).logits
    real = theirs["mask"].bool()
    torch.testing.assert_close(logits[real], theirs["logits"][real], rtol=1e-5, atol=2e-5)
