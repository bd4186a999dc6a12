"""Models that do not fit into memory are refused before one of them is loaded."""

from argparse import Namespace

import pytest

from llava_lite.serve import memory

OPTIONS = Namespace(model_base=None, revision=None, device="cpu", load_8bit=False, load_4bit=False)


def test_models_of_one_command_must_fit_together(checkpoint, monkeypatch):
    model = str(checkpoint())
    one = memory.get_weight_bytes(model, OPTIONS, on_gpu=False)
    assert one > 0
    monkeypatch.setattr(memory, "free_ram", lambda: 2 * one - 1)
    memory.check_memory([model], OPTIONS)
    with pytest.raises(ValueError, match=r"needs [\d.]+ MiB of memory for its weights, and [\d.]+ MiB are free"):
        memory.check_memory([model, model], OPTIONS)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(OSError, match="no/such/model"):
        memory.check_memory(["no/such/model"], OPTIONS)
