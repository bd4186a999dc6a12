"""A run that is killed, stopped, signalled and out of disk ends bit-equal to the one that was never touched."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The long run: LLAVA_LITE_SOAK_STEPS=2000 LLAVA_LITE_SOAK_FAULTS=50, and a directory that keeps its files.
STEPS = int(os.environ.get("LLAVA_LITE_SOAK_STEPS", "80"))
FAULTS = int(os.environ.get("LLAVA_LITE_SOAK_FAULTS", "8"))
MORE = (
    "--mm_projector_type mlp2x_gelu --save_strategy steps --save_steps 10 --save_total_limit 3 --logging_steps 1 "
    "--dataloader_num_workers 2 --ddp_timeout 15 --group_by_modality_length True --report_to none "
    "--eval_strategy steps --eval_steps 16 --num_eval_generations 1 --eval_max_new_tokens 4 "
    "--lr_scheduler_type cosine --warmup_steps 5"
)
KEPT = os.environ.get("LLAVA_LITE_SOAK_DIR")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_under_faults_ends_as_the_one_never_touched(num_ranks, stage_flags, toy_llm_dir, toy_data, tmp_path):
    llm = shutil.copytree(toy_llm_dir("llama"), tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    # An epoch is longer than what workers read ahead: one that is stopped is missed.
    data, (eval_data, _) = toy_data(tmp_path / "data", num_records=240), toy_data(tmp_path / "eval")
    flags = stage_flags("moe", tmp_path / "unused", *MORE.split(), "--max_steps", STEPS, data=data, model=llm)
    at = flags.index("--output_dir")
    flags = [*flags[:at], *flags[at + 2 :], "--eval_data_path", eval_data]
    flags += ["--deepspeed", str(ROOT / "zero2.json")] if num_ranks > 1 else []
    directory = Path(KEPT or tmp_path) / f"soak_{num_ranks}"
    command = [sys.executable, str(HERE / "soak.py"), str(directory)]
    command += ["--faults", str(FAULTS), "--ranks", str(num_ranks), "--", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result = json.loads((directory / "result.json").read_text())
    assert result["equal"] == {"files": True, "log": True}
    assert sum(result["faults"].values()) >= FAULTS // 2
