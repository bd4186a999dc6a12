"""Every file of a real checkpoint, the manifest too, is damaged in turn: found, named, and the one before is used."""

import json
import os
import runpy
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.manifest import BrokenCheckpoint, seal, to_text
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.checkpoints.step_weights import name_newest, verify_model
from llava_lite.commands.push import main as push
from llava_lite.inference import load
from llava_lite.train.saving import manifest as paper
from llava_lite.train.saving.resume import difference, find_checkpoint
from llava_lite.train.train import train

HERE = Path(__file__).parents[1]
ROOT = HERE.parents[1]
TWO_SAVES = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--report_to", "none"]
STATE_OF_A_RUN = ("optimizer.pt", "scheduler.pt", "rng_state", "progress_")


def delete(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


def flip_first_bit(path):
    flip(path, 0, 0)


def flip_middle_bit(path):
    flip(path, path.stat().st_size // 2, 3)


def flip_last_bit(path):
    flip(path, path.stat().st_size - 1, 7)


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def become_a_directory(path):
    path.unlink()
    path.mkdir()


HARMS = [delete, empty, truncate, cut_in_half, grow, become_a_directory]
HARMS += [flip_first_bit, flip_middle_bit, flip_last_bit]


def damage_each_file(run, caplog):
    """Damage every file of checkpoint-2 in every way; return what was not found, and the number of attempts."""
    earlier, newer = run / "checkpoint-1", run / "checkpoint-2"
    silent, attempts = [], 0
    assert paper.newest_complete_checkpoint(run) == str(newer)
    for name in [*paper.list_files(newer), paper.MANIFEST]:
        content = (newer / name).read_bytes()
        for harm in HARMS if content else [delete, grow, become_a_directory]:
            attempts += 1
            caplog.clear()
            harm(newer / name)
            found = paper.newest_complete_checkpoint(run)
            is_told = f"{newer} is not complete: {name} " in caplog.text
            if found != str(earlier) or not is_told:
                silent.append((name, harm.__name__, found))
            if not name.startswith(STATE_OF_A_RUN):
                with pytest.raises(BrokenCheckpoint) as error:
                    verify_model(newer)
                assert error.value.file == name
            if (newer / name).is_dir():
                (newer / name).rmdir()
            (newer / name).write_bytes(content)
    assert paper.newest_complete_checkpoint(run) == str(newer)
    return silent, attempts


@pytest.mark.parametrize("stage", ["full", "lora", "moe"])
def test_any_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(stage_flags, tmp_path, caplog, stage):
    train(stage_flags(stage, tmp_path / "out", *TWO_SAVES))
    silent, attempts = damage_each_file(tmp_path / "out", caplog)
    assert silent == []
    assert attempts > 100


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_any_damage_to_the_files_of_two_ranks_is_named(stage_flags, tmp_path, caplog, engine):
    launch = runpy.run_path(str(HERE / "test_ranks.py"))["launch"]
    flags = [*stage_flags("full", tmp_path / "out", *TWO_SAVES), "--deepspeed", str(ROOT / f"{engine}.json")]
    assert "error" not in launch([{"name": "case", "argv": flags}], tmp_path)["case"][0]
    silent, attempts = damage_each_file(tmp_path / "out", caplog)
    assert silent == []
    assert attempts > 100


# The manifest.


@pytest.fixture
def write(tmp_path):
    """Return a function: step, serial -> a complete checkpoint of one file."""

    def make(step, serial=0):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "trained.safetensors").write_bytes(b"weights" * step)
        (directory / "trainer_state.json").write_text('{"global_step": 1}')
        steps = {"world_size": 1, "per_device_train_batch_size": 1, "trained parameters": ["é", "b"]}
        content = {"step": step, "world_size": 1, "serial": serial, "steps": steps}
        content |= {"schedule": {"learning_rate": 1e-05, "max_steps": -1}}
        paper.write_manifest(
            directory, content | {"files": paper.digests(directory, ["trained.safetensors", "trainer_state.json"])}
        )
        return directory

    return make


def test_every_bit_of_a_manifest_counts(write):
    path = write(8) / paper.MANIFEST
    content = path.read_bytes()
    unnoticed = []
    for byte in range(len(content)):
        for bit in range(8):
            flip(path, byte, bit)
            try:
                paper.read_manifest(path.parent)
                unnoticed.append((byte, bit))
            except BrokenCheckpoint:
                pass
            path.write_bytes(content)
    assert unnoticed == []


def test_every_cut_of_a_manifest_is_found(write):
    path = write(8) / paper.MANIFEST
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BrokenCheckpoint):
            paper.read_manifest(path.parent)


