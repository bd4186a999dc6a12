"""A run's records, opened by its flags."""

import base64
import json

import pytest

from llava_lite.train.inputs.load import split

CONVERSATION = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ASK = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]


def test_split_must_leave_records_on_both_sides():
    with pytest.raises(ValueError, match="--eval_split 5 holds out 5 of 5 records"):
        split(range(5), 5, seed=0)


def test_records_of_which_none_is_left_are_refused_with_the_first(run_stage, tmp_path):
    path = tmp_path / "all_bad.json"
    path.write_text(json.dumps([{"id": "mute", "conversations": []}]))
    flags = ("--data_path", path, "--bad_record", "skip", "--max_bad_fraction", 1)
    with pytest.raises(ValueError, match=r"none of 1 records can be used; the first: .*mute.*'conversations' is"):
        run_stage("projector", tmp_path / "out", *flags)


def test_a_run_says_at_its_start_what_it_takes_for_text(run_stage, tmp_path, caplog):
    path = tmp_path / "text.json"
    path.write_text(json.dumps([{"id": f"r{k}", "conversations": ASK} for k in range(8)]))
    flags = ("--data_path", path, "--max_steps", 1)
    with pytest.raises(ValueError, match=r"8 of 8 records cannot be used \(8 placeholder\)"):
        run_stage("full", tmp_path / "out", *flags)
    with caplog.at_level("INFO", logger="llava_lite"):
        run_stage("full", tmp_path / "out", *flags, "--placeholder_as_text", "True")
    output = (
        "8 records with an image placeholder and no image, used as plain text: record 'r0' (text.json[0]), record "
    )
    assert output in caplog.text
    assert "and 3 more" in caplog.text


def test_messages_with_their_images_inside_train_as_llavas_records_do(run_stage, toy_data, tmp_path):
    path, directory = toy_data(tmp_path / "data", num_records=8, text_only_every=4)
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
        flags = ("--data_path", data, "--image_folder", directory, "--max_steps", 2)
        trainer = run_stage("full", tmp_path / f"out{k}", *flags)
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


def test_a_projector_whose_images_were_all_left_out_is_refused(run_stage, tmp_path):
    path = tmp_path / "lost.json"
    path.write_text(json.dumps([{"conversations": CONVERSATION}, {"image": "lost.png", "conversations": ASK}]))
    flags = ("--data_path", path, "--bad_record", "skip", "--max_bad_fraction", 1)
    with pytest.raises(ValueError, match="none of the 1 records that are left has one"):
        run_stage("projector", tmp_path / "out", *flags)
