"""The evaluation loss is the mean over supervised tokens, whatever batches they came in."""

import json
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from llava_lite.constants import IGNORE_INDEX
from llava_lite.train.monitor.evaluation import EvaluationMixin, count_for_rank
from llava_lite.train.saving.interrupt import EvaluationStopped


def loss_by_hand(trainer, dataset):
    """Return the mean cross-entropy over all supervised tokens, one record at a time, from the model's logits."""
    model, total, count = trainer.model.eval(), 0.0, 0
    for example in (dataset[i] for i in range(len(dataset))):
        images = example.get("images")
        with torch.no_grad():
            logits = model(input_ids=example["input_ids"][None], images=images).logits[0, :-1]
        labels = example["labels"][1:]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
        count += int((labels != IGNORE_INDEX).sum())
    return total / count


@pytest.fixture
def trained(run_stage, tmp_path):
    return run_stage("full", tmp_path / "out", "--eval_split", 7, "--max_steps", 1, "--num_eval_generations", 2)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_loss_does_not_depend_on_the_batch(trained, batch_size):
    trained.args.per_device_eval_batch_size = batch_size
    metrics = trained.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(trained, trained.eval_dataset), rel=1e-5)


def test_answers_are_written_at_each_evaluation(trained, tmp_path):
    trained.evaluate()
    lines = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [trained.eval_dataset[i]["id"] for i in (0, 1)]
    assert {"step", "id", "prompt", "expected", "answer"} == set(lines[0])


def test_balance_loss_is_reported_apart(run_stage, tmp_path):
    trainer = run_stage("moe", tmp_path / "out", "--eval_split", 4, "--max_steps", 1)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(trainer, trainer.eval_dataset), rel=1e-5)
    # Two layers, weight 0.01, at least 1 each.
    assert metrics["eval_moe_loss"] > 0.015


@pytest.mark.parametrize("packs", [False, True])
def test_records_that_come_again_to_fill_the_last_batch_are_not_counted(trained, packs):
    from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator

    collator = PackedCollator() if packs else DataCollatorForSupervisedDataset(0)
    examples = [trained.eval_dataset[i] for i in range(3)]
    sums = []
    for shown, num_new in ((examples[:2], 2), (examples, 2), (examples, 3)):
        trained.eval_sums = torch.zeros(4, dtype=torch.float64)
        trained.args.per_device_eval_batch_size = len(shown)
        last = SimpleNamespace(end_of_dataloader=True, remainder=num_new)
        with mock.patch.object(trained.accelerator, "gradient_state", last):
            trained.prediction_step(trained.model.eval(), collator(shown), prediction_loss_only=True)
        sums.append(trained.eval_sums.tolist())
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)
    assert sums[2][1] > sums[1][1]


def test_last_records_belong_to_the_first_ranks():
    # Five records left for three ranks with batches of 2: two, two, one.
    assert [min(2, count_for_rank(5, rank, 2)) for rank in range(3)] == [2, 2, 1]
    assert [min(4, count_for_rank(3, rank, 4)) for rank in range(2)] == [3, 0]


class Evaluates:
    """Trainer's part: an evaluation that ends with an error, or without one."""

    def evaluate(self, error):
        if error is not None:
            raise error
        return {}


class Engine:
    """ZeRO-3's engine, whose weights may be on their way from a rank that hangs."""

    num_released = 0

    def empty_partition_cache(self):
        self.num_released += 1


class Trainer(EvaluationMixin, Evaluates):
    def __init__(self):
        self.meter, self.model_wrapped = SimpleNamespace(pause=nullcontext), Engine()

    def answer_examples(self):
        pass


@pytest.mark.parametrize(
    ("error", "num_released"), [(None, 1), (EvaluationStopped(), 1), (RuntimeError("a rank is gone"), 0)]
)
def test_weights_on_their_way_are_released_unless_an_error_says_more(error, num_released):
    trainer = Trainer()
    with pytest.raises(type(error)) if error else nullcontext():
        trainer.evaluate(error)
    assert trainer.model_wrapped.num_released == num_released