@pytest.mark.parametrize("gone", ["format", "sha256", "step", "world_size", "serial", "steps", "schedule", "files"])
def test_a_lost_field_is_named(write, gone):
    directory = write(8)
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    del manifest[gone]
    (directory / paper.MANIFEST).write_text(to_text(manifest))
    with pytest.raises(BrokenCheckpoint, match=f"'{gone}'"):
        paper.read_manifest(directory)


def test_a_manifest_of_an_earlier_version_still_opens(write, tmp_path):
    directory = write(8)
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    del manifest["format"], manifest["sha256"]
    (directory / paper.MANIFEST).write_text(json.dumps(manifest))
    assert paper.newest_complete_checkpoint(tmp_path) == str(directory)
    # Its name with one letter changed is not missing but unknown.
    (directory / paper.MANIFEST).write_text(json.dumps(manifest | {"sha255": "0" * 64}))
    with pytest.raises(BrokenCheckpoint, match="unknown field 'sha255'"):
        paper.read_manifest(directory)


@pytest.mark.parametrize(
    ("was", "is_now", "reason"),
    [
        ('"serial": 0', '"serial": 0, "serial": 1', "two values for 'serial'"),
        ('"max_steps": -1', '"max_steps": NaN', "it holds NaN, which is no number of JSON"),
        ('"max_steps": -1', '"max_steps": -Infinity', "it holds -Infinity, which is no number of JSON"),
    ],
)
def test_what_json_never_held_is_refused_where_no_checksum_shows_it(write, was, is_now, reason):
    directory = write(8)
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    del manifest["format"], manifest["sha256"]
    text = json.dumps(manifest)
    assert was in text
    (directory / paper.MANIFEST).write_text(text.replace(was, is_now))
    with pytest.raises(BrokenCheckpoint, match=reason):
        paper.read_manifest(directory)


ENTRY = {"size": 1, "sha256": "0" * 64}
CONTENTS = [
    b"",
    b"\0" * 300,
    b"\xff\xfe{",
    b"\xef\xbb\xbf{}",
    b"{}",
    b"[]",
    b"3",
    b"null",
    b'"text"',
    b'{"files": 3}',
    b'{"files": {',
    b'{"a": ' * 100_000,
    b"[" * 1_000_000,
    b'{"step": NaN}',
    b'{"step": Infinity}',
    b'{"step": 1, "step": 1}',
    b'{"step": ' + b"9" * 10_000 + b"}",
]
# Values that a field of the manifest, or of a file in it, cannot have.
NAMES = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\\b", "c:x", "a\0b", "manifest.json"]
ENTRIES = [None, 3, {}, {"size": 1}, ENTRY | {"more": 1}]
ENTRIES += [ENTRY | {"size": size} for size in ("1", -1, 1.0, True)]
ENTRIES += [ENTRY | {"sha256": sha256} for sha256 in (3, None, "0" * 63, "G" * 64)]
COUNTS = [{}, *({"world_size": count} for count in ("2", 0, True, 1.0))]
WRONG = {
    "step": [None, "8", 8.0, True, -1, 10**30, 7],
    "serial": [None, "1", 1.5, False, -1],
    "world_size": [None, "1", []],
    "steps": [None, [], "x", *COUNTS, {"world_size": 1, "gradient_accumulation_steps": "2"}],
    "schedule": [None, [], 3],
    "files": [None, [], {}, 3, *({name: ENTRY} for name in NAMES), *({"a": entry} for entry in ENTRIES)],
}


def assert_broken(directory, earlier, caplog):
    """A manifest is refused in a sentence, and is named before an older checkpoint is used."""
    caplog.clear()
    assert paper.newest_complete_checkpoint(directory.parent) == str(earlier)
    assert str(directory) in caplog.text
    assert find_checkpoint(directory.parent, None) == str(earlier)
    with pytest.raises(ValueError, match=r"is not complete: manifest\.json .*Nothing was changed\.") as error:
        find_checkpoint(directory.parent, str(directory))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:20]))
def test_what_is_no_manifest_is_refused_and_named(write, caplog, content):
    earlier, newer = write(4, 0), write(8, 1)
    (newer / paper.MANIFEST).write_bytes(content)
    assert_broken(newer, earlier, caplog)


