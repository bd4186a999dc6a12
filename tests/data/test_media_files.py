"""Media of a record are found below the image folder, checked, and loaded as `reply` loads them."""

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy_imagebind import tiny_config
from toy_media import KINDS, media_record, write_media, write_records

from llava_lite.data.dataset import open_dataset
from llava_lite.data.errors import DataError
from llava_lite.data.media_files import LoadedMix, check_kinds, find_part, inspect_mix, load_mix
from llava_lite.data.records.media import MediaMix, MediaPart
from llava_lite.media.files import MediaError
from llava_lite.media.image import ImageError
from llava_lite.media.layout import ImageLayout
from llava_lite.media.load import load_media
from llava_lite.media.preprocess import load_image_processor

CONFIG = tiny_config()
LAYOUT = ImageLayout(1, 4, 32, media=CONFIG.media)


@pytest.fixture
def files(tmp_path):
    """{kind: (its name, its path)} below tmp_path/images."""
    names = write_media(tmp_path / "images")
    return {kind: (name, str(tmp_path / "images" / name)) for kind, name in names.items()}


def mix_of(**paths):
    return MediaMix(tuple(MediaPart(kind, path) for kind, path in paths.items()))


def test_a_layout_of_imagebind_knows_its_media_and_how_they_are_loaded():
    assert LAYOUT.media_kinds == ("image", "video", "audio", "depth", "thermal", "imu", "point")
    for kind in LAYOUT.media_kinds:
        assert LAYOUT.media_options(kind) == CONFIG.media_options(kind)
    hash(LAYOUT)
    assert ImageLayout(1).media_kinds == ()


def test_media_are_loaded_with_their_weights_as_load_media_does(files, tmp_path):
    parts = tuple(MediaPart(kind, files[kind][0], 0.5 + k) for k, kind in enumerate(KINDS))
    loaded = load_mix(str(tmp_path / "images"), MediaMix(parts), LAYOUT, "record 'r'")
    assert loaded.size == (32, 32)
    for part in parts:
        sample, weight = loaded.media[part.kind]
        assert weight == part.weight
        assert torch.equal(sample, load_media(part.kind, files[part.kind][1], **CONFIG.media_options(part.kind)))


