"""DeepSpeed's own loads run no code of a file, whatever was checked before them: the bytes may have changed since."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava_lite.train.deepspeed.converter import FORCED
from llava_lite.train.deepspeed.private import safe_load

pytest.importorskip("deepspeed")


class Payload:
    """An object whose pickle makes a directory when it is loaded."""

    def __init__(self, there):
        self.there = str(there)

    def __reduce__(self):
        return os.mkdir, (self.there,)


def loading_engine():
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    return SimpleNamespace(checkpoint_engine=TorchCheckpointEngine())


def test_the_engine_reads_its_own_states_and_refuses_code(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    engine, file = loading_engine(), tmp_path / "mp_rank_00_model_states.pt"
    scaler = DynamicLossScaler(2**8, 2.0, 100, 1.0, 1, False)
    torch.save({"module": {"w": torch.ones(3)}, "scaler": scaler, "stage": ZeroStageEnum.weights}, file)
    with safe_load(engine):
        found = engine.checkpoint_engine.load(str(file), map_location="cpu")
    assert found["module"]["w"].tolist() == [1, 1, 1]
    assert (found["scaler"].cur_scale, found["stage"]) == (2**8, ZeroStageEnum.weights)
    torch.save({"module": Payload(tmp_path / "ran")}, file)
    with (
        safe_load(engine),
        pytest.raises(ValueError, match=r"states\.pt' cannot be read .* code in it, .*mkdir"),
    ):
        engine.checkpoint_engine.load(str(file), map_location="cpu")
    assert not (tmp_path / "ran").exists()
    # Only inside: without it the file runs, so it is no harmless one.
    engine.checkpoint_engine.load(str(file))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_forced", [True, False])
def test_the_converter_runs_no_code(tmp_path, is_forced):
    (tmp_path / "in").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": Payload(tmp_path / "ran"), "ds_version": "0.19.8"}, tmp_path / "in" / name)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"} | (FORCED if is_forced else {})
    command = [sys.executable, "-m", "llava_lite.train.deepspeed.converter", "--inject_missing_state"]
    command += ["--input_folder", str(tmp_path / "in"), "--output_folder", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert done.returncode != 0
    assert ("Weights only load failed" if is_forced else "set TORCH_FORCE_WEIGHTS_ONLY_LOAD=1") in done.stderr
    assert not (tmp_path / "ran").exists()
