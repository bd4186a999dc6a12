"""Records from every form that public annotation files have, and clear words for what is none."""

import math

import pytest

from llava_lite.data.errors import DataError
from llava_lite.data.index.sources import open_sources, sample_positions
from llava_lite.data.records.record import parse_record

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A dog."}


def item(**changes):
    return {"id": "7", "image": "coco/7.jpg", "conversations": [ASK, ANSWER]} | changes


def test_a_record_is_read_as_written():
    record = parse_record(item(), "train.json[3]", "images")
    assert record == (
        "7",
        ("coco/7.jpg",),
        (("human", "<image>\nWhat is it?"), ("gpt", "A dog.")),
        "train.json[3]",
        "images",
        None,
        frozenset(),
        None,
    )
    assert record.name == "record '7' (train.json[3])"


@pytest.mark.parametrize(("value", "expected"), [(7, "7"), (7.0, "7"), (7.5, "7.5"), ("a", "a"), (None, "here")])
def test_ids_may_be_numbers_or_absent(value, expected):
    assert parse_record(item(id=value), "here").id == expected


def test_images_may_be_a_list():
    turns = [{"from": "human", "value": "<image> or <image>?"}, ANSWER]
    assert parse_record(item(image=["a.jpg", "b.jpg"], conversations=turns), "here").images == ("a.jpg", "b.jpg")


@pytest.mark.parametrize("changes", [{"image": None}, {"image": []}])
def test_a_placeholder_without_images_is_text(changes):
    record = parse_record(item(**changes), "here")
    assert record.images == ()
    assert record.turns[0] == ("human", "<image>\nWhat is it?")


def test_a_first_turn_from_gpt_is_dropped():
    record = parse_record(item(conversations=[{"from": "gpt", "value": "Hello!"}, ASK, ANSWER]), "here")
    assert [role for role, _ in record.turns] == ["human", "gpt"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (7.0, "7"), (7.5, "7.5"), (-1e300, str(int(-1e300))), (10**400, "1" + "0" * 400), (None, "here")],
)
def test_an_id_is_a_text_or_any_number(value, text):
    assert parse_record(item(id=value), "here").id == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": ["a.jpg", "b.jpg"]}, "1 <image> placeholders in the conversation but 2 images in record '7'"),
        ({"conversations": [{**ASK, "value": "<image><image>"}, ANSWER]}, "2 <image> placeholders .* but 1 images"),
        ({"conversations": [{**ASK, "value": "no placeholder"}, ANSWER]}, "0 <image> placeholders .* but 1 images"),
        ({"image": math.nan}, "'image' holds float nan"),
        ({"image": [7]}, "'image' holds int 7"),
        ({"image": ""}, "'image' holds str ''"),
        ({"videos": "a.mp4"}, "has a 'videos', which is not read"),
        ({"id": math.nan}, "'id' is float nan"),
        ({"id": ["7"]}, "'id' is list"),
        ({"id": True}, "'id' is bool True"),
        ({"conversations": []}, "expected a list of turns"),
        ({"conversations": "hello"}, "'conversations' is str 'hello'"),
        ({"conversations": ["hello"]}, "a turn is str 'hello'"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator', expected 'human' or 'gpt'"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "expected 'human' or 'gpt'"),
        ({"conversations": [{"from": "human"}]}, "the 'value' of a turn is NoneType"),
        ({"conversations": [{**ASK, "value": "\ud83d"}, ANSWER]}, "half of a surrogate pair"),
        ({"conversations": [ASK, ASK]}, "turn 2 of . is from 'human', expected 'gpt'"),
        ({"conversations": [ANSWER, ANSWER]}, "turn 1 of . is from 'gpt', expected 'human'"),
        ({"conversations": [ANSWER]}, "no turn remains"),
    ],
)
def test_what_is_no_record_is_refused_with_its_place(changes, words):
    with pytest.raises(DataError, match=words) as error:
        parse_record(item(**changes), "train.json[3]")
    assert "train.json[3]" in str(error.value)


@pytest.mark.parametrize("item", [7, [], "text", None])
def test_json_that_is_no_object_is_refused(item):
    with pytest.raises(DataError, match="expected an object with 'conversations'"):
        parse_record(item, "here")


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("all", range(10)),
        ("first:3", range(3)),
        ("end:3", range(7, 10)),
        ("first:25%", range(3)),  # 2.5 rounded up
        ("end: 12.5%", range(8, 10)),
        ("first:99", range(10)),
        ("random:99", range(10)),
        ("random:100%", range(10)),
        ("first:" + "9" * 400, range(10)),
        ("end:" + "9" * 400 + "%", range(10)),
        ("random:" + "9" * 5000, range(10)),
    ],
)
def test_sampling_keeps_what_its_name_says(sampling, expected):
    assert sample_positions(sampling, 10).tolist() == list(expected)


def test_random_sampling_depends_on_the_seed_alone():
    first = sample_positions("random:40", 1000, seed=1).tolist()
    assert first == sample_positions("random:40", 1000, seed=1).tolist()
    assert first != sample_positions("random:40", 1000, seed=2).tolist()
    assert len(set(first)) == 40
    assert first == sorted(first)


@pytest.mark.parametrize("sampling", ["half", "first", "first:0", "random:-3", "first:2.5", "first:x", "all:3"])
def test_unknown_sampling_is_refused(sampling):
    with pytest.raises(DataError, match="known: all, first:N"):
        sample_positions(sampling, 10)


def test_a_mixture_names_files_beside_itself_with_directory_and_sampling(tmp_path):
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).write_text("[]")
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "datasets:\n  - {json_path: a.json, sampling_strategy: 'random:10%', image_folder: images}\n"
        "  - json_path: b.jsonl\n"
    )
    sources = open_sources([str(mixture), str(tmp_path / "a.json")], "images")
    assert [(s.path, s.kind, s.image_folder, s.sampling) for s in sources] == [
        (str(tmp_path / "a.json"), "json", "images", "random:10%"),
        (str(tmp_path / "b.jsonl"), "jsonl", "images", "all"),
        (str(tmp_path / "a.json"), "json", "images", "all"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("datasets: [{json_path: a.json, weight: 3}]", "expected the keys json_path, sampling_strategy, image_folder"),
        ("datasets: [{json_path: a.json, sampling_strategy: half}]", "unknown sampling_strategy 'half'"),
        ("datasets: [a.json]", "entry 'a.json'"),
        ("- a.json", "expected a list `datasets`"),
        ("datasets: [", "is not YAML"),
        ("datasets: [{json_path: missing.json}]", "no such annotation file"),
    ],
)
def test_a_wrong_mixture_is_refused(tmp_path, text, words):
    (tmp_path / "a.json").write_text("[]")
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(text)
    with pytest.raises(DataError, match=words):
        open_sources(str(mixture))


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match="unknown format 'txt'; known: json, jsonl, csv, tsv, yaml, yml, tar, parquet"):
        open_sources("captions.txt")
    with pytest.raises(DataError, match="no annotation file given"):
        open_sources([])