@pytest.mark.parametrize("is_sealed", [True, False], ids=["sealed", "earlier version"])
@pytest.mark.parametrize("field", WRONG)
def test_a_field_that_cannot_be_is_refused_and_named(write, caplog, field, is_sealed):
    earlier, newer = write(4, 0), write(8, 1)
    manifest = json.loads((newer / paper.MANIFEST).read_text())
    for value in WRONG[field]:
        changed = manifest | {field: value}
        del changed["sha256"], changed["format"]
        (newer / paper.MANIFEST).write_text(to_text(seal(changed) if is_sealed else changed))
        assert_broken(newer, earlier, caplog)


@pytest.mark.parametrize("kind", ["directory", "fifo", "dangling link", "missing", "file in place of the checkpoint"])
def test_what_stands_in_place_of_a_manifest_is_named(write, caplog, kind):
    earlier, newer = write(4, 0), write(8, 1)
    path = newer / paper.MANIFEST
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "file in place of the checkpoint":
        os.rename(newer, newer.with_name("gone"))
        newer.write_text("")
    assert paper.newest_complete_checkpoint(newer.parent) == str(earlier)
    assert f"{newer} is not complete" in caplog.text


def test_a_huge_manifest_is_not_read(write, caplog):
    earlier, newer = write(4, 0), write(8, 1)
    os.truncate(newer / paper.MANIFEST, 1 << 40)
    assert_broken(newer, earlier, caplog)


@pytest.mark.parametrize("broken", [4, 8, 12])
def test_a_checkpoint_of_unknown_age_is_named_before_another_is_used(write, caplog, broken):
    for serial, step in enumerate((4, 8, 12)):
        write(step, serial)
    directory = write(2, 3).parent
    empty(directory / f"checkpoint-{broken}" / paper.MANIFEST)
    assert paper.newest_complete_checkpoint(directory) == str(directory / "checkpoint-2")
    assert f"checkpoint-{broken} is not complete" in caplog.text


def test_broken_checkpoints_do_not_push_complete_ones_out(write, tmp_path):
    for serial, step in enumerate((2, 4, 6, 8)):
        write(step, serial)
    empty(tmp_path / "checkpoint-8" / paper.MANIFEST)
    truncate(tmp_path / "checkpoint-6" / "trained.safetensors")
    paper.prune(tmp_path, limit=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    write(10, 4)
    paper.prune(tmp_path, limit=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-4", "checkpoint-6", "checkpoint-8"]


# Files that the manifest does not list.


@pytest.mark.parametrize("name", ["scaler.pt", "rng_state_7.pth", "progress_3.pt", "latest", "global_step8/x.pt"])
def test_a_file_that_a_run_would_read_unlisted_is_refused(write, caplog, name):
    earlier, newer = write(4, 0), write(8, 1)
    (newer / name).parent.mkdir(exist_ok=True)
    (newer / name).write_bytes(b"new")
    assert paper.newest_complete_checkpoint(newer.parent) == str(earlier)
    assert f"{name} is not in its manifest, and a resumed run would read it" in caplog.text


def test_a_note_beside_the_files_of_a_checkpoint_is_reported_and_does_no_harm(write, caplog):
    newer = write(8)
    (newer / "NOTES.md").write_text("best so far")
    assert paper.newest_complete_checkpoint(newer.parent) == str(newer)
    assert "1 file(s) that its manifest does not list, such as NOTES.md" in caplog.text


# Whoever opens a checkpoint as a model.


def test_a_damaged_checkpoint_does_not_open_as_a_model(stage_flags, tmp_path):
    train(stage_flags("lora", tmp_path / "out", *TWO_SAVES))
    newer = tmp_path / "out" / "checkpoint-2"
    for file in newer.glob("optimizer.pt"):
        file.unlink()
    load(newer, device="cpu")
    for name in ("trained.safetensors", "config.json", "adapter_config.json"):
        content = (newer / name).read_bytes()
        # A space that JSON does not need, or a bit of a weight.
        (newer / name).write_bytes(content + b" " if name.endswith("json") else content[:-1] + b"\x01")
        with pytest.raises(ValueError, match=f"checkpoint-2 is not complete: {name} has"):
            load(newer, device="cpu")
        (newer / name).write_bytes(content)
    (newer / paper.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is not complete: manifest\.json is missing"):
        load(newer, device="cpu")
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(OSError, match=r"its checkpoint-2 is not complete \(manifest.json is missing\); a checkpoint"):
        load(tmp_path / "out", device="cpu")


def test_the_newest_is_the_last_saved_and_not_the_highest_number(write, tmp_path):
    for serial, step in enumerate((12, 8)):
        (write(step, serial) / "config.json").write_text("{}")
    assert name_newest(tmp_path) == f"; a checkpoint of it is {str(tmp_path / 'checkpoint-8')!r}"


def test_settings_that_are_lists_of_lists_are_compared():
    assert difference("grid", [[1, 2], [2, 1]], [[1, 2]]) == (
        "grid: no longer [[2, 1]] (1 in all), now also [] (0 in all)"
    )


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "global_step8/zero_pp_rank_0_mp_rank_00_optim.pt"])
@pytest.mark.parametrize("is_named", [True, False], ids=["named", "found"])
def test_a_packed_pickle_of_a_strangers_checkpoint_is_refused_before_it_is_read(write, name, is_named):
    directory = write(8)
    (directory / name).parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02]." + bytes(2**22))
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    names = paper.list_files(directory)
    paper.write_manifest(directory, manifest | {"files": paper.digests(directory, names)})
    with pytest.raises(ValueError, match=r"its entry 'archive/data\.pkl' unpacks from [\d,]+ bytes to 4,194,308"):
        find_checkpoint(directory.parent, str(directory) if is_named else None)


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "found"])
def test_a_strangers_checkpoint_whose_engine_lies_outside_is_refused_before_anything_is_loaded(write, is_named):
    directory = write(8)
    (directory / "latest").write_text("..")
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    paper.write_manifest(directory, manifest | {"files": paper.digests(directory, paper.list_files(directory))})
    with pytest.raises(ValueError, match=r"its file 'latest' names '\.\.'.*Nothing was changed\."):
        find_checkpoint(directory.parent, str(directory) if is_named else None)


