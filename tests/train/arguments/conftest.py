"""A machine with another device than this one."""

import pytest
import torch
import transformers.utils

ASKED = {
    "bf16": (transformers.utils, "is_torch_bf16_gpu_available"),
    "tf32": (transformers.utils, "is_torch_tf32_available"),
    "fp16": (torch.cuda, "is_available"),
}


@pytest.fixture
def device_without(monkeypatch):
    """Return a function: precisions -> torch reports that this machine has a device for all precisions but these."""

    def say(*lacks):
        for name, (module, function) in ASKED.items():
            monkeypatch.setattr(module, function, lambda answer=name not in lacks: answer)

    return say
