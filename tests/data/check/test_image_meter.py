"""The check before step 1 finds what is wrong with media, for the tower of the run, and counts them."""

import json
import sys

import numpy as np
import pytest
from toy_imagebind import tiny_config
from toy_media import media_record, write_media, write_records, write_sound

from llava_lite.data.check.check import check_annotations
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.media.layout import ImageLayout

IMAGEBIND = ImageLayout(1, 4, 32, media=tiny_config().media)
SOUNDS = ImageLayout(1, 4, 32, media=tiny_config(modalities=["image", "audio"]).media)
CLIP = ImageLayout(16, 4, 32)


@pytest.fixture
def check(toy_tokenizer, tmp_path):
    """Return a function: records, layout, options -> the report of a check, bad ones left out."""
    write_media(tmp_path / "images")

    def run(records, layout=IMAGEBIND, **options):
        path = write_records(tmp_path / "train.json", records)
        options = {"bad_record": "skip", "max_bad_fraction": 1.0} | options
        encoder = RecordEncoder(toy_tokenizer, "v1")
        return check_annotations(open_annotations(path, str(tmp_path / "images")), encoder, layout, 512, **options)

    return run


RECORDS = [
    media_record("sound", audio="bird.wav"),
    media_record("both", audio="bird.wav", audio_weight=0.5, image="bird.png"),
    media_record("cloud", point="cloud.npy", imu="walk.npy"),
    media_record("image", image="bird.png"),
    media_record("text"),
]


def test_media_are_counted_by_kind(check):
    report = check(RECORDS)
    assert not report.bad
    assert report.num_with_image == 4
    assert report.num_media == {"image": 1, "audio": 2, "point": 1, "imu": 1}
    lines = report.summary()
    assert "5 records: 4 with images, 1 text only" in lines
    assert "records whose media together are one image, by kind: 1 image, 2 audio, 1 point, 1 imu" in lines
    assert report.annotations.image_sizes.tolist() == [[32, 32], [43, 40], [32, 32], [43, 40]]
    assert "by kind" not in check(RECORDS[3:]).summary()


def test_what_is_checked_for_one_tower_is_checked_again_for_another(check):
    assert not check(RECORDS).bad
    report = check(RECORDS, CLIP)
    assert [bad.id for bad in report.bad] == ["sound", "both", "cloud"]
    assert "record 'sound' (train.json[0]) has 'audio', which this model does not read" in str(report.bad[0])
    assert [bad.id for bad in check(RECORDS, SOUNDS).bad] == ["cloud"]
    assert not check(RECORDS).bad
    with pytest.raises(DataError, match=r"3 of 5 records cannot be used \(3 image\)"):
        check(RECORDS, CLIP, bad_record="raise")


def test_missing_and_empty_files_are_bad_records(check, tmp_path):
    (tmp_path / "images" / "empty.wav").write_bytes(b"")
    records = [
        media_record("lost", audio="lost.wav"),
        media_record("empty", image="bird.png", audio="empty.wav"),
        media_record("no image", image="lost.png", audio="bird.wav"),
        media_record("good", audio="bird.wav"),
        media_record("weight", audio="bird.wav", audio_weight=-1),
    ]
    log = tmp_path / "skipped.jsonl"
    report = check(records, skipped_log_path=log)
    found = [(line["id"], line["kind"]) for line in map(json.loads, log.read_text().splitlines())]
    assert found == [("lost", "image"), ("empty", "image"), ("no image", "image"), (None, "record")]
    assert "'audio_weight' is int -1" in report.bad[3].reason


def test_files_that_change_are_checked_again(check, tmp_path):
    assert not check(RECORDS).bad
    write_sound(tmp_path / "images" / "bird.wav", duration_s=0.25)
    assert not check(RECORDS).bad
    (tmp_path / "images" / "bird.wav").write_bytes(b"")
    assert [bad.id for bad in check(RECORDS).bad] == ["sound", "both"]
    (tmp_path / "images" / "bird.wav").unlink()
    assert [bad.id for bad in check(RECORDS).bad] == ["sound", "both"]


def test_a_check_that_decodes_reads_every_file_to_its_end(check, tmp_path):
    np.save(tmp_path / "images" / "flat.npy", np.zeros((20, 20), np.float32))
    records = [media_record("flat", depth="flat.npy")]
    assert not check(records).bad
    assert "it has no depth above 0" in check(records, decode=True).bad[0].reason


def test_a_sound_that_is_none_is_a_bad_record(check, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    sound = (tmp_path / "images" / "bird.wav").read_bytes()
    (tmp_path / "images" / "silent.wav").write_bytes(sound[:44])
    (tmp_path / "images" / "text.wav").write_bytes(b"no sound at all")
    more = [media_record(name, audio=f"{name}.wav") for name in ("silent", "text")]
    assert [bad.id for bad in check([*RECORDS, *more]).bad] == ["silent", "text"]


def test_a_decoder_that_is_missing_stops_the_check(check, tmp_path, monkeypatch):
    # As where PyAV is not installed.
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "images" / "a.mp4").write_bytes(bytes(100))
    with pytest.raises(ImportError, match=r"^record 'film' .*: '.*a.mp4' needs PyAV to be decoded"):
        check([*RECORDS, media_record("film", video="a.mp4")])
    # Of a tower that reads no video it is the record that is wrong.
    assert [bad.id for bad in check([media_record("film", video="a.mp4")], SOUNDS).bad] == ["film"]