# Whoever reads one file of a checkpoint alone.


@pytest.mark.parametrize("damage", [flip_middle_bit, flip_last_bit, truncate, "manifest", "lost manifest"])
def test_a_damaged_connector_of_a_checkpoint_starts_no_stage(stage_flags, tmp_path, damage):
    train(stage_flags("projector", tmp_path / "one", *TWO_SAVES))
    newer = tmp_path / "one" / "checkpoint-2"
    adapter = newer / "mm_projector.bin"
    flags = [*stage_flags("full", tmp_path / "two", "--max_steps", "1"), "--pretrain_mm_mlp_adapter", str(adapter)]
    train(flags)
    name = "manifest.json" if "manifest" in str(damage) else "mm_projector.bin"
    {"manifest": cut_in_half, "lost manifest": delete}.get(damage, damage)(newer / name)
    with pytest.raises(BrokenCheckpoint, match=rf"checkpoint-2 is not complete: {name} (has|cannot|is missing)"):
        train(flags)


def read_config(path):
    return Checkpoint(path.parent).read_json(path.name)


def test_a_file_that_is_read_alone_is_compared_where_a_manifest_of_ours_lists_it(write, tmp_path):
    directory = write(8)
    save_file({"w": torch.ones(3)}, directory / "trained.safetensors")
    torch.save({"w": torch.ones(3)}, directory / "mm_projector.bin")
    (directory / "config.json").write_text('{"a": 1}')
    readers = {"trained.safetensors": read_weights, "mm_projector.bin": read_weights, "config.json": read_config}
    manifest = json.loads((directory / paper.MANIFEST).read_text())
    paper.write_manifest(directory, manifest | {"files": paper.digests(directory, paper.list_files(directory))})
    # A file that was added later is nobody's.
    torch.save({"w": torch.ones(2)}, directory / "other.bin")
    for name, read in {**readers, "other.bin": read_weights}.items():
        read(directory / name)
    for name, read in readers.items():
        content = (directory / name).read_bytes()
        flip(directory / name, content.rindex(b"1" if name == "config.json" else b"\x80\x3f"), 0)
        with pytest.raises(BrokenCheckpoint, match=rf"{name} has the right size but other bytes"):
            read(directory / name)
        (directory / name).write_bytes(content)
    # Another program's manifest.json says nothing about it.
    (there := tmp_path / "there").mkdir()
    (there / paper.MANIFEST).write_text('{"name": "an app"}')
    torch.save({"w": torch.ones(3)}, there / "mm_projector.bin")
    read_weights(there / "mm_projector.bin")


def test_a_damaged_checkpoint_is_not_uploaded(write):
    directory = write(8)
    (directory / "config.json").write_text("{}")
    truncate(directory / "trained.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"trained\.safetensors has 55 bytes, the manifest has 56"):
        push([str(directory), "tester/never"])
