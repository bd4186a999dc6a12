"""The memory of weights is known from their headers, and compared with what is free."""

import pytest
import torch
from safetensors.torch import save_file

from llava_lite.checkpoints.memory import check_fits, free_ram, weight_bytes
from llava_lite.checkpoints.source import Checkpoint

WEIGHTS = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16), "c": torch.zeros(2, dtype=torch.bfloat16)}


def test_free_memory_is_what_the_machine_or_its_container_has_left(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:      50 kB\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("4096\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 50 * 1024
    (tmp_path / "memory.max").write_text("8192\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 4096
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert free_ram(tmp_path / "meminfo", tmp_path) == 4096 + 3000
    assert free_ram() > 2**20


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_counted_as_they_are_loaded(tmp_path, name):
    (save_file if name.endswith("safetensors") else torch.save)(WEIGHTS, tmp_path / name)
    checkpoint = Checkpoint(tmp_path)
    assert weight_bytes(checkpoint) == 15 * 4 + 7 * 2 + 2 * 2
    assert weight_bytes(checkpoint, widens_half=True) == 15 * 4 + 7 * 4 + 2 * 2
    assert weight_bytes(checkpoint, bits=8) == 24
    assert weight_bytes(checkpoint, bits=4) == 7 + 3 + 1


def test_a_directory_without_weights_needs_nothing(tmp_path):
    assert weight_bytes(Checkpoint(tmp_path)) == 0


def test_too_many_weights_are_refused_with_both_numbers():
    check_fits("llava", 2**30, 2**30)
    with pytest.raises(ValueError, match=r"'llava' needs 2\.5 GiB of memory for its weights, and 1\.0 GiB are free"):
        check_fits("llava", 5 * 2**29, 2**30)
