"""Runs without the records or images that they need are refused before a model is loaded."""

import json

import pytest
from toy_shards import image_bytes, write_parquet

CONVERSATION = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ASK = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "stage", "words"),
    [
        ({"conversations": CONVERSATION}, "projector", "none of the first 5 records has an image. --tuning projector"),
        ({"conversations": ASK}, "full", "no image in record '0' .shard.parquet.0.."),
        ({"conversations": ASK, "img": image_bytes(1)}, "full", "the key 'img'"),
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


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"conversations": CONVERSATION}] * 3, "none of 3 records has an image"),
        (
            [{"conversations": CONVERSATION}, {"id": "r", "conversations": ASK}],
            "has an image; the first: 1 <image> .* 'r'",
        ),
        (
            [{"conversations": CONVERSATION}, {"id": "r", "img": "1.png", "conversations": ASK}],
            "has an image; .*key 'img'",
        ),
        ([{"id": "r", "image_path": "1.png", "conversations": ASK}] * 2, "can be used; .*key 'image_path'"),
    ],
)
def test_a_projector_without_an_image_is_refused_before_a_model_is_loaded(run_stage, tmp_path, records, words):
    path = tmp_path / "text.json"
    path.write_text(json.dumps(records))
    # A directory without a model would be the error if one was loaded first.
    flags = ("--data_path", path, "--model_name_or_path", tmp_path, "--bad_record", "skip", "--max_bad_fraction", 1)
    with pytest.raises(ValueError, match=f"text.json: none of {len(records)} records .*{words.split('records ')[-1]}"):
        run_stage("projector", tmp_path / "out", *flags)
