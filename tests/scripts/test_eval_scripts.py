"""The scripts of evaluation: LLaVA's names, each the command of its benchmark on all devices of the machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy_benchmarks as toy

from llava_lite.commands.eval import build_parser
from llava_lite.eval.benchmarks import get_benchmark

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts/v1_5/eval"
# Script -> benchmark, split: what LLaVA's script of that name asks, Q-Bench MoE-LLaVA's and MMMU FlagPerf's.
EXPECTED = {name: (name, None) for name in ("gqa", "sqa", "textvqa", "pope", "mme", "seed", "llavabench", "mmvet")}
EXPECTED |= {name: (name, None) for name in ("mmbench", "mmbench_cn", "qbench", "mmmu")}
EXPECTED |= {"vqav2": ("vqav2", "test-dev"), "vizwiz": ("vizwiz", "test")}


@pytest.fixture
def fake_python(tmp_path):
    """Return a directory with a `python` that prints its arguments as JSON, and 3 as the number of devices."""
    directory = tmp_path / "bin with space"
    directory.mkdir()
    script = directory / "python"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(3 if sys.argv[1] == '-c' else json.dumps(sys.argv[1:]))\n"
    )
    script.chmod(0o755)
    return directory


@pytest.fixture
def started(bash, fake_python):
    """Return a function: script, arguments, variables -> the words after `python`."""

    def start(name, *arguments, **variables):
        done = bash(ROOT / f"scripts/{name}.sh", *arguments, path=fake_python, **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return start


def test_there_is_a_script_for_each_of_llavas():
    assert {path.stem for path in SCRIPTS.glob("*.sh")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_script_asks_its_benchmark(name, started):
    words = started(f"v1_5/eval/{name}", "--batch-size", "4", MODEL="a model", NUM_GPUS="1")
    assert words[:3] == ["-m", "llava_lite.cli", "eval"]
    flags = build_parser().parse_args(words[3:])
    assert (flags.benchmark, flags.split) == EXPECTED[name]
    assert (flags.model, flags.data, flags.batch_size) == ("a model", "./playground/data/eval", 4)
    benchmark = get_benchmark(name)
    benchmark.choose(flags.split, "split")
    # Temperature 0, and the prompt format of the checkpoint.
    assert (flags.temperature, flags.conv_mode, flags.variant) == (None, None, None)


def test_the_model_may_be_the_first_argument_and_the_data_elsewhere(started):
    words = started("v1_5/eval/pope", "checkpoints/a", "--limit", "5", DATA="/data/my eval", NUM_GPUS="1")
    flags = build_parser().parse_args(words[3:])
    assert (flags.model, flags.data, flags.limit) == ("checkpoints/a", "/data/my eval", 5)


@pytest.mark.parametrize(("variables", "processes"), [({}, "3"), ({"NUM_GPUS": "8"}, "8")])
def test_all_devices_share_the_questions(variables, processes, started):
    words = started("v1_5/eval/pope", MODEL="m", **variables)
    assert words[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    assert words[5:9] == ["-m", "llava_lite.cli", "eval", "pope"]


def test_without_a_model_the_script_says_how_to_name_one(bash, fake_python):
    done = bash(SCRIPTS / "pope.sh", "--limit", "5", path=fake_python)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: no model. MODEL=DIR bash scripts/v1_5/eval/pope.sh, or its directory as the first argument.\n"
    )


def test_flagperf_hands_its_arguments_on(started):
    words = started("flagperf", "/data/flag perf", "config.py", "--size", "13b")
    assert words == ["-m", "llava_lite.cli", "flagperf", "/data/flag perf", "config.py", "--size", "13b"]


def test_the_page_names_every_script():
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    part = text.split("## Scripts with LLaVA's names")[1].split("## ")[0]
    assert EXPECTED.keys() <= set(re.findall(r"`(\w+)`", part))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_pope_is_scored_by_one_process_and_by_two(processes, bash, checkpoint, tmp_path):
    model = checkpoint(conv_template="v1")
    toy.pope(tmp_path / "eval/pope")
    flags = ["--out", str(tmp_path / "out"), "--max-new-tokens", "4", "--device", "cpu"]
    variables = {"DATA": str(tmp_path / "eval"), "NUM_GPUS": str(processes), "OMP_NUM_THREADS": "1"}
    done = bash(SCRIPTS / "pope.sh", str(model), *flags, timeout=500, **variables)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert (report["benchmark"], report["num_questions"]) == ("pope", len(toy.POPE))
    assert len(list((tmp_path / "out").glob(f"part_*_of_{processes}.jsonl"))) == processes
    assert "F1, mean of the three parts" in done.stdout


def test_scripts_are_clean_to_shellcheck():
    scripts = [*SCRIPTS.glob("*.sh"), ROOT / "scripts/flagperf.sh"]
    try:
        done = subprocess.run(
            ["shellcheck", "-x", "-P", "SCRIPTDIR", *map(str, scripts)], capture_output=True, text=True, timeout=120
        )
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    assert done.returncode == 0, done.stdout
