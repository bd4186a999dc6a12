"""One record a question: the texts of LLaMA2-Accessory's tool, byte for byte, or with their lines kept."""

import json

import pytest

from llava_lite import cli
from llava_lite.data.errors import DataError
from llava_lite.data.index.annotations import open_annotations
from llava_lite.data.single_turn import single_turn

TALK = ["<image>\nWhat is\nit?", "一只猫。\n\nIt sleeps.", "Why?\n<image>", "So.", "And <image> then?"]
RECORDS = [
    {"id": "7", "image": "1.jpg", "conversations": [{"from": "human\n", "value": text, "n": 3} for text in TALK]},
    {"id": "8", "conversations": [{"from": "human", "value": "Q"}], "more": [1]},
    {"id": "9", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
]


def as_the_original(records):
    """The rule of the tool: turns 2i and 2i + 1, without `<image>` and then without line breaks."""
    pairs = []
    for record in records:
        for i in range(len(record["conversations"]) // 2):
            turns = [
                {k: v.replace("<image>", "").replace("\n", "") if isinstance(v, str) else v for k, v in turn.items()}
                for turn in record["conversations"][2 * i : 2 * i + 2]
            ]
            pairs.append({**record, "conversations": turns})
    return pairs


def test_dropped_newlines_are_the_originals_file_byte_for_byte(tmp_path, capsys):
    (tmp_path / "in.json").write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    assert cli.main(["single-turn", str(tmp_path / "in.json"), str(tmp_path / "out.json"), "--newlines", "drop"]) == 0
    assert (tmp_path / "out.json").read_bytes() == json.dumps(as_the_original(RECORDS)).encode()
    assert "wrote 3 records of one question, out of 3, to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("newlines", "question", "answer"),
    [
        ("keep", "What is\nit?", "一只猫。\n\nIt sleeps."),
        ("space", "What is it?", "一只猫。  It sleeps."),
        ("drop", "What isit?", "一只猫。It sleeps."),
    ],
)
def test_newlines_stay_or_become_spaces_or_are_dropped(newlines, question, answer):
    pairs = single_turn(RECORDS, newlines)
    assert [turn["value"] for turn in pairs[0]["conversations"]] == [question, answer]
    assert [turn["value"] for turn in pairs[1]["conversations"]] == ["Why?", "So."]
    assert [(pair["id"], pair.get("image")) for pair in pairs] == [("7", "1.jpg"), ("7", "1.jpg"), ("9", None)]
    assert RECORDS[0]["conversations"][0]["value"] == TALK[0]


def test_the_result_is_read_by_the_recipe_that_puts_the_image_before_the_question(tmp_path):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(TALK)]
    records = [RECORDS[0] | {"conversations": turns}, *RECORDS[1:]]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    out = tmp_path / "out.jsonl"
    assert cli.main(["single-turn", str(tmp_path / "in.jsonl"), str(out)]) == 0
    (tmp_path / "data.yaml").write_text("META: [{path: out.jsonl, type: image_text, preprocess: single_turn_llava}]")
    annotations = open_annotations(str(tmp_path / "data.yaml"))
    assert annotations[1].turns == (("human", "<image>\nWhy?"), ("gpt", "So."))
    assert annotations[2].turns == (("human", "Q"), ("gpt", "A"))


def test_what_has_no_conversation_is_refused_with_its_position(tmp_path, capsys):
    with pytest.raises(DataError, match="record 1: 'conversations' is NoneType None, expected a list of turns"):
        single_turn([RECORDS[2], {"id": "x"}])
    with pytest.raises(DataError, match="record 0: 'conversations' is int 7"):
        single_turn([7])
    with pytest.raises(ValueError, match="unknown newlines 'glue'; known: keep, space, drop"):
        single_turn(RECORDS, "glue")
    (tmp_path / "in.json").write_text("{}")
    assert cli.main(["single-turn", str(tmp_path / "in.json"), str(tmp_path / "out.json")]) == 1
    assert "in.json holds dict, expected a list of records" in capsys.readouterr().err
    (tmp_path / "out.json").write_text("mine")
    assert cli.main(["single-turn", str(tmp_path / "in.json"), str(tmp_path / "out.json")]) == 1
    assert "out.json exists already" in capsys.readouterr().err
