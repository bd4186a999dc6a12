"""The benchmarks run, report what they promise, and compare like with like; their figures are not tested."""

import itertools
import json
import struct
import subprocess

import pytest
import torch

from benchmarks import (
    ablation,
    alone,
    annotations,
    cuda_suite,
    images,
    rivals,
    same_speed,
    timing,
    training,
    worker,
    workload,
)
from benchmarks.__main__ import BENCHMARKS, read_reports
from benchmarks.__main__ import main as run_all
from benchmarks.details import detail_parts
from benchmarks.results import write_page
from benchmarks.table import BY_TORCH, IMAGES, MEMORY, SPEED, table
from benchmarks.timing import AGAIN, Samples, arguments, interleave, machine, orders, summary, write_result


def test_every_round_calls_every_runner_once_and_one_of_them_again():
    calls = []
    runners = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleave(runners, rounds=4, warmup=1, again="b")
    assert list(samples) == ["a", "b", "c", "b" + AGAIN]
    assert all(len(one.wall_s) == len(one.cpu_s) == 4 for one in samples.values())
    assert calls[:3] == ["a", "b", "c"]
    rounds = [calls[start : start + 4] for start in range(3, 19, 4)]
    assert all(sorted(one) == ["a", "b", "b", "c"] for one in rounds)
    # The order is random: the machine may be in another state at the end of a round.
    assert len({one[0] for one in rounds}) > 1


def test_runner_called_twice_is_never_repeated_at_once_and_both_calls_come_first_equally_often():
    calls = orders(["a", "b", "c"], "b", 8)
    names = [name.removesuffix(AGAIN) for name in calls]
    assert ("b", "b") not in itertools.pairwise(names)
    rounds = [calls[start : start + 4] for start in range(0, 32, 4)]
    assert sum(one.index("b") < one.index("b" + AGAIN) for one in rounds) == 4
    assert calls == orders(["a", "b", "c"], "b", 8)
    # With two runners it may be repeated.
    assert sorted(orders(["a", "b"], "a", 1)) == ["a", "a" + AGAIN, "b"]


def test_seconds_that_a_runner_returns_are_used():
    samples = interleave({"wall": lambda: 3.0, "both": lambda: (3.0, 1.5)}, rounds=2, warmup=0)
    assert samples["wall"].wall_s == [3.0, 3.0]
    assert samples["both"].wall_s == [3.0, 3.0]
    assert samples["both"].cpu_s == [1.5, 1.5]


def test_ratio_is_that_of_the_medians_and_its_range_that_of_the_rounds():
    samples = {
        "base": Samples([2.0, 4.0, 4.0], [1.0, 1.0, 1.0]),
        "fast": Samples([1.0, 2.0, 2.5], [0.5, 0.5, 0.5]),
        "base" + AGAIN: Samples([2.0, 5.0, 4.0], [1.0, 1.0, 1.0]),
    }
    figures = summary(samples, "base", {"base": 100, "fast": 100})
    assert set(figures) == {"base", "fast"}
    assert figures["fast"]["ratio"] == 2.0
    assert figures["fast"]["ratio_range"] == pytest.approx([1.6, 2.0])
    assert figures["fast"]["rate"] == 50
    assert figures["fast"]["ratio_cpu"] == 2.0
    assert figures["base"]["self_range"] == pytest.approx([0.8, 1.0])
    assert figures["base"]["wall_s_each_again"] == [2.0, 5.0, 4.0]
    with pytest.raises(ValueError, match="no runner 'slow'; known: base, fast"):
        summary(samples, "slow")
    # Rounds with different work: 100 tokens in 2 s, 400 in 4 s, 400 in 4 s.
    assert summary(samples, "base", [100, 400, 400])["base"]["rate"] == 100


def test_result_names_machine_and_versions(tmp_path):
    report = write_result("toy", {"x": 1}, str(tmp_path / "a" / "toy.json"), num_steps=3)
    assert json.loads((tmp_path / "a" / "toy.json").read_text()) == report
    assert report["settings"] == {"num_steps": 3}
    assert {"torch", "transformers"} <= set(report["machine"]["versions"])
    assert {"date", "processor", "vector_width", "num_cores", "num_threads", "device", "load", "commit"} <= set(
        machine()
    )


