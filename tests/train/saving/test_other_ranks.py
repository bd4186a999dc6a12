"""A run resumes on other ranks, or under another stage of ZeRO, step for step: the same records and losses."""

import runpy
from pathlib import Path

import pytest
import torch

from llava_lite.train.saving import other_ranks as other

HERE = Path(__file__).parents[1]
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
    """Return how a step is divided, as a manifest records it."""
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
        other.check_same_batch("checkpoint-4", settings(*saved), settings(*now))
    batch, accumulation = (int(word) for word in flags.split()[1::2])
    other.check_same_batch("checkpoint-4", settings(*saved), settings(now[0], batch, accumulation))


def test_numbers_of_ranks_that_cannot_split_a_step_are_refused_with_those_that_can():
    with pytest.raises(ValueError, match="4 ranks cannot divide 6 records evenly; start 1, 2, 3 or 6 ranks"):
        other.check_same_batch("checkpoint-4", settings(2, 3, 1), settings(4, 1, 1))


def test_what_ranks_counted_is_redistributed_and_lost_by_none():
    def part(loss, experts, tokens):
        more = {"experts": {"0": torch.tensor(experts)}, "balance_sum": torch.tensor(loss)}
        more["meter"] = {"counts": [tokens, 0, 2], "seconds": 3.0}
        return {"loss_since_log": torch.tensor(loss), "loss_logged": 8.0, "last_logged_step": 3, "more": more}

    mine = other.get_shard([part(1.0, [2.0, 4.0], 10), part(3.0, [6.0, 0.0], 30)], 4)
    assert mine["loss_since_log"] == 2.0
    assert (mine["loss_logged"], mine["last_logged_step"]) == (8.0, 3)
    assert (mine["more"]["experts"]["0"] * 4).tolist() == [8.0, 4.0]
    assert mine["more"]["balance_sum"] == 2.0
    assert mine["more"]["meter"] == {"counts": [10, 0, 1], "seconds": 3.0}


@pytest.mark.parametrize(
    ("saved", "now", "num_samples", "warning"),
    [
        ((2, 1, 2), (1, 1, 4), 24, None),
        ((2, 1, 2), (1, 1, 4), 0, None),
        ((2, 1, 2), (1, 1, 4), 21, "repeats 0 records from its beginning, and repeated 1,"),
        ((2, 1, 2), (4, 1, 1), 22, "repeats 2 records from its beginning, and repeated 0,"),
        ((4, 1, 1), (2, 2, 1), 22, None),
    ],
)
def test_an_epoch_that_fills_up_otherwise_is_warned_of(caplog, saved, now, num_samples, warning):
    with caplog.at_level("INFO", "llava_lite"):
        other.log_what_changes("checkpoint-4", settings(*saved), settings(*now), False, num_samples)
    assert "= 4 records a step and is resumed by" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_experts_in_other_micro_batches_are_warned_of(caplog):
    other.log_what_changes("checkpoint-4", settings(2, 2, 1), settings(1, 4, 1), True, 24)
    assert "give --per_device_train_batch_size 2 for the same" in caplog.text


# Complete runs.


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


def assert_resumed(resumed, full, from_step):
    """Compare the records of each step, and the losses, with those of the run that did not change."""
    found, expected = steps_of(resumed), steps_of(full)
    assert found == {step: ids for step, ids in expected.items() if step >= from_step}
    assert resumed[0]["loss"] == pytest.approx(full[0]["loss"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_resumes_on_other_ranks_step_for_step(flags_of, launch, tmp_path, engine, before, after):
    # Of two epochs of 6 steps each: from the middle of one.
    from_step = {"full": 4, "lora": 8, "moe": 4, "packs": 8}
    kinds = list(KINDS) if (before, after) != (2, 4) else ["full", "moe"]
    cases = [{"name": kind, "argv": [*flags_of(kind, tmp_path / kind, before), *ENGINES[engine]]} for kind in kinds]
    full = launch(cases, tmp_path, world_size=before)
    again = []
    for kind in kinds:
        checkpoint = tmp_path / kind / f"checkpoint-{from_step[kind]}"
        flags = flags_of(kind, tmp_path / f"{kind}_again", after, "--resume_from_checkpoint", str(checkpoint))
        again.append({"name": f"{kind}_again", "argv": [*flags, *ENGINES[engine]]})
    resumed = launch(again, tmp_path, world_size=after)
    for kind in kinds:
        assert_resumed(resumed[f"{kind}_again"], full[kind], from_step[kind])
        assert not list((tmp_path / f"{kind}_again").glob("tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "after"), [("zero2", "zero3", 2), ("zero3", "zero2", 2), ("zero3", "zero2", 1)]
)
def test_a_run_resumes_under_another_stage_step_for_step(flags_of, launch, tmp_path, first, then, after):
    kinds = ["full", "lora", "moe"]
    cases = [{"name": kind, "argv": [*flags_of(kind, tmp_path / kind, 2), *ENGINES[first]]} for kind in kinds]
    full = launch(cases, tmp_path, world_size=2)
    again = []
    for kind in kinds:
        checkpoint = str(tmp_path / kind / "checkpoint-4")
        flags = flags_of(kind, tmp_path / f"{kind}_again", after, "--resume_from_checkpoint", checkpoint)
        again.append({"name": f"{kind}_again", "argv": [*flags, *ENGINES[then]]})
    resumed = launch(again, tmp_path, world_size=after)
    for kind in kinds:
        assert_resumed(resumed[f"{kind}_again"], full[kind], 4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_other_ranks_begin_with_the_weights_that_were_saved(flags_of, launch, tmp_path, engine):
    """In bfloat16, and with no step more: what comes out is what went in, bit for bit."""
    from llava_lite.inference import load

    kinds = ("full", "lora", "moe")
    run = ["--num_train_epochs", "1", "--bf16", "True", *ENGINES[engine]]
    cases = [{"name": kind, "argv": flags_of(kind, tmp_path / kind, 2, *run)} for kind in kinds]
    launch(cases, tmp_path, world_size=2)
    for kind in kinds:
        checkpoint = str(tmp_path / kind / "checkpoint-4")
        more = [*run, "--max_steps", "4", "--resume_from_checkpoint", checkpoint]
        cases.append({"name": f"{kind}_again", "argv": flags_of(kind, tmp_path / f"{kind}_again", 1, *more)})
    found = launch(cases[len(kinds) :], tmp_path, world_size=1)
    for kind in kinds:
        assert found[f"{kind}_again"][0]["samples"] == []
        (model, _), (saved, _) = (
            load(tmp_path / name, device="cpu") for name in (f"{kind}_again", f"{kind}/checkpoint-4")
        )
        wanted = saved.state_dict()
        assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, wanted[name])] == []


@pytest.mark.slow
def test_a_run_that_must_have_as_many_ranks_says_why(flags_of, launch, tmp_path):
    flags = [*flags_of("moe", tmp_path / "out", 2, "--ep_size", "2"), *ENGINES["zero2"]]
    launch([{"name": "case", "argv": flags}], tmp_path, world_size=2)
    again = [*flags_of("moe", tmp_path / "again", 4, "--ep_size", "2"), *ENGINES["zero2"]]
    again += ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-4")]
    found = launch([{"name": "again", "argv": again}], tmp_path, world_size=4)
    assert "cannot be resumed by 4: its experts are divided among ranks (--ep_size)" in found["again"][0]["error"]
