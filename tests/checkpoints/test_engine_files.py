"""The directory of an engine's files is one of the checkpoint's own, whatever its file `latest` says."""

import pytest

from llava_lite.checkpoints.engine_files import engine_directory
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