def test_commit_is_that_of_the_start_and_says_whether_files_differed(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def found():
        timing._commit.cache_clear()
        arguments("a benchmark", [])
        return machine()["commit"]

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    code, written = tmp_path / "benchmarks" / "timing.py", tmp_path / "benchmarks" / "results" / "a.json"
    for file in (code, written):
        file.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(timing, "__file__", str(code))
    clean = found()
    written.write_text("2")
    assert found() == clean
    code.write_text("2")
    assert machine()["commit"] == clean
    assert found() == clean + "-dirty"
    timing._commit.cache_clear()


@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
def test_experts_of_transformers_run_as_they_are_named(kind):
    model = rivals.hf_model(workload.size_of("toy", 3), 3, kind)
    experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
    assert [module.config._experts_implementation for module in experts] == [kind]


def test_size_v_runs_one_rival_of_transformers():
    assert list(training.get_rivals("V", 3)) == ["ours", "transformers eager"]
    assert {"transformers eager", "transformers grouped_mm"} < set(training.get_rivals("S", 3))


def test_torch_matmul_is_a_rival_only_where_onednn_is_faster(monkeypatch):
    for is_faster in (False, True):
        monkeypatch.setattr("llava_lite.model.fast.matmul.has_wide_vectors", lambda is_faster=is_faster: is_faster)
        assert (training.TORCH_MATMUL in training.get_rivals("S", 2)) == is_faster
        assert ("matmul off" in ablation.get_variants(2)) == is_faster


def test_images_of_all_runners_end_normalised(tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    path = images.draw(tmp_path, 1)[0]
    found = {name: make(path) for name, make in images.makers(processor, "pad").items()}
    for name, one in found.items():
        assert one.dtype == torch.float32
        # Fast images differ by some hundredths.
        assert float((one - found[images.BASE]).abs().mean()) < (0.2 if name.startswith("fast") else 1e-5)


class Enough(Exception):
    """Ends a rival, which would train on."""


def steps_of(rival, stage, num_steps=2, **options):
    """Return the first steps of a rival at toy size."""
    schedule, steps = workload.batches(workload.SIZES["toy"], stage, num_steps), []

    def on_step(step):
        if step is not None:
            steps.append(step)
        if len(steps) == num_steps:
            raise Enough

    with pytest.raises(Enough):
        rivals.RIVALS[rival](workload.size_of("toy", stage), stage, schedule, options, on_step)
    return steps


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_rivals_do_the_same_work(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path))
    experts = {"experts": "eager"} if stage == 3 else {}
    ours = steps_of("ours", stage)
    others = [
        steps_of("transformers loop", stage, **experts),
        steps_of("transformers Trainer", stage, **experts),
        steps_of("transformers loop", stage, checkpointing=True, **experts),
    ]
    if stage == 3:
        others.append(steps_of("transformers loop", stage, experts="grouped_mm"))
    for other in others:
        for mine, theirs in zip(ours, other, strict=True):
            assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)
            # Ours trains with the balance loss, which LlavaForConditionalGeneration leaves out.
            assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=2e-3 if stage == 3 else 1e-5)


def test_batches_are_those_of_the_stages():
    for stage, (supervised, text) in {1: ((0.03, 0.2), (10, 60)), 2: ((0.1, 0.26), (50, 300))}.items():
        size = workload.SIZES["S"]
        for example in itertools.chain(*workload.batches(size, stage, 8)):
            ids, labels = example["input_ids"], example["labels"]
            assert (ids == workload.IMAGE).sum() == 256
            num_text = len(ids) - 256 - (1 if stage == 1 else 35)
            assert text[0] <= num_text <= text[1]
            fraction = float((labels != workload.IGNORE_INDEX).float().mean())
            assert supervised[0] <= fraction <= supervised[1]
            assert ((labels == workload.IGNORE_INDEX) | (labels == ids)).all()


def test_vocabulary_head_of_size_v_is_the_fraction_of_a_7b_model():
    llama_7b = workload.Size(4096, 11008, 32, 32)
    assert llama_7b.logits_fraction(1) == pytest.approx(0.0198, abs=1e-4)
    for stage in (1, 2, 3):
        assert workload.size_of("V", stage).logits_fraction(stage) == pytest.approx(0.02, abs=1e-3)
        assert workload.size_of("S", stage).logits_fraction(stage) > 0.25


