"""A run goes on with another number of ranks, step for step: the same records, the same losses."""

import runpy
from pathlib import Path

import pytest

from llava_lite.train import other_ranks as other

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENGINES = {
    "ddp": [],
    "zero2": ["--deepspeed", str(ROOT / "zero2.json")],
    "zero3": ["--deepspeed", str(ROOT / "zero3.json")],
}
# Of a step of 4 records, what each number of ranks takes at once: always the same micro-batches, of 1 record.
RUN = "--num_train_epochs 2 --save_strategy steps --save_steps 4 --logging_steps 1 --weight_decay 0.1 --report_to none"
KINDS = {
    "full": ("full", "--group_by_modality_length", "True"),
    "lora": ("lora", "--lora_dropout", "0"),
    "moe": ("moe", "--router_aux_loss_coef", "0.1", "--group_by_modality_length", "True"),
    "packs": ("moe", "--packing", "tokens", "--packing_tokens", "80"),
}
# Of a rank's sums in float32, in another order; Adam makes no more of it here.
TOLERANCE = 1e-5


def settings(ranks, batch, accumulation, samples=24):
    """Return how a step is divided, as a manifest says it."""
    return dict(zip(other.DIVISION, (ranks, batch, accumulation), strict=True)) | {"samples": samples}


# Which batch.


@pytest.mark.parametrize(
    ("saved", "now", "flags"),
    [
        ((2, 2, 1), (1, 2, 1), "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"),
        ((1, 4, 1), (2, 4, 1), "--per_device_train_batch_size 2 --gradient_accumulation_steps 1"),
        ((4, 6, 1), (3, 6, 1), "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"),
        ((8, 16, 1), (4, 8, 1), "--per_device_train_batch_size 16 --gradient_accumulation_steps 2"),
    ],
)
def test_a_step_of_another_size_is_refused_with_flags_that_make_the_same(saved, now, flags):
    with pytest.raises(ValueError, match=f"give {flags}; or choose"):
        other.refuse_other_batch("checkpoint-4", settings(*saved), settings(*now))
    batch, accumulation = (int(word) for word in flags.split()[1::2])
    other.refuse_other_batch("checkpoint-4", settings(*saved), settings(now[0], batch, accumulation))


def test_ranks_that_cannot_share_a_step_are_refused_with_those_that_can():
    with pytest.raises(ValueError, match="4 ranks cannot share 6 records evenly; start 1, 2, 3 or 6 ranks"):
        other.refuse_other_batch("checkpoint-4", settings(2, 3, 1), settings(4, 1, 1))


def test_what_ranks_counted_is_shared_out_and_lost_by_none():
    import torch

    def part(loss, experts, tokens):
        more = {"experts": {"0": torch.tensor(experts)}, "balance_sum": torch.tensor(loss)}
        more["meter"] = {"counts": [tokens, 0, 2], "seconds": 3.0}
        return {"loss_since_log": torch.tensor(loss), "loss_logged": 8.0, "last_logged_step": 3, "more": more}

    mine = other.share_of([part(1.0, [2.0, 4.0], 10), part(3.0, [6.0, 0.0], 30)], 4)
    assert mine["loss_since_log"] == 2.0
    assert (mine["loss_logged"], mine["last_logged_step"]) == (8.0, 3)
    assert (mine["more"]["experts"]["0"] * 4).tolist() == [8.0, 4.0]
    assert mine["more"]["balance_sum"] == 2.0
    assert mine["more"]["meter"] == {"counts": [10, 0, 1], "seconds": 3.0}


# Whole runs.


@pytest.fixture(scope="module")
def launch():
    """Return the function of test_ranks.py that runs cases on several ranks."""
    return runpy.run_path(str(HERE / "test_ranks.py"))["launch"]


@pytest.fixture
def flags_of(stage_flags, toy_data, tmp_path):
    data = toy_data(tmp_path / "data", num_records=24, text_only_every=3)

    def make(kind, out, ranks, *more, batch=1):
        stage, *own = KINDS[kind]
        division = f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {4 // ranks // batch}"
        return [*stage_flags(stage, out, data=data), *own, *RUN.split(), *division.split(), *more]

    return make


def steps_of(results):
    """Return [the records of a step] of all ranks, by step, those that come twice once."""
    steps = {}
    for result in results:
        assert "error" not in result, result
        for step, ids in result["samples"]:
            steps.setdefault(step, set()).update(ids)
    return steps


def assert_goes_on(resumed, whole, from_step):
    """Compare the records of each step, and the losses, with those of the run that did not change."""
    found, expected = steps_of(resumed), steps_of(whole)
    assert found == {step: ids for step, ids in expected.items() if step >= from_step}
    assert resumed[0]["loss"] == pytest.approx(whole[0]["loss"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_with_other_ranks_step_for_step(flags_of, launch, tmp_path, engine, before, after):
    # Of two epochs of 6 steps each: from the middle of one.
    from_step = {"full": 4, "lora": 8, "moe": 4, "packs": 8}
    kinds = list(KINDS) if (before, after) != (2, 4) else ["full", "moe"]
    cases = [{"name": kind, "argv": [*flags_of(kind, tmp_path / kind, before), *ENGINES[engine]]} for kind in kinds]
    whole = launch(cases, tmp_path, world_size=before)
    again = []
    for kind in kinds:
        checkpoint = tmp_path / kind / f"checkpoint-{from_step[kind]}"
        flags = flags_of(kind, tmp_path / f"{kind}_again", after, "--resume_from_checkpoint", str(checkpoint))
        again.append({"name": f"{kind}_again", "argv": [*flags, *ENGINES[engine]]})
    resumed = launch(again, tmp_path, world_size=after)
    for kind in kinds:
        assert_goes_on(resumed[f"{kind}_again"], whole[kind], from_step[kind])
        assert not list((tmp_path / f"{kind}_again").glob("tmp-*"))
