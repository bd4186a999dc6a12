"""The directory of an engine's files is one of the checkpoint's own, whatever its file `latest` says."""

import pytest
import torch

from llava_lite.checkpoints.engine_files import engine_directory, read_state
from llava_lite.checkpoints.step_weights import holds_step


@pytest.fixture
def checkpoint(tmp_path):
    (directory := tmp_path / "run" / "checkpoint-8").mkdir(parents=True)
    for name in ("global_step8", "global_step8/inner"):
        (directory / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (directory / "link_out").symlink_to(tmp_path / "elsewhere")
    (directory / "link_up").symlink_to("..")
    (directory / "link_down").symlink_to("global_step8/inner")
    (directory / "a file").write_text("")
    return directory


@pytest.mark.parametrize(
    "tag",
    [
        *("..", ".", "", "/", "/tmp", "../checkpoint-8", "../../elsewhere", "global_step8/..", "global_step8/inner"),
        *("./global_step8", "global_step8/", "link_out", "link_up", "link_down", "a file", "nowhere", "..\\x", "a\0b"),
        # DeepSpeed would read all of it.
        *("global_step8" + " " * 300 + "/../..", "x" * 1000),
    ],
)
def test_latest_names_nothing_but_a_directory_of_the_checkpoint(checkpoint, tag):
    (checkpoint / "latest").write_text(tag)
    for read in (engine_directory, holds_step):
        with pytest.raises(OSError, match=r"no complete checkpoint: its file 'latest' names .* Copy the checkpoint"):
            read(checkpoint)


@pytest.mark.parametrize("tag", ["global_step8", "global_step8\n", " global_step8 "])
def test_the_directory_that_an_engine_writes_is_found(checkpoint, tag):
    (checkpoint / "latest").write_text(tag)
    assert engine_directory(checkpoint) == checkpoint / "global_step8"
    # A link to the complete checkpoint, or to a directory above it, is the user's own.
    (linked := checkpoint.parents[1] / "best").symlink_to(checkpoint)
    assert engine_directory(linked) == linked / "global_step8"


class ReadBy:
    """Pickled as getattr(kind, name)."""

    def __init__(self, kind, name):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


def test_a_member_of_an_enumeration_is_read_as_python_3_11_0_writes_it(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"stage": ReadBy(ZeroStageEnum, "weights"), "w": torch.ones(2)}, tmp_path / "states.pt")
    assert read_state(tmp_path / "states.pt")["stage"] is ZeroStageEnum.weights


@pytest.mark.parametrize("name", ["update_scale", "__init__", "__class__", "cur_scale"])
def test_another_attribute_of_an_allowed_class_is_not_read(tmp_path, name):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for kind in (DynamicLossScaler, ZeroStageEnum):
        torch.save({"read": ReadBy(kind, name)}, tmp_path / "states.pt")
        with pytest.raises(ValueError, match=r"it is a pickle with code in it, builtins\.getattr, which opening it"):
            read_state(tmp_path / "states.pt")
