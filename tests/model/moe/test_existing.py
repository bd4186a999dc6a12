"""A model that has experts keeps them in a further stage; flags that describe others are refused, with both values."""

import logging

import pytest
import torch

from llava_lite.model.moe.existing import keep_own_experts
from llava_lite.train.arguments.fields import ModelArguments
from llava_lite.train.arguments.parse import parse_args

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
SPARSE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [2, 4], "top_k_experts": 2}


def output(**flags):
    """Return what a run's flags set of experts, flags that equal the default included."""
    words = ["--moe_enable", "True", "--output_dir", "unused", "--use_cpu", "True"]
    for flag, value in flags.items():
        words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return parse_args(words)[0].moe_choices()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"moe_mode": "sparse"},
        {"moe_layers_idx": [2, 0]},
        {"num_experts": [2, 4], "top_k_experts": 2, "use_residual": False},
        {"train_modules": ["wg"]},
    ],
)
def test_flags_that_agree_or_say_nothing_change_no_weight_and_no_answer(flags, toy_model):
    model = toy_model(moe=SPARSE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    blocks, config, logits = list(model.moe_layers().values()), dict(model.config.moe), model(input_ids=IDS).logits
    keep_own_experts(model, output(**flags))
    assert list(model.moe_layers().values()) == blocks
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert torch.equal(model(input_ids=IDS).logits, logits)
    assert model.config.moe == config | {"train_modules": flags.get("train_modules")}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_experts": [4]}, r"--num_experts 4 and has 2 4\."),
        ({"num_experts": [4, 2]}, r"--num_experts 4 2 and has 2 4\."),
        ({"top_k_experts": 1}, r"--top_k_experts 1 and has 2\."),
        ({"use_residual": True}, r"--use_residual True and has False\."),
        ({"moe_mode": "dense"}, r"--moe_mode dense, which is layers 0 1 2 3, and has experts in layers 0 2\."),
        ({"moe_mode": "second_half"}, r"--moe_mode second_half, which is layers 2 3, and has experts in layers 0 2\."),
        ({"moe_layers_idx": [1]}, r"--moe_layers_idx 1, which is layers 1, and has experts in layers 0 2\."),
        # Layers win over the mode here too.
        (
            {"moe_mode": "sparse", "moe_layers_idx": [0]},
            r"--moe_layers_idx 0, which is layers 0, and has experts in layers 0 2\.",
        ),
        ({"num_experts": [4], "top_k_experts": 1}, r"--num_experts 4 and has 2 4; for --top_k_experts 1 and has 2\."),
    ],
)
def test_flags_that_describe_other_experts_are_refused(flags, words, toy_model):
    model = toy_model(moe=SPARSE)
    with pytest.raises(ValueError, match=rf"has experts already.*{words} Leave the flags out.*dense checkpoint"):
        keep_own_experts(model, output(**flags))


def test_one_number_says_so_of_all_layers(toy_model):
    model = toy_model(moe={**SPARSE, "num_experts": [2]})
    keep_own_experts(model, output(num_experts=[2]))
    keep_own_experts(model, output(num_experts=[2, 2]))
    with pytest.raises(ValueError, match=r"--num_experts 3 and has 2\."):
        keep_own_experts(model, output(num_experts=[3]))
    with pytest.raises(ValueError, match=r"--num_experts 2 2 2 and has 2\."):
        keep_own_experts(model, output(num_experts=[2, 2, 2]))


@pytest.mark.parametrize(
    ("flag", "value", "kept"),
    [
        ("router_aux_loss_coef", 0.1, 0.1),
        ("moe_drop_tokens", True, True),
        ("capacity_factor", 1.5, 1.5),
        ("eval_capacity_factor", 3.0, 3.0),
        ("min_capacity", 4, 4),
        ("moe_second_expert_sampling", "training", True),
        ("moe_count_padding", True, True),
    ],
)
def test_another_balance_or_capacity_is_taken_and_reported(flag, value, kept, toy_model, caplog):
    model = toy_model(moe=SPARSE)
    was = model.config.moe[flag]
    with caplog.at_level(logging.INFO, logger="llava_lite"):
        keep_own_experts(model, output(**{flag: value}))
    assert f"they train on as they are, with {flag} {kept} (was {was})." in caplog.text
    assert model.config.moe[flag] == kept
    assert all(getattr(block.moe, flag) == kept for block in model.moe_layers().values())


def test_what_is_not_given_stays_as_the_checkpoint_has_it(toy_model):
    own = {"moe_drop_tokens": True, "capacity_factor": 1.25, "router_aux_loss_coef": 0.5, "moe_count_padding": True}
    model = toy_model(moe=SPARSE | own)
    keep_own_experts(model, output(capacity_factor=2.0))
    assert {key: model.config.moe[key] for key in own} == own | {"capacity_factor": 2.0}


def test_a_second_expert_cannot_be_drawn_where_a_token_is_routed_to_one(toy_model):
    model = toy_model(moe={**SPARSE, "top_k_experts": 1})
    with pytest.raises(ValueError, match=r"draws the second of two experts; got top_k_experts 1"):
        keep_own_experts(model, output(moe_second_expert_sampling="training"))


def test_arguments_that_no_command_line_made_say_what_differs_from_the_defaults():
    made = ModelArguments(moe_enable=True, top_k_experts=1, num_experts=[2]).moe_choices()
    assert made == {"moe_enable": True, "top_k_experts": 1, "num_experts": [2]}
