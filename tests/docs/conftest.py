"""Keep what flags set up for one process from the tests that come after."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState
from pages import ROOT


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Read relative paths from the clone, as the pages do; forget the ranks that a DeepSpeed flag sets up."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    monkeypatch.chdir(ROOT)
    before = dict(os.environ)
    yield
    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
