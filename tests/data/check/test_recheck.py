"""A check that has seen its images before finds each one that has changed since, and opens no other."""

import io
import os
import shutil

import pytest
from conftest import draw_image, spoil
from PIL import Image
from toy_imagebind import tiny_config
from toy_media import media_record, write_media, write_records

from llava_lite.data import image_files
from llava_lite.data.check.check import check_annotations
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.index.annotations import open_annotations
from llava_lite.media.layout import ImageLayout

CLIP = ImageLayout(16, 4, 32)
IMAGEBIND = ImageLayout(1, 4, 32, media=tiny_config().media)
NAMES = ("a/0.png", "a/1.png", "b/2.png", "3.png")


@pytest.fixture
def images(tmp_path):
    """Return the image directory of a toy with four images, in three directories."""
    for seed, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(seed).save(path)
    return tmp_path / "images"


@pytest.fixture
def check(toy_tokenizer, tmp_path):
    """Return a function: records, layout, options -> {id: reason} of the bad records of a check, with one index."""

    def run(records, layout=CLIP, **options):
        path = tmp_path / "train.json"
        if not path.exists():
            write_records(path, records)
        options = {"bad_record": "skip", "max_bad_fraction": 1.0} | options
        annotations = open_annotations(str(path), str(tmp_path / "images"))
        report = check_annotations(annotations, RecordEncoder(toy_tokenizer, "v1"), layout, 512, **options)
        return {bad.id: bad.reason for bad in report.bad}

    return run


RECORDS = [media_record(name, image=name) for name in NAMES]


def delete(path):
    """Remove the file."""
    path.unlink()


def cut(path):
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    """Leave no byte."""
    path.write_bytes(b"")


def replace_by_text(path):
    """Put as many other bytes in its place."""
    path.write_bytes(b"x" * path.stat().st_size)


def move_another_over_it(path):
    """Rename a file with the same size and times to its name, as an atomic copy does."""
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(other, path)


def make_directory(path):
    """Put a directory in its place."""
    path.unlink()
    path.mkdir()


def make_dangling(path):
    """Put a link to nothing in its place."""
    path.unlink()
    path.symlink_to("nowhere.png")


def lead_outside(path):
    """Put a link to a sound image outside the image directory in its place."""
    outside = path.parents[2] / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)


def lead_directory_outside(path):
    """Move the directory out of the image directory and link to it: no time of the image changes."""
    outside = path.parents[2] / "outside"
    path.parent.rename(outside)
    path.parent.symlink_to(outside)
    # As in the process of a later run.
    image_files._real_path.cache_clear()


def remove_directory(path):
    """Remove the directory with all that is in it."""
    shutil.rmtree(path.parent)


def make_pipe(path):
    """Put a named pipe in its place, which nobody writes to."""
    path.unlink()
    os.mkfifo(path)


CHANGES = {
    delete: "there is no such file",
    cut: "truncated",
    empty: "cannot identify",
    replace_by_text: "cannot identify",
    spoil: "cannot identify",
    move_another_over_it: "cannot identify",
    make_directory: "it is a directory",
    make_dangling: "a link to a file that does not exist",
    lead_outside: "a link leads out of the image folder",
    lead_directory_outside: "a link leads out of the image folder",
    remove_directory: "there is no such file",
    make_pipe: "no regular file",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_image_that_changed_since_the_last_check_is_found_and_no_other(change, images, check):
    assert check(RECORDS) == check(RECORDS) == {}
    change(images / "b/2.png")
    for _ in range(2):
        found = check(RECORDS)
        assert list(found) == ["b/2.png"]
        assert CHANGES[change] in found["b/2.png"]


@pytest.mark.parametrize("name", ["a/0.png", "3.png"])
@pytest.mark.parametrize("back", [False, True])
def test_a_mended_image_is_used_again_with_its_new_size(name, back, images, check, toy_tokenizer, tmp_path):
    check(RECORDS)
    kept = (images / name).read_bytes()
    delete(images / name)
    assert list(check(RECORDS)) == [name]
    if back:
        (images / name).write_bytes(kept)
    else:
        Image.new("RGB", (7, 9)).save(images / name)
    assert check(RECORDS) == {}
    annotations = open_annotations(str(tmp_path / "train.json"), str(images))
    sizes = check_annotations(annotations, RecordEncoder(toy_tokenizer, "v1"), CLIP, 512).annotations.image_sizes
    expected = Image.open(images / name).size
    assert sizes[NAMES.index(name)].tolist() == list(expected)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_image_that_may_no_longer_be_read_is_found(images, check):
    check(RECORDS)
    (images / "b/2.png").chmod(0)
    assert list(check(RECORDS)) == ["b/2.png"]


def test_a_changed_permission_is_seen_by_its_change_time(images, check, monkeypatch):
    check(RECORDS)
    (images / "b/2.png").chmod(0o600)
    opened = watch_opened(monkeypatch)
    assert check(RECORDS) == {}
    assert opened == [str(images / "b/2.png")]
    assert check(RECORDS) == {}
    assert len(opened) == 1


def watch_opened(monkeypatch):
    """Return the list of files that Pillow opens from now on."""
    opened, pillow = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, *args, **kwargs: opened.append(file) or pillow(file, *args, **kwargs)
    )
    return opened


