"""A packed run is the run with padding; packs of a token budget come in a known order."""

import json
import logging

import pytest
import torch

from llava_lite.data.errors import DataError
from llava_lite.train.train import prepare, train

# SGD, so that a difference in a gradient is seen as it is; Adam would hide its size.
SGD = ["--optim=sgd", "--learning_rate=0.1", "--max_grad_norm=0"]


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(trainer):
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters() if param.requires_grad}


@pytest.fixture
def data(toy_data, tmp_path):
    return toy_data(tmp_path / "data", num_records=24, text_only_every=3)


@pytest.mark.parametrize(
    ("stage", "attention"),
    [("projector", "auto"), ("full", "auto"), ("lora", "auto"), ("moe", "auto"), ("full", "sdpa"), ("moe", "eager")],
)
def test_a_packed_run_is_the_run_with_padding(run_stage, stage, attention, data, tmp_path):
    data = None if stage == "projector" else data
    common = [*SGD, "--lora_dropout", 0, "--max_steps", 3, "--gradient_accumulation_steps", 2]
    padded = run_stage(stage, tmp_path / "padded", *common, "--packing", "none", data=data)
    packed = run_stage(stage, tmp_path / "packed", *common, "--attn_implementation", attention, data=data)
    assert packed.model.config._attn_implementation == {"auto": "varlen"}.get(attention, attention)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-6)
    for name, weight in weights(packed).items():
        torch.testing.assert_close(weight, weights(padded)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_both_count_the_same_tokens_and_evaluate_to_the_same_loss(run_stage, data, tmp_path):
    found = []
    for packing in ("none", "samples"):
        more = ["--packing", packing, "--eval_split", 5, "--eval_strategy", "epoch", "--num_eval_generations", 1]
        trainer = run_stage("moe", tmp_path / packing, *SGD, *more, "--per_device_eval_batch_size", 2, data=data)
        evaluated = next(line for line in trainer.state.log_history if "eval_loss" in line)
        found.append((trainer.state.total_flos, evaluated["eval_loss"], evaluated["eval_moe_loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def packs_of(trainer, lengths):
    """Return the records of every micro-batch, and their tokens, as the loader gives them."""
    numbers = {f"toy_{i:03d}": i for i in range(len(lengths))}
    batches = [[numbers[name] for name in batch["sample_ids"]] for batch in trainer.get_train_dataloader()]
    return batches, [sum(int(lengths[i]) for i in batch) for batch in batches]


TOKENS = ["--packing", "tokens", "--packing_tokens", 200, "--per_device_train_batch_size", 1]


def test_micro_batches_of_a_token_budget_hold_every_record_once(stage_flags, data, tmp_path):
    trainer = prepare(stage_flags("full", tmp_path / "out", *TOKENS, data=data)).trainer
    packs, tokens = packs_of(trainer, trainer.train_dataset.lengths)
    assert sorted(i for pack in packs for i in pack) == list(range(24))
    assert max(tokens) <= 200
    assert max(map(len, packs)) > 1
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (1, int(batch["cu_seq_lens_q"][-1]))


def test_a_step_of_packs_trains_as_the_same_records_do_padded(run_stage, data, tmp_path):
    more = [*SGD, "--max_steps", 1, "--save_full", True]
    packed = run_stage("full", tmp_path / "packed", *more, *TOKENS, "--gradient_accumulation_steps", 100, data=data)
    full = ["--packing", "none", "--per_device_train_batch_size", 24]
    padded = run_stage("full", tmp_path / "padded", *more, *full, data=data)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-6)
    for name, weight in weights(packed).items():
        torch.testing.assert_close(weight, weights(padded)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_record_longer_than_a_pack_is_refused_by_its_name_before_the_first_step(stage_flags, data, tmp_path):
    flags = stage_flags("full", tmp_path / "out", *TOKENS, "--packing_tokens", 40, data=data)
    with pytest.raises(DataError, match=r"toy_\d+.* has \d+ tokens but a pack holds 40.*Raise --packing_tokens to"):
        train(flags)
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_ids_of_a_pack_are_reported_where_its_loss_is_not_finite(stage_flags, data, tmp_path):
    from llava_lite.train.monitor.finite import NonFiniteError

    stage = prepare(stage_flags("full", tmp_path / "out", *TOKENS, data=data))
    head = stage.trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda head, args, loss: loss * float("nan"))
    packs, _ = packs_of(stage.trainer, stage.trainer.train_dataset.lengths)
    with pytest.raises(NonFiniteError, match="step 1: rank 0: loss nan for samples") as error:
        stage.trainer.train()
    assert all(f"toy_{number:03d}" in str(error.value) for number in packs[0])


def test_padding_stays_where_a_flag_needs_it_and_a_line_says_so(stage_flags, data, tmp_path, caplog):
    caplog.set_level(logging.INFO, "llava_lite")
    stage = prepare(stage_flags("moe", tmp_path / "out", "--moe_count_padding", True, data=data))
    assert "attention_mask" in next(iter(stage.trainer.get_train_dataloader()))
    assert "--packing none: --moe_count_padding True routes padding" in caplog.text


def test_capacity_is_that_of_the_padded_batch(run_stage, data, tmp_path):
    more = [*SGD, "--max_steps", 2, "--moe_drop_tokens", True, "--capacity_factor", 0.6]
    found = []
    for packing in ("none", "samples"):
        trainer = run_stage("moe", tmp_path / packing, *more, "--packing", packing, data=data)
        lines = [json.loads(line) for line in (tmp_path / packing / "metrics.jsonl").read_text().splitlines()]
        dropped = [layer["dropped"] for layer in lines[0]["experts"].values()]
        assert min(dropped) > 0
        found.append([*losses(trainer), *dropped])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
