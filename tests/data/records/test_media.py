"""Media of a record are one image, whose parts have paths and weights; anything else is refused with the record."""

import math

import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.records.media import MediaMix, MediaPart, kind_bits
from llava_lite.data.records.record import parse_record

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bird."}]


def images_of(**keys):
    return parse_record({"id": "7", "conversations": TURNS} | keys, "train.json[3]").images


def mix(*parts):
    return (MediaMix(tuple(MediaPart(*part) for part in parts)),)


@pytest.mark.parametrize("kind", ["audio", "video", "point", "depth", "thermal", "imu"])
def test_a_file_of_each_kind_stands_for_an_image(kind):
    assert images_of(**{kind: "a/b.file"}) == mix((kind, "a/b.file", 1.0))


def test_media_beside_an_image_are_mixed_with_it_by_their_weights():
    assert images_of(audio="bird.wav", audio_weight=0.5, image="bird.jpg") == mix(
        ("image", "bird.jpg", 1.0), ("audio", "bird.wav", 0.5)
    )
    assert images_of(images=["bird.jpg"], image_weight=2, depth="d.png") == mix(
        ("image", "bird.jpg", 2.0), ("depth", "d.png", 1.0)
    )
    assert images_of(audio="bird.wav", image=None, audio_weight=None) == mix(("audio", "bird.wav", 1.0))


def test_an_image_alone_stays_as_it_is_and_with_a_weight_it_is_a_mix():
    assert images_of(image="bird.jpg") == ("bird.jpg",)
    assert images_of(image="bird.jpg", audio=None, video="", point=[], depth=3, thermal=False) == ("bird.jpg",)
    assert images_of(image="bird.jpg", image_weight=0.5) == mix(("image", "bird.jpg", 0.5))


@pytest.mark.parametrize("keys", [{"audio": "a.wav"}, {"audio": "a.wav", "audio_weight": 2}, {"image": "i.png",
    "image_weight": 1}, {"image": "i.png", "point": "p.ply", "image_weight": 0.5}])  # fmt: skip
def test_the_keys_of_a_mix_are_read_as_the_same_mix(keys):
    (one,) = images_of(**keys)
    assert images_of(**one.item()) == (one,)


def test_the_other_formats_put_the_placeholder_themselves():
    caption = parse_record({"audio": "a.wav", "caption": "A bird."}, "here")
    assert caption.turns == (("human", "<image>"), ("gpt", "A bird."))
    alpaca = parse_record({"instruction": "Name it.", "output": "A bird.", "audio": "a.wav"}, "here")
    assert alpaca.turns[0] == ("human", "<image>\nName it.")
    assert caption.images == alpaca.images == mix(("audio", "a.wav"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"audio": "a.wav", "audio_weight": -1}, "'audio_weight' is int -1, expected a number of at least 0"),
        ({"audio": "a.wav", "audio_weight": math.nan}, "'audio_weight' is float nan"),
        ({"audio": "a.wav", "audio_weight": math.inf}, "'audio_weight' is float inf"),
        ({"audio": "a.wav", "audio_weight": 10**400}, "'audio_weight' is int 1000"),
        ({"audio": "a.wav", "audio_weight": "1"}, "'audio_weight' is str '1'"),
        ({"audio": "a.wav", "audio_weight": True}, "'audio_weight' is bool True"),
        ({"audio": "a.wav", "audio_weight": 0}, "the weights of all its media are 0"),
        ({"audio": "a.wav", "audio_weight": 0, "image": "i.png", "image_weight": 0}, "the weights of all its media"),
        ({"audio": "a.wav", "video_weight": 1}, "has 'video_weight' and no 'video'"),
        ({"audio": "a.wav", "image_weight": 1}, "has 'image_weight' and no 'image'"),
        (
            {"audio": ["a.wav", "b.wav"]},
            "'audio' is a list of 2, expected one path: all media of a record together are",
        ),
        ({"audio": "a.wav", "image": ["a.png", "b.png"]}, "'image' is a list of 2"),
        ({"image": ["a.png", "b.png"], "image_weight": 1}, "'image' is a list of 2"),
        ({"audio": {"bytes": b"RIFF", "path": None}}, "'audio' holds dict, expected the path of a file"),
        ({"audio": b"RIFF"}, "'audio' holds 4 bytes, expected the path of a file below the image folder"),
        ({"audio": "data:audio/wav;base64,AAAA"}, "'audio' holds a data URL"),
        ({"audio": "a.wav", "image": b"PNG"}, "'image' holds 3 bytes"),
        ({"point": [[1, 2, 3]]}, "'point' is a list of 1"),
        ({"videos": "a.mp4"}, "has a 'videos', which is not read: .* under 'video' and that of a sound under 'audio'"),
        ({"audio": "a.wav", "audios": "b.wav"}, "has a 'audios', which is not read"),
        ({"clip": "a.mp4"}, "has a 'clip', which is not read"),
    ],
)
def test_what_is_no_medium_is_refused_with_the_record(keys, words):
    with pytest.raises(DataError, match=words) as error:
        images_of(**keys)
    assert "record '7' (train.json[3])" in str(error.value)


@pytest.mark.parametrize("text", ["What is it?", "<image><image>"])
def test_all_media_have_one_placeholder(text):
    turns = [{"from": "human", "value": text}, TURNS[1]]
    count = text.count("<image>")
    with pytest.raises(DataError, match=f"{count} <image> placeholders .* its media .image, audio. together are one"):
        images_of(image="i.png", audio="a.wav", conversations=turns)


def test_media_in_a_turn_are_refused():
    turns = [TURNS[0] | {"point": "p.ply"}, TURNS[1]]
    with pytest.raises(DataError, match="a turn has the key 'point' with an image or other media"):
        images_of(conversations=turns, image="i.png")


def test_an_image_part_stands_for_the_media_and_may_not_name_an_image_of_its_own():
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A bird."}]
    assert images_of(conversations=turns, audio="a.wav") == mix(("audio", "a.wav"))
    turns[0]["content"] = [{"type": "image", "image": "i.png"}, parts[1]]
    with pytest.raises(DataError, match="image parts name their images, and 'image' or 'images' names others"):
        images_of(conversations=turns, audio="a.wav")


def test_kinds_are_bits():
    assert kind_bits(("a.png",)) == kind_bits(()) == 0
    assert kind_bits(images_of(audio="a.wav", image="i.png")) == 0b11
    assert kind_bits(images_of(imu="w.npy")) == 1 << 6


def test_a_weight_that_is_spelled_wrong_is_not_left_unread():
    with pytest.raises(DataError, match=r"record '7' .* has the key 'audio_wieght', .* did you mean 'audio_weight'\?"):
        images_of(audio="bird.wav", audio_wieght=0.5)
