"""FlagPerf's case on the tiny world: both stages on two ranks, MMMU, its lines; and again from the logs."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from toy_eval_data import png, write_table

from llava_lite.cli import main
from llava_lite.commands import flagperf
from llava_lite.eval.scoring.mmmu import SUBJECTS
from llava_lite.train.flagperf.case import Layout, read_stage
from llava_lite.train.flagperf.config import VendorConfig

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "playground" / "tiny"
CONFIG = VendorConfig(1e12, 4, 1, 4, 1, "Output/checkpoints_finetune/llava-v1.5-7b", "MMMU/MMMU")


def write_config(path, **changes):
    """Write a vendor's config with a line that must not run."""
    values = "".join(f"{name} = {value!r}\n" for name, value in (vars(CONFIG) | changes).items())
    path.write_text(f"raise SystemExit('this file was run')\n{values}")
    return path


def write_mmmu(directory):
    """Write a question of each subject as Hugging Face's tables."""
    for subject in SUBJECTS:
        row = {
            "id": f"validation_{subject}_1",
            "question": "<image 1> What colour is it?",
            "options": "['red', 'blue']",
            "answer": "A",
            "question_type": "multiple-choice",
            "image_1": png(20),
        }
        write_table(directory / subject / "validation-00000-of-00001.parquet", [row], ("image_1",))


@pytest.fixture
def data(tmp_path):
    """Return FlagPerf's data directory of the digits."""
    world = tmp_path / "world"
    command = ["-m", "playground.tiny.make_world", "--out", world, "--scale", "0.004"]
    done = subprocess.run(["python", *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "data"
    shutil.copytree(world / "LLaVA-Pretrain", root / "LLaVA-Pretrain")
    shutil.copytree(world / "LLaVA-Finetune", root / "LLaVA-Finetune")
    checkpoints = root / "LLaVA-Pretrain" / "checkpoints"
    (checkpoints / "openai").mkdir(parents=True)
    shutil.copytree(TINY / "llm", checkpoints / "vicuna-7b-v1.5")
    shutil.copytree(TINY / "tower", checkpoints / "openai" / "clip-vit-large-patch14-336")
    write_mmmu(root / "MMMU" / "MMMU")
    return root


@pytest.mark.slow
def test_case_runs_whole_on_two_ranks(data, tmp_path, capsys):
    config = write_config(tmp_path / "config_CPUx1x2.py")
    environment = os.environ | {"NUM_GPUS": "2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "ZERO": "2"}
    flags = "--use_cpu True --bf16 False --model_max_length 256 --dataloader_num_workers 0 --report_to none"
    command = ["bash", "scripts/flagperf.sh", data, config, "--json", tmp_path / "case.json", "--flags", flags]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("Tokens/p/s: ") for line in lines) == 2
    assert any(line.startswith("MMMU : ") for line in lines)
    assert "two-stage average" in lines
    found = json.loads((tmp_path / "case.json").read_text())
    stages = found["case"]["stages"]
    records = [len(json.loads(path.read_text())) for path in sorted(data.glob("LLaVA-*/*.json"), reverse=True)]
    # Two ranks of 4 records; the last batch is filled.
    assert [stage["records"] for stage in stages] == [math.ceil(count / 8) * 8 for count in records]
    for stage in stages:
        assert stage["records"] < stage["tokens"] <= stage["padded_tokens"]
        assert 0 < stage["step_seconds"] < stage["seconds"]
    # The figures of the run, from its logs alone.
    again = tmp_path / "again.json"
    assert flagperf.main([str(data), str(config), "--from_log", "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == found
    assert "published, 8 A800" in capsys.readouterr().out
    other = write_config(tmp_path / "other.py", theoryflops=2e12)
    with pytest.raises(ValueError, match=r"had another config: theoryflops was 1000000000000\.0"):
        flagperf.main([str(data), str(other), "--from_log"])
    # Its steps are not counted with the seconds of a run that finds them done.
    with pytest.raises(FileExistsError, match="has the log of an earlier run"):
        flagperf.main([str(data), str(config)])


def test_all_that_is_missing_is_listed(tmp_path):
    (tmp_path / "LLaVA-Pretrain").mkdir()
    with pytest.raises(FileNotFoundError, match=r"vicuna-13b-v1\.5    from ") as error:
        Layout(tmp_path, "13b", CONFIG).check()
    assert str(error.value).count("    from ") == 5


def test_logs_of_a_run_that_did_not_end_are_refused(tmp_path):
    config = write_config(tmp_path / "config.py")
    with pytest.raises(FileNotFoundError, match="run the case first"):
        flagperf.main([str(tmp_path), str(config), "--from_log"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="no line with the tokens"):
        read_stage(tmp_path / "metrics.jsonl", 1.0, 1)


def test_a_file_for_the_figures_is_looked_at_before_the_run(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("")
    words = ["flagperf", str(tmp_path / "data"), str(config), "--flags", "--max_steps=5"]
    for name, says in (
        ("none/case.json", f"there is no directory {tmp_path / 'none'}. Make it, or name another file."),
        (".", "is a directory; name a file."),
        ("config.yaml/case.json", f"there is no directory {config}."),
    ):
        assert main([*words, "--json", str(tmp_path / name)]) == 1
        assert says in capsys.readouterr().err