def test_sizes_are_those_of_the_image_or_of_the_towers_images(files, tmp_path):
    folder = str(tmp_path / "images")
    assert inspect_mix(folder, mix_of(audio="bird.wav"), LAYOUT) == (32, 32, 0)
    assert inspect_mix(folder, mix_of(audio="bird.wav", image="bird.png"), LAYOUT) == (43, 40, 0)
    # Only an image may have another suffix than its record says.
    assert inspect_mix(folder, mix_of(audio="bird.wav", image="bird.jpg"), LAYOUT) == (43, 40, 1)
    assert inspect_mix(folder, mix_of(**{kind: name for kind, (name, _) in files.items()}), LAYOUT, True)[2] == 0
    with pytest.raises(MediaError, match="cannot use the thermal"):
        find_part(folder, MediaPart("thermal", "heat.jpg"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lost.wav", r"cannot use the audio '.*lost.wav': there is no such file"),
        ("../bird.wav", "cannot use the audio .*the path leaves the image folder"),
        ("/etc/passwd", "the path leaves the image folder"),
        ("https://a.org/a.wav", "it is a URL"),
        ("link.wav", "a link leads out of the image folder"),
        ("empty.wav", "cannot use the audio .*empty.wav': it is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(files, tmp_path, path, words):
    folder = tmp_path / "images"
    (tmp_path / "out.wav").write_bytes(b"RIFF")
    os.symlink(tmp_path / "out.wav", folder / "link.wav")
    (folder / "empty.wav").write_bytes(b"")
    with pytest.raises(MediaError, match=words):
        inspect_mix(str(folder), mix_of(audio=path), LAYOUT)
    with pytest.raises(DataError, match=f"record 'r': .*{words}"):
        load_mix(str(folder), mix_of(audio=path), LAYOUT, "record 'r'")


def test_a_pipe_is_no_sound_and_nothing_waits_for_it(files, tmp_path):
    os.mkfifo(tmp_path / "images" / "pipe.wav")
    with pytest.raises(MediaError, match="it is no regular file but a pipe"):
        inspect_mix(str(tmp_path / "images"), mix_of(audio="pipe.wav"), LAYOUT)


def test_a_file_is_searched_for_in_no_other_place(files):
    with pytest.raises(MediaError, match="no image folder is given"):
        find_part(None, MediaPart("audio", "bird.wav"))
    with pytest.raises(ImageError, match="no image folder is given"):
        find_part(None, MediaPart("image", "bird.png"))


def test_points_and_motion_that_the_tower_cannot_read_are_found_without_decoding(files, tmp_path):
    folder = tmp_path / "images"
    np.save(folder / "few.npy", np.zeros((3, 3), np.float32))
    np.save(folder / "short.npy", np.zeros((6, 39), np.float32))
    with pytest.raises(MediaError, match="it holds 3 points; the encoder reads at least 4"):
        inspect_mix(str(folder), mix_of(point="few.npy"), LAYOUT)
    with pytest.raises(MediaError, match=r"its shape is \(6, 39\)"):
        inspect_mix(str(folder), mix_of(imu="short.npy"), LAYOUT)


def test_a_file_that_needs_a_decoder_is_found_by_its_header(files, tmp_path, monkeypatch):
    # As where PyAV is not installed.
    monkeypatch.setitem(sys.modules, "av", None)
    folder = tmp_path / "images"
    (folder / "a.mp3").write_bytes(b"ID3" + bytes(100))
    (folder / "a.mp4").write_bytes(bytes(100))
    for mix in (mix_of(audio="a.mp3"), mix_of(video="a.mp4")):
        with pytest.raises(ImportError, match=r"needs PyAV to be decoded; it comes with: pip install 'llava-lite"):
            inspect_mix(str(folder), mix, LAYOUT)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda data: data[:44], r"there is no sound in it \(0 samples\)"),
        (lambda data: data[:45], r"there is no sound in it \(0 samples\)"),
        (lambda data: data[: 44 + 200], r"it lasts .* ms; a spectrogram needs at least 25 ms"),
        (lambda data: b"no sound at all", "it does not begin with RIFF and WAVE, and without PyAV no other sound can"),
        (lambda data: b"<html>404</html>" * 9999, "it does not begin with RIFF and WAVE"),
    ],
    ids=["header alone", "half a sample", "short", "text", "page"],
)
def test_a_wav_without_sound_is_found_without_decoding(cut, words, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    folder = tmp_path / "images"
    (folder / "bad.WAV").write_bytes(cut((folder / "bird.wav").read_bytes()))
    with pytest.raises(MediaError, match=rf"cannot use the audio '.*bad\.WAV': {words}"):
        inspect_mix(str(folder), mix_of(audio="bad.WAV"), LAYOUT)


def test_a_wav_with_a_long_header_is_read_without_a_decoder(files, tmp_path):
    data = (tmp_path / "images" / "bird.wav").read_bytes()
    note = b"LIST" + (1 << 17).to_bytes(4, "little") + bytes(1 << 17)
    (tmp_path / "images" / "long.wav").write_bytes(data[:12] + note + data[12:])
    assert inspect_mix(str(tmp_path / "images"), mix_of(audio="long.wav"), LAYOUT) == (32, 32, 0)


@pytest.mark.parametrize(
    ("mix", "layout", "words"),
    [
        (mix_of(audio="a.wav"), ImageLayout(16), "has 'audio', which this model does not read: it reads images alone"),
        (mix_of(image="i.png"), ImageLayout(16), "has 'image_weight', which this model does not read"),
        (mix_of(audio="a.wav"), ImageLayout(0), "it reads text alone"),
        (
            mix_of(video="a.mp4", image="i.png"),
            ImageLayout(1, 4, 32, media=tiny_config(modalities=["image", "audio", "text"]).media),
            "has 'video', which this model does not read: it reads image, audio, and other media need a tower",
        ),
        (mix_of(audio="a.wav"), ImageLayout(1, 4, 32, "anyres", media=CONFIG.media, pinpoints=((32, 64),)), "anyres"),
        (
            mix_of(audio="a.wav", image="i.png"),
            ImageLayout(1, 4, 32, "random_crop", media=CONFIG.media),
            "random_crop",
        ),
    ],
)
def test_media_that_the_run_cannot_read_are_refused_with_the_record(mix, layout, words):
    with pytest.raises(DataError, match=f"record 'r' .*{words}"):
        check_kinds(mix, layout, "record 'r' (train.json[3])")


def test_random_crops_are_for_images_and_leave_sounds_alone():
    check_kinds(mix_of(audio="a.wav"), replace(LAYOUT, aspect_ratio="random_crop"), "record 'r'")


def test_an_example_has_the_media_beside_plain_images(files, tmp_path, toy_tokenizer, toy_tower_dir):
    records = [
        media_record("sound", audio="bird.wav"),
        media_record("both", audio="bird.wav", audio_weight=0.5, image="bird.png"),
        media_record("image", image="bird.png"),
        media_record("text"),
    ]
    path = write_records(tmp_path / "train.json", records)
    processor, folder = load_image_processor(toy_tower_dir("clip")), str(tmp_path / "images")
    dataset, _ = open_dataset(path, toy_tokenizer, processor, "v1", folder, LAYOUT)
    assert dataset.has_image.tolist() == [True, True, True, False]
    examples = [dataset[i] for i in range(4)]
    assert [len(example["input_ids"]) for example in examples] == dataset.lengths.tolist()
    (sound,), (both,), (image,) = (example["images"] for example in examples[:3])
    assert list(sound) == ["audio"]
    assert [(kind, weight) for kind, (_, weight) in both.items()] == [("image", 1.0), ("audio", 0.5)]
    assert torch.equal(both["image"][0], load_media("image", files["image"][1], side=32))
    assert image.shape == (3, 32, 32)
    assert "images" not in examples[3]
    assert isinstance(dataset.open(dataset.annotations[0], dataset.annotations[0].images[0]), LoadedMix)
    sound = tmp_path / "images" / "bird.wav"
    sound.write_bytes(sound.read_bytes()[:48])
    with pytest.raises(DataError, match=r"record 'sound' .*cannot use the audio") as error:
        dataset[0]
    assert dataset.problem(0, error.value)["kind"] == "image"
