"""Paths in records, and files that are no files: nothing outside the image folder is read, and nothing waits."""

import io
import json
import os
import tarfile

import pytest
from PIL import Image

from llava_lite.data.errors import DataError
from llava_lite.data.image_files import find_image, inspect_image
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.shards.read import find_shards, read_shard
from llava_lite.hub.yaml_files import read_yaml
from llava_lite.media.image import ImageError

ESCAPES = [
    "../secret.png",
    "a/../../secret.png",
    "./../secret.png",
    "{outside}/secret.png",
    "//{outside}/secret.png",
    "..\\secret.png",
    "C:\\secret.png",
    "C:/secret.png",
    "\\\\server\\secret.png",
    "file://{outside}/secret.png",
    "FILE:///secret.png",
    "http://127.0.0.1:9/secret.png",
    "hf://somebody/secret.png",
    "a.png\x00../secret.png",
    "linked.png",
    "linked/secret.png",
    "hop/secret.png",
    "/proc/self/environ",
    "/dev/zero",
]
NO_FILES = [
    "pipe.png",
    "zero.png",
    "loop.png",
    "d",
    "",
    ".",
    "x" * 300,
    "a/" * 3000 + "b.png",
    "a.png/b",
    "\ud800.png",
]


@pytest.fixture
def root(tmp_path):
    """Return an image folder with one image, and with links, pipes and devices; the secret lies outside."""
    root, outside = tmp_path / "images", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    (root / "d").mkdir()
    outside.mkdir()
    for file in (root / "a.png", outside / "secret.png", tmp_path / "secret.png"):
        Image.new("RGB", (8, 8)).save(file)
    (root / "linked.png").symlink_to(outside / "secret.png")
    (root / "linked").symlink_to(outside)
    (root / "hop").symlink_to("linked")
    (root / "loop.png").symlink_to("loop.png")
    (root / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize("name", ESCAPES)
def test_no_image_outside_is_read(root, name, monkeypatch):
    opened = []
    monkeypatch.setattr("builtins.open", lambda *arguments, **_: opened.append(arguments))
    with pytest.raises(ImageError):
        find_image(str(root), name.format(outside=root.parent / "outside"))
    assert not opened


@pytest.mark.parametrize(
    ("name", "file", "words"),
    [
        ("a\\b.png", "a\\b.png", "write it with forward slashes"),
        ("file://a.png", "file:/a.png", "it is a URL; images are read from the image folder only"),
    ],
)
def test_a_name_that_is_no_path_is_refused_even_where_a_file_has_it(root, name, file, words):
    (root / file).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(root / file)
    assert os.path.isfile(root / name)
    with pytest.raises(ImageError, match=words):
        find_image(str(root), name)


def test_a_link_under_another_suffix_leads_nowhere_either(root):
    (root / "other.png").symlink_to(root.parent / "outside" / "secret.png")
    with pytest.raises(ImageError, match="a link leads out of the image folder"):
        find_image(str(root), "other.jpg")
    assert find_image(str(root), "other.jpg", follow_links=True) == (str(root / "other.png"), True)


@pytest.mark.parametrize("follow_links", [False, True])
@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_no_image_and_nothing_waits(root, name, follow_links):
    with pytest.raises(ImageError):
        find_image(str(root), name, follow_links)


def test_a_sparse_file_is_no_image_and_not_read(root):
    with (root / "large.png").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ImageError):
        inspect_image(find_image(str(root), "large.png")[0])


@pytest.mark.parametrize("name", ["pipe.json", "pipe.jsonl", "pipe.yaml", "pipe.tsv"])
def test_a_pipe_is_no_annotation_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="there is no such"):
        open_annotations(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="there is no YAML file"):
        read_yaml(tmp_path / name)


@pytest.mark.parametrize("image", ["../secret.png", ["a.png", "../secret.png"], {"path": "../secret.png"}, ["\x00"]])
def test_records_name_what_they_may_not_read(root, tmp_path, image):
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "7", "image": image, "conversations": turns}]))
    found = open_annotations(str(tmp_path / "a.json"), str(root), cache_dir=str(tmp_path / "cache"))
    with pytest.raises((DataError, ImageError)):
        [find_image(str(root), str(one)) for one in found[0].images]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_member_of_a_shard_that_is_no_file_is_not_followed(tmp_path, kind):
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(secret)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        record = json.dumps({"id": "7", "conversations": turns}).encode()
        member = tarfile.TarInfo("7.json")
        member.size = len(record)
        tar.addfile(member, io.BytesIO(record))
        member = tarfile.TarInfo("7.png")
        member.type, member.linkname = kind, str(secret)
        tar.addfile(member)
    [shard] = find_shards(str(tmp_path / "a.tar"))
    assert [set(record.parts) for record in read_shard(shard)] == [{"json"}]