def test_cuda_suite_runs_its_training_at_toy_widths_on_a_cpu(tmp_path):
    file = tmp_path / "suite.json"
    cuda_suite.main(["--toy", "--parts", "stage 3", "--json", str(file)])
    stage = json.loads(file.read_text())["results"]["stage 3"]
    losses = [one["first_loss"] for one in stage["rivals"].values()]
    assert len(losses) == 4
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    ours = stage["rivals"]["ours"]
    # MFU is the product of the three figures beside it.
    assert ours["mfu"] == pytest.approx(ours["tokens_per_s"] * stage["flops_per_token"] / stage["peak_flops"])
    assert stage["ratio"] > 0


def test_rival_without_memory_is_reported_and_the_others_run(monkeypatch):
    def too_small(size, stage, device, hf_options=None, checkpointing=False):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB.\nmore of it")

    monkeypatch.setattr(cuda_suite, "Rival", too_small)
    found = cuda_suite.measure_rival(workload.SIZES["toy"], 1, "cpu", 1, {})
    assert found == {"out_of_memory": "tried to allocate 20 GiB."}


def test_rival_that_fails_is_reported_and_what_was_measured_is_kept(monkeypatch):
    class Odd:
        def __init__(self, *args, **options):
            raise TypeError("no such option\nor another")

    monkeypatch.setattr(cuda_suite, "Rival", Odd)
    found = list(cuda_suite.measure_stage(1, "cpu", True, float("inf")))
    assert [len(one["rivals"]) for one in found] == [4, 4, 4, 4]
    assert found[-1]["rivals"]["transformers"] == {"failed": "or another"}
    assert "fastest_ours" not in found[-1]
    assert set(cuda_suite.call(["benchmarks.nowhere"], 60)) == {"failed"}


def test_mfu_is_read_without_a_run_of_transformers():
    rivals = {"ours": {"tokens_per_s": 2.0}, "transformers": {"failed": "a line"}}
    found = cuda_suite.compare(rivals, workload.SIZES["toy"], 1, "cpu")
    assert found["fastest_ours"] == "ours"
    assert found["rivals"]["ours"]["mfu"] > 0


def test_every_plain_path_is_the_same_function():
    result = ablation.measure("toy", 3, rounds=1)
    assert {"loss off", "experts off", "packing off", "all off"} <= set(result["variants"])
    assert result["largest_loss_difference"] < 1e-5


MACHINE = {
    "date": "2026-01-01 00:00 UTC",
    "processor": "a processor",
    "vector_width": "AVX2",
    "num_cores": 2,
    "num_threads": 2,
    "device": "cpu",
    "python": "3.12",
    "versions": {"torch": "2.13"},
    "commit": "abc",
}


def report_of_training(ratios):
    """Return a training report of size S whose stages have these ratios, and memory fractions of 0.5."""
    stages = {}
    for stage, ratio in ratios.items():
        one = {"rate": 10, "cpu_s_per_unit": 0.1, "ratio": ratio, "ratio_range": [1, 2], "above_loaded_bytes": 2**20}
        batches = {"samples_per_step": 4, "tokens_per_step": 9, "supervised_fraction": 0.1, "padding_fraction": 0.1}
        stages[stage] = {
            "rivals": {"ours": one, "transformers": one},
            "over_transformers": {
                "ratio": ratio,
                "ratio_range": [ratio - 0.2, ratio + 0.1],
                "self_ratio": 1.0,
                "self_range": [0.9, 1.1],
            },
            "memory_fraction": 0.5,
            "batches": batches | {"logits_fraction": 0.4, "optimizer": "sgd"},
            "largest_loss_difference": 1e-6,
        }
    return {"machine": MACHINE, "results": {"S": stages}}


def test_table_shows_what_was_not_measured():
    lines = {line[0]: line[1:] for line in table({"training": report_of_training({"1": 1.9, "2": 1.75})})}
    speed, memory = lines[SPEED.name], lines[MEMORY.name]
    assert speed == ["1.50 / 1.50 / 1.40", "1.80 / 2.10 / 1.85", "1.90 / 1.75 / -", "gate met where measured"]
    # Less memory is better: 0.5 is below the gate of 0.75 and above the goal of 0.4.
    assert memory[2:] == ["0.50 / 0.50 / -", "gate met where measured"]
    others = [line[2:] for name, line in lines.items() if "H200" in name]
    assert others == [["not measured", ""]] * len(others)
    assert len(others) == 3
    missed = table({"training": report_of_training({"1": 1.4, "2": 3.0, "3": 3.0})})[1]
    assert missed[-1] == "GATE MISSED"


