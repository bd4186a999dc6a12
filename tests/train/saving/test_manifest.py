"""A checkpoint equals its manifest or is not used; what a cut-off save leaves is ended or cleared."""

import errno
import json
import logging
import os
import shutil

import pytest

from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.manifest import BrokenCheckpoint
from llava_lite.train.saving.resume import find_checkpoint


@pytest.fixture
def write(tmp_path):
    """Return a function: name, serial -> a complete checkpoint directory of three files."""

    def make(name, serial=0):
        directory = tmp_path / name
        (directory / "global_step4").mkdir(parents=True)
        for file in ("trained.safetensors", "global_step4/states.pt", "trainer_state.json"):
            (directory / file).write_bytes(f"{name} {file}".encode() * 50)
        files = paper.digests(directory, paper.list_files(directory))
        content = {"step": int(name.split("-")[-1]), "world_size": 1, "serial": serial, "files": files}
        steps = {"world_size": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        paper.write_manifest(directory, content | {"steps": steps, "schedule": {"learning_rate": 1e-05}})
        return directory

    return make


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [delete, truncate, flip_a_bit, grow])
@pytest.mark.parametrize("file", ["trained.safetensors", "global_step4/states.pt", "trainer_state.json"])
def test_any_harm_to_any_file_is_named_and_the_checkpoint_before_is_taken(write, caplog, tmp_path, file, harm):
    earlier, newer = write("checkpoint-4", 0), write("checkpoint-8", 1)
    assert paper.newest_complete_checkpoint(tmp_path) == str(newer)
    harm(newer / file)
    with pytest.raises(BrokenCheckpoint) as error:
        paper.verify(newer)
    assert error.value.file == file
    with caplog.at_level(logging.WARNING):
        assert paper.newest_complete_checkpoint(tmp_path) == str(earlier)
    assert file in caplog.text
    assert "checkpoint-8" in caplog.text


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": 3}', '{"files": {'])
def test_a_directory_without_a_readable_manifest_is_passed_over(write, tmp_path, content):
    earlier, newer = write("checkpoint-4", 0), write("checkpoint-8", 1)
    (newer / paper.MANIFEST).unlink()
    if content is not None:
        (newer / paper.MANIFEST).write_text(content)
    assert paper.newest_complete_checkpoint(tmp_path) == str(earlier)


def test_no_checkpoint_is_none_and_only_broken_ones_are_an_error(write, tmp_path):
    assert paper.newest_complete_checkpoint(tmp_path / "nothing here") is None
    assert paper.newest_complete_checkpoint(tmp_path) is None
    truncate(write("checkpoint-4") / "trainer_state.json")
    with pytest.raises(ValueError, match=r"none is complete.*trainer_state\.json"):
        paper.newest_complete_checkpoint(tmp_path)


def test_the_last_saved_comes_first_and_not_the_highest_number(write, tmp_path):
    write("checkpoint-12", 2)
    again = write("checkpoint-8", 3)
    assert paper.newest_complete_checkpoint(tmp_path) == str(again)


def test_a_save_that_was_cut_off_after_its_manifest_is_published(write, tmp_path):
    os.rename(write("checkpoint-8"), tmp_path / "tmp-checkpoint-8")
    paper.finish_saves(tmp_path)
    assert paper.newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


def test_a_save_that_was_cut_off_before_its_manifest_is_cleared(write, tmp_path):
    kept, staged = write("checkpoint-4"), tmp_path / "tmp-checkpoint-8"
    os.rename(write("checkpoint-8"), staged)
    (staged / paper.MANIFEST).unlink()
    paper.finish_saves(tmp_path)
    assert not staged.exists()
    assert paper.newest_complete_checkpoint(tmp_path) == str(kept)


@pytest.mark.parametrize("new_one_is_complete", [True, False])
def test_a_replacement_that_was_cut_off_between_its_two_renames_loses_nothing(write, tmp_path, new_one_is_complete):
    os.rename(write("checkpoint-8", 0), tmp_path / "tmp-checkpoint-8-replaced")
    os.rename(write("checkpoint-8", 1), tmp_path / "tmp-checkpoint-8")
    if not new_one_is_complete:
        (tmp_path / "tmp-checkpoint-8" / paper.MANIFEST).unlink()
    paper.finish_saves(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-8"]
    assert paper.get_serial(tmp_path / "checkpoint-8") == (1 if new_one_is_complete else 0)


def test_a_replacement_that_was_cut_off_before_the_old_one_was_deleted_keeps_the_new_one(write, tmp_path):
    os.rename(write("checkpoint-8", 0), tmp_path / "tmp-checkpoint-8-replaced")
    write("checkpoint-8", 1)
    paper.finish_saves(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-8"]
    assert paper.get_serial(tmp_path / "checkpoint-8") == 1


def test_nothing_of_a_checkpoint_is_deleted_before_the_new_one_has_its_name(write, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    os.rename(write("checkpoint-8", 1), tmp_path / "tmp-checkpoint-8")
    write("checkpoint-8", 0)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        paper.publish(tmp_path / "tmp-checkpoint-8", tmp_path / "checkpoint-8")
    assert paper.newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert paper.get_serial(tmp_path / "checkpoint-8") == 1


def test_publishing_replaces_a_directory_of_the_same_name(write, tmp_path):
    write("checkpoint-8", 0)
    os.rename(write("other-8", 7), tmp_path / "tmp-checkpoint-8")
    paper.publish(tmp_path / "tmp-checkpoint-8", tmp_path / "checkpoint-8")
    assert os.listdir(tmp_path) == ["checkpoint-8"]
    assert paper.get_serial(tmp_path / "checkpoint-8") == 7


def test_pruning_keeps_the_last_saved_the_best_and_what_is_not_ours(write, tmp_path):
    for serial, step in enumerate((2, 4, 6, 8)):
        write(f"checkpoint-{step}", serial)
    (tmp_path / "checkpoint-99").mkdir()
    paper.prune(tmp_path, limit=2, keep=[tmp_path / "checkpoint-2"])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-8", "checkpoint-99"]
    paper.prune(tmp_path, limit=None)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-8", "checkpoint-99"]


def test_the_last_saved_stays_although_the_best_fills_the_limit(write, tmp_path):
    for serial, step in enumerate((2, 4, 6)):
        write(f"checkpoint-{step}", serial)
    paper.prune(tmp_path, limit=1, keep=[tmp_path / "checkpoint-2"])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-6"]


def test_room_is_compared_with_the_need_and_both_are_reported(tmp_path):
    paper.check_room(tmp_path, 1)
    with pytest.raises(OSError, match=r"1,000,000,000,000,000,000 bytes are needed, [\d,]+ are free"):
        paper.check_room(tmp_path, 10**18)


def test_json_appears_complete(tmp_path):
    paper.write_json(tmp_path / "a.json", {"b": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_json_that_cannot_be_flushed_leaves_the_one_before(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    paper.write_json(tmp_path / "a.json", {"b": 1})
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        paper.write_json(tmp_path / "a.json", {"b": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}


def test_a_missing_checkpoint_is_reported(tmp_path):
    with pytest.raises(
        ValueError, match=r"none is not complete: the directory does not exist\. Nothing was changed\."
    ):
        find_checkpoint(tmp_path, str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"^--resume_from_checkpoint True, but .* Give its path\. Nothing was changed"
    ):
        find_checkpoint(tmp_path, True)