def test_a_second_check_opens_no_image_again(images, check, monkeypatch):
    check(RECORDS)
    opened = watch_opened(monkeypatch)
    assert check(RECORDS) == {}
    assert opened == []
    # One that was never checked, in a record of its own.
    draw_image(9).save(images / "new.png")
    (images.parent / "train.json").unlink()
    assert check([*RECORDS, media_record("new.png", image="new.png")]) == {}
    assert "new.png" in opened[-1]


def test_links_below_the_image_directory_are_followed_to_their_file(images, check):
    (images / "3.png").rename(images / "real.png")
    (images / "3.png").symlink_to("real.png")
    (images / "c").symlink_to("b")
    records = [*RECORDS, media_record("c/2.png", image="c/2.png")]
    assert check(records) == check(records) == {}
    spoil(images / "real.png")
    assert list(check(records)) == ["3.png"]
    spoil(images / "b/2.png")
    assert list(check(records)) == ["b/2.png", "3.png", "c/2.png"]


def test_an_image_under_another_suffix_is_followed_too(images, check):
    records = [media_record("one", image="a/0.jpg"), *RECORDS[2:]]
    assert check(records) == {}
    cut(images / "a/0.png")
    assert list(check(records)) == ["one"]


def test_one_of_several_images_is_found_and_an_image_in_the_record_is_not_looked_for(images, check):
    import base64

    data = io.BytesIO()
    draw_image(3).save(data, "PNG")
    inside = media_record("inside", image="data:image/png;base64," + base64.b64encode(data.getvalue()).decode())
    several = media_record("several", question="<image> <image>", image=["a/0.png", "a/1.png", "b/2.png"])
    assert check([inside, several]) == check([inside, several]) == {}
    delete(images / "a/1.png")
    assert list(check([inside, several])) == ["several"]


@pytest.mark.parametrize("kind", ["audio", "point", "image"])
@pytest.mark.parametrize("change", [delete, empty])
def test_a_changed_sound_or_cloud_is_found(kind, change, tmp_path, check):
    names = write_media(tmp_path / "images")
    mix = {"audio": {"audio": names["audio"]}, "point": {"point": names["point"]}}
    mix["image"] = {"image": names["image"], "audio": names["audio"], "audio_weight": 0.5}
    records = [media_record(kind, **mix[kind]), media_record("text")]
    assert check(records, IMAGEBIND) == check(records, IMAGEBIND) == {}
    change(tmp_path / "images" / names[kind])
    assert list(check(records, IMAGEBIND)) == [kind]


def test_a_check_of_files_seen_before_reads_no_record(images, check, monkeypatch):
    records = [media_record(str(i), image=NAMES[i % 4]) for i in range(40)]
    check(records)
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *where: reads.append(where) or pread(*where))
    assert check(records) == {}
    # The first one, to see that the file is of a format that is read.
    assert len(reads) == 1
    delete(images / "b/2.png")
    assert len(check(records)) == 10


@pytest.mark.parametrize("name", ["Ünï cödé.png", "with\nline break.png", "a\tb.png", "-dash.png"])
def test_names_of_any_characters_are_followed(name, images, check):
    draw_image(5).save(images / name)
    records = [media_record("odd", image=name), media_record("text"), *RECORDS]
    assert check(records) == check(records) == {}
    empty(images / name)
    assert list(check(records)) == ["odd"]


def test_records_without_any_image_are_checked_again(check):
    assert check([media_record("text")]) == check([media_record("text")]) == {}


@pytest.mark.parametrize("num_records", [1, 600])
def test_records_of_many_chunks_are_checked_by_threads_with_the_same_result(num_records, images, check):
    records = [media_record(str(i), image=NAMES[i % 4]) for i in range(num_records)]
    assert check(records) == {}
    empty(images / "a/0.png")
    assert list(check(records)) == [str(i) for i in range(0, num_records, 4)]