def test_page_is_written_from_the_reports_alone(tmp_path):
    pytest.importorskip("matplotlib")
    ratios = {"1": 1.9, "2": 1.75, "3": 2.0}
    variants = {"all on": {"relative_time": 1.0, "self_range": [1, 1]}, "loss off": {"relative_time": 1.5}}
    ablated = {"machine": MACHINE, "results": {"S": {stage: {"variants": variants} for stage in ratios}}}
    write_page({"training": report_of_training(ratios), "ablation": ablated}, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| loss off | 1.50 | 1.50 | 1.50 |" in page
    assert "1.90 / 1.75 / 2.00" in page
    assert "a processor (AVX2), 2 cores, 2 threads; Python 3.12, torch 2.13" in page
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert all(word in page for word in ("Stage 1 trains", "Size S is", '"+ckpt"', "A gate must", "MFU is computed"))
    width = struct.unpack(">I", (tmp_path / "results.png").read_bytes()[16:20])[0]
    # No empty plot where there is no ablation.
    write_page({"training": report_of_training(ratios)}, tmp_path)
    assert struct.unpack(">I", (tmp_path / "results.png").read_bytes()[16:20])[0] < 0.6 * width
    assert SPEED.ranges({"training": report_of_training(ratios)})[0] == pytest.approx([1.7, 2.0])


def test_no_goal_is_met_where_a_gate_is_missed():
    figures = {"exact": {"ratio_cpu_to_original": 2.3}, "fast": {"ratio_cpu_to_original": 4.6}}
    reports = {"images": {"machine": MACHINE, "results": {"336 px, pad": figures}}}
    # Exact images have a gate of 2.5 and no goal; fast ones pass theirs.
    assert table(reports, [IMAGES])[1][3:] == ["2.30 / 4.60", "GATE MISSED"]


@pytest.mark.parametrize("settings", [{"quick": True}, {"toy": True}, {"num_records": 2000}])
def test_reports_of_toy_sizes_fill_no_row(settings):
    report = report_of_training({"1": 1.9})
    assert table({"training": report})[1][3] == "1.90 / - / -"
    assert table({"training": report | {"settings": settings}})[1][3] == "not measured"


def test_rows_of_an_h200_want_an_h200():
    suite = {
        # MFU needs no run of transformers.
        "stage 1": {"fastest_ours": "ours", "rivals": {"ours": {"mfu": 0.5}}},
        "moe_layer": {"training": {"6240": {"llava-lite": {"ratio": 2.5, "base": "deepspeed, capacity 1.5"}}}},
        "generation": {"batch 1": {"llava-lite": {"ratio": 5.0}}},
    }
    for device, found in (("NVIDIA H200", ["50.0 / - / -", "2.50", "5.00"]), ("NVIDIA A40", ["not measured"] * 3)):
        report = {"machine": MACHINE | {"device": device}, "results": suite}
        assert [line[3] for line in table({"cuda_suite": report}) if "H200" in line[0]] == found


def test_rival_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(alone, "LIMIT_S", 0.2)
    with pytest.raises(RuntimeError, match=r"benchmarks.worker {} did not end within 0\.2 s"):
        alone.run_alone("benchmarks.worker", "{}")


def test_rival_that_fails_is_reported_with_what_it_printed():
    with pytest.raises(RuntimeError, match=r"(?s)benchmarks.worker nothing ended with 1:.*JSONDecodeError"):
        alone.run_alone("benchmarks.worker", "nothing")


def test_one_process_at_a_time_by_turns_and_one_of_them_twice_a_round():
    calls = []

    def start(name, turn):
        calls.append((name, turn))
        return {"wall_s": 1.0 + turn, "cpu_s": 2.0}

    reports = alone.run_rounds(start, ["a", "b", "c"], "b", rounds=2, first=1)
    assert sorted(calls[:4]) == [("a", 1), ("b", 1), ("b", 1), ("c", 1)]
    assert sorted(calls[4:]) == [("a", 2), ("b", 2), ("b", 2), ("c", 2)]
    samples = alone.get_samples(reports)
    assert list(samples) == ["a", "b", "c", "b" + AGAIN]
    assert all(one.wall_s == [2.0, 3.0] and one.cpu_s == [2.0, 2.0] for one in samples.values())


def test_two_fastest_runs_of_transformers_continue_after_the_first_round():
    seconds = {
        "ours": 1,
        "transformers": 4,
        "transformers +ckpt": 6,
        "transformers Trainer": 3,
        training.LLAVA: 9,
        "ours" + AGAIN: 1,
    }
    reports = {name: [{"wall_s": wall_s}] for name, wall_s in seconds.items()}
    assert training.keep_fastest(reports) == ["ours", "transformers", "transformers Trainer", training.LLAVA]


def test_rival_of_the_first_round_alone_is_compared_in_that_round():
    samples = {"base": Samples([2.0, 8.0], [2.0, 8.0]), "slow": Samples([4.0], [4.0])}
    samples["base" + AGAIN] = samples["base"]
    figures = summary(samples, "base", [10, 10])
    assert figures["slow"]["ratio"] == 0.5
    assert figures["slow"]["ratio_range"] == [0.5, 0.5]


def test_memory_and_losses_of_training_are_those_of_all_rounds():
    def report(wall_s, above, losses):
        return {
            "wall_s": wall_s,
            "cpu_s": wall_s,
            "loaded_bytes": 10,
            "above_loaded_bytes": above,
            "losses": losses,
            "gradient_norms": losses,
        }

    reports = {
        "ours": [report(1.0, 30, [4.0, 3.0]), report(1.0, 50, [2.0, 1.0])],
        "transformers": [report(2.0, 80, [4.0, 3.0]), report(4.0, 80, [2.0, 1.5])],
        "transformers +ckpt": [report(3.0, 60, [4.0, 3.25])],
        "ours" + AGAIN: [report(1.0, 30, [4.0, 3.0]), report(1.25, 50, [2.0, 1.0])],
    }
    result = training.compare(reports, [100, 100])
    assert result["fastest_transformers"] == result["leanest_transformers"] == "transformers"
    # Medians of seconds: 3 over 1; within the rounds 2 and 4.
    assert result["over_transformers"]["ratio"] == pytest.approx(3.0)
    assert result["over_transformers"]["ratio_range"] == pytest.approx([2.0, 4.0])
    assert result["over_transformers"]["self_range"] == pytest.approx([0.8, 1.0])
    # No run with torch's matmul: ours is that run.
    assert result["over_transformers_by_torch_matmul"]["ratio"] == pytest.approx(3.0)
    assert result["memory_fraction"] == 40 / 80
    assert result["largest_loss_difference"] == 0.5


def test_step_clock_times_the_steps_after_the_warm_up(capsys, monkeypatch):
    class Ended(Exception):
        pass

    def leave(code):
        raise Ended

    monkeypatch.setattr(worker.os, "_exit", leave)
    clock = worker.StepClock(num_warmup=1, num_steps=2)
    clock(None)
    clock(rivals.Step(3.0, 1.0))
    clock(rivals.Step(2.0, 1.5))
    with pytest.raises(Ended):
        clock(rivals.Step(1.0, 2.0))
    report = json.loads(capsys.readouterr().out)
    assert report["losses"] == [3.0, 2.0, 1.0]
    assert report["gradient_norms"] == [1.0, 1.5, 2.0]
    assert report["wall_s"] == pytest.approx(sum(report["wall_s_each"][1:]))


@pytest.mark.slow
def test_two_checkouts_are_trained_by_turns_with_the_same_flags(tmp_path):
    file = tmp_path / "found.json"
    code = same_speed.main(
        ["--before", str(alone.ROOT), "--quick", "--threads", "1", "--gate", "0", "--json", str(file)]
    )
    results = json.loads(file.read_text())["results"]
    assert code == 0
    assert set(results) == {"1", "2", "3"}
    assert all(stage["after"]["rate"] > 0 and "self_ratio" in stage["after"] for stage in results.values())


def test_annotations_are_measured_without_datasets_too(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations.importlib.util, "find_spec", lambda name: None)
    annotations.write_records(tmp_path / "a.json", 20)
    assert list(annotations.measure(tmp_path / "a.json", tmp_path, 1)) == ["llava-lite", "json.load"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rounds 0", "--rounds 0: at least 1"),
        ("--threads -1", "--threads -1: at least 1"),
        ("--llava /nowhere", "--llava /nowhere: has no package `llava`"),
        ("--python-path /nowhere", "--python-path names libraries for the package of --llava"),
    ],
)
def test_flags_that_measure_nothing_are_refused_before_anything_runs(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_all(["--quick", "--results", str(tmp_path), *flags.split()])
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_page_lies_beside_the_results_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.DIRECTORY", tmp_path / "own")
    (tmp_path / "named").mkdir()
    reports = {"start_up": {"machine": MACHINE, "results": {}}}
    monkeypatch.setattr("benchmarks.__main__.read_reports", lambda directory: reports)
    assert run_all(["--report", "--results", str(tmp_path / "named")]) == 0
    assert [path.name for path in (tmp_path / "named").iterdir()] == ["RESULTS.md"]
    assert not (tmp_path / "own").exists()


def test_a_page_is_not_overwritten_where_nothing_was_measured(tmp_path, capsys):
    (tmp_path / "RESULTS.md").write_text("what another machine measured")
    with pytest.raises(SystemExit):
        run_all(["--report", "--results", str(tmp_path)])
    assert "no reports" in capsys.readouterr().err
    assert (tmp_path / "RESULTS.md").read_text() == "what another machine measured"


@pytest.mark.slow
def test_one_command_runs_every_benchmark(tmp_path):
    assert run_all(["--quick", "--threads", "1", "--results", str(tmp_path)]) == 0
    reports = read_reports(tmp_path)
    assert set(reports) == set(BENCHMARKS)
    for name, report in reports.items():
        assert report["name"] == name
        assert report["results"]
        assert report["settings"]["quick"]
        assert report["machine"]["versions"]["torch"] == torch.__version__
    stages = reports["training"]["results"]["toy"]
    assert set(stages) == {"1", "2", "3"}
    assert all(stage["largest_loss_difference"] < 1e-4 for stage in stages.values())


def test_smaller_benchmarks_reach_table_and_page():
    speeds = {"llava-lite": {"ratio": 1.3, "tokens_per_s": 30.0}, "transformers": {"ratio": 1.0}}
    speeds["transformers"] |= {"self_ratio": 1.01, "self_range": [0.9, 1.1]}
    speeds[BY_TORCH] = {"ratio": 1.1}
    figures = {
        "generation": {"batch 1": speeds, "batch 8": speeds},
        "images": {
            "336 px, pad": {
                "exact": {"ratio_cpu": 2.1, "ratio_cpu_to_original": 2.6},
                "fast": {"ratio_cpu": 3, "ratio_cpu_to_original": 4},
            }
        },
        "annotations": {
            "llava-lite": {"private_bytes_of_process": 14e6, "open_s": 0.21, "private_bytes": 1e6, "record_us": 30}
        },
        "start_up": {"import llava_lite": {"cpu_s": 0.05}, "imports of a training run": {"of_trainer": 1.05}},
    }
    reports = {name: {"machine": MACHINE, "results": one} for name, one in figures.items()}
    lines = {" ".join(line[0].split()[:2]): line[3:] for line in table(reports)[1:]}
    assert lines["generation tokens/s,"] == ["1.30 / 1.30", ""]
    assert lines["generation with"] == ["1.10 / 1.10", ""]
    assert [line[3:] for line in table(reports) if "processor of today" in line[0]] == [["2.10 / 3.00", ""]]
    # 2.6 has no goal of its own.
    assert lines["images per"] == ["2.60 / 4.00", "gate met"]
    assert lines["665k annotations:"] == ["0.21 / 14 / 30", "GATE MISSED"]
    assert lines["CPU s"] == ["0.05 / - / 1.05", "goal met where measured"]
    page = "\n".join(detail_parts(reports))
    assert "Batch 1. transformers over itself: 1.01, 0.90-1.10." in page
    assert "| llava-lite | 30.0 | 1.30 | - | - |" in page
    assert "| llava-lite | 0.21 | - | 30.0 | 1 | 14 |" in page
