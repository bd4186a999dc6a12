"""A file that a person names is replaced at once where it is a regular one; all else stays what it is."""

import json
import os
import resource
import stat
import subprocess
import sys
import threading

import pytest

from llava_lite.errors import DiskError
from llava_lite.output_file import write_output


def test_a_regular_file_is_replaced_and_its_directory_made(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_output(path, "one", "b.json")
    first = path.stat().st_ino
    with open(path) as reader:
        write_output(path, "two", "b.json")
        assert reader.read() == "one"
    assert path.read_text() == "two"
    assert path.stat().st_ino != first
    assert os.listdir(tmp_path / "new") == ["a.json"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, is_there):
    target, link, far = tmp_path / "there" / "a.json", tmp_path / "link", tmp_path / "far"
    target.parent.mkdir()
    if is_there:
        target.write_text("old")
    link.symlink_to("there/a.json")
    far.symlink_to("link")
    write_output(far, "text", "b.json")
    assert (os.readlink(link), os.readlink(far)) == ("there/a.json", "link")
    assert target.read_text() == "text"
    assert os.listdir(target.parent) == ["a.json"]


@pytest.mark.parametrize("by_link", [False, True])
def test_a_pipe_stays_a_pipe_and_gets_the_text(tmp_path, by_link):
    pipe, link, found = tmp_path / "pipe", tmp_path / "link", []
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    write_output(link if by_link else pipe, "text", "b.json")
    # A pipe that was replaced has no writer, and its reader would wait for ever.
    reader.join(timeout=60)
    assert found == ["text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()


def test_a_device_stays_a_device(tmp_path):
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    write_output(link, "text", "b.json")
    assert link.is_symlink()
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(DiskError, match=r"^/dev/full cannot be written: No space left on device; 4 bytes are needed"):
        write_output("/dev/full", "text", "b.json")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


PRINTING = """
import sys
from llava_lite.output_file import write_output
print("before")
write_output(sys.argv[1], "text\\n", "b.json")
print("after")
"""


@pytest.mark.parametrize("is_pipe", [True, False])
@pytest.mark.parametrize("by_link", [True, False])
def test_own_output_gets_the_text_between_what_is_printed(tmp_path, is_pipe, by_link):
    out, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to("/dev/stdout")
    command = [sys.executable, "-c", PRINTING, str(link) if by_link else "/dev/stdout"]
    with open(out, "w") as file:
        done = subprocess.run(command, stdout=subprocess.PIPE if is_pipe else file, text=True, check=True)
    assert (done.stdout if is_pipe else out.read_text()) == "before\ntext\nafter\n"
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]
    assert link.is_symlink()


def test_a_directory_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir")
    for name in ("dir", "link", "dir/"):
        with pytest.raises(IsADirectoryError) as caught:
            write_output(name, "text", "b.json")
        assert str(caught.value) == f"{name!r} is a directory; name a file, such as {os.path.join(name, 'b.json')!r}."
    assert sorted(os.listdir(tmp_path)) == ["dir", "link"]
    assert not os.listdir(tmp_path / "dir")


def test_a_full_disk_names_the_file_and_leaves_the_old_one_without_a_draft(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError, match=rf"^{path} cannot be written: File too large; 2,000 bytes are needed"):
            write_output(path, "x" * 2000, "b.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_named(name):
    with pytest.raises(OSError, match="no file can have the name 'a") as caught:
        write_output(name, "text", "b.json")
    assert repr(name) in str(caught.value)


def test_a_lone_surrogate_can_be_read_back(tmp_path):
    text = "a\\ud800 \\ \ud800 \udc80 \u4e2d"
    write_output(tmp_path / "a.json", json.dumps(text, ensure_ascii=False), "b.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == text
