"""A run's records, opened as its flags say."""

import base64
import json

import pytest
from toy_shards import picture_bytes, write_parquet

from llava_lite.train.load_data import split

TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ASK = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]


def test_split_must_leave_records_on_both_sides():
    with pytest.raises(ValueError, match="--eval_split 5 holds out 5 of 5 records"):
        split(range(5), 5, seed=0)


def test_records_of_which_none_is_left_are_refused_with_the_first(run_stage, tmp_path):
    path = tmp_path / "all_bad.json"
    path.write_text(json.dumps([{"id": "mute", "conversations": []}]))
    flags = ("--data_path", path, "--bad_record", "skip", "--max_bad_share", 1)
    with pytest.raises(ValueError, match=r"none of 1 records can be used; the first: .*mute.*'conversations' is"):
        run_stage("projector", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"conversations": TALK}] * 3, "none of 3 records has an image"),
        ([{"conversations": TALK}, {"id": "r", "conversations": ASK}], "has an image; the first: 1 <image> .* 'r'"),
        ([{"conversations": TALK}, {"id": "r", "img": "1.png", "conversations": ASK}], "has an image; .*key 'img'"),
        ([{"id": "r", "image_path": "1.png", "conversations": ASK}] * 2, "can be used; .*key 'image_path'"),
    ],
)
def test_a_projector_without_an_image_is_refused_before_a_model_is_loaded(run_stage, tmp_path, records, words):
    path = tmp_path / "text.json"
    path.write_text(json.dumps(records))
    # A directory without a model would be the error if one was loaded first.
    flags = ("--data_path", path, "--model_name_or_path", tmp_path, "--bad_record", "skip", "--max_bad_share", 1)
    with pytest.raises(ValueError, match=f"text.json: none of {len(records)} records .*{words.split('records ')[-1]}"):
        run_stage("projector", tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("row", "stage", "words"),
    [
        ({"conversations": TALK}, "projector", "none of the first 5 records has an image. --tuning projector"),
        ({"conversations": ASK}, "full", "no image in record '0' .shard.parquet.0.."),
        ({"conversations": ASK, "img": picture_bytes(1)}, "full", "the key 'img'"),
        ({"question": "q", "answer": "a"}, "full", "shard.parquet is of the format 'question and answer'"),
    ],
)
def test_shards_whose_images_nobody_would_see_are_refused_before_a_model_is_loaded(
    run_stage, tmp_path, row, stage, words
):
    path = write_parquet(tmp_path / "shard.parquet", [row] * 5)
    flags = ("--data_path", path, "--max_steps", 1, "--model_name_or_path", tmp_path)
    with pytest.raises(ValueError, match=words):
        run_stage(stage, tmp_path / "out", *flags)


def test_a_run_says_at_its_start_what_it_takes_for_text(run_stage, tmp_path, caplog):
    path = tmp_path / "text.json"
    path.write_text(json.dumps([{"id": f"r{k}", "conversations": ASK} for k in range(8)]))
    flags = ("--data_path", path, "--max_steps", 1)
    with pytest.raises(ValueError, match=r"8 of 8 records cannot be used \(8 placeholder\)"):
        run_stage("full", tmp_path / "out", *flags)
    with caplog.at_level("INFO", logger="llava_lite"):
        run_stage("full", tmp_path / "out", *flags, "--placeholder_as_text", "True")
    said = "8 records with an image mark and no image, taken as plain text: record 'r0' (text.json[0]), record 'r1'"
    assert said in caplog.text
    assert "and 3 more" in caplog.text


def test_messages_with_their_images_inside_train_as_llavas_records_do(run_stage, toy_data, tmp_path):
    path, folder = toy_data(tmp_path / "data", num_records=8, text_only_every=4)
    with open(path) as file:
        records = json.load(file)
    messages = []
    for record in records:
        names = {"human": "user", "gpt": "assistant"}
        turns = [{"role": names[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        if "image" in record:
            data = base64.b64encode((tmp_path / "data" / "images" / record["image"]).read_bytes()).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
            turns[0]["content"] = [part, {"type": "text", "text": turns[0]["content"].removeprefix("<image>\n")}]
        messages.append({"id": record["id"], "messages": turns})
    (tmp_path / "messages.jsonl").write_text("\n".join(map(json.dumps, messages)))
    logs = []
    for k, data in enumerate((path, tmp_path / "messages.jsonl")):
        flags = ("--data_path", data, "--image_folder", folder, "--max_steps", 2)
        trainer = run_stage("full", tmp_path / f"out{k}", *flags)
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


def test_a_projector_whose_images_were_all_left_out_is_refused(run_stage, tmp_path):
    path = tmp_path / "lost.json"
    path.write_text(json.dumps([{"conversations": TALK}, {"image": "lost.png", "conversations": ASK}]))
    flags = ("--data_path", path, "--bad_record", "skip", "--max_bad_share", 1)
    with pytest.raises(ValueError, match="none of the 1 records that are left has one"):
        run_stage("projector", tmp_path / "out", *flags)
