"""`llava-lite check` as a user calls it: what it knows of the model, its messages, its exit code."""

import json

import pytest
from conftest import draw_image
from toy_media import write_imagebind, write_media

from llava_lite.commands.check import main, parse_flags


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An index directory of its own for every test."""
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path_factory.mktemp("index")))


def record(record_id, question="q", answer="a", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": record_id, "conversations": turns, **more}


@pytest.fixture
def check(tmp_path, toy_llm_dir, toy_tower_dir, capsys):
    """Return a function: records, flags -> (exit status, what was printed)."""
    directory = tmp_path / "images"
    directory.mkdir()
    for k, size in enumerate([(40, 40), (60, 30), (20, 90)]):
        draw_image(k).resize(size).save(directory / f"{k}.png")
    model = ["--model_name_or_path", str(toy_llm_dir("llama")), "--vision_tower", str(toy_tower_dir("clip"))]

    def run(records, *flags, model=model):
        path = tmp_path / "train.json"
        path.write_text(json.dumps(records))
        status = main(["--data_path", str(path), "--image_folder", str(directory), *model, *map(str, flags)])
        # Without a GPU DeepSpeed reports so where it is first imported.
        printed = capsys.readouterr().out.splitlines(keepends=True)
        return status, "".join(line for line in printed if "real_accelerator" not in line)

    return run


GOOD = [record("one", "<image>\nq", image="0.png"), record("two", "<image>q " * 2, image=["1.png", "2.png"]),
        record("conversation", "q", "so " * 50)]  # fmt: skip


def test_good_records_are_ready_with_their_lengths_sizes_and_turns(check, toy_llm_dir, toy_tower_dir):
    status, output = check([*GOOD, record("mute", "q", " ")])
    lines = output.splitlines()
    assert status == 0
    assert lines[0] == "an image is 16 tokens; template v1, at most 2,048 tokens"
    assert lines[1] == "4 records: 2 with images, 2 text only"
    assert lines[2] == "turns of a record, questions and answers: 2 (median), at most 2"
    # By their areas: 1600, 1800 and 1800.
    assert lines[3] == "3 images of 60 x 30 pixels (median), 40 x 40 to 20 x 90"
    assert "% of them supervised; a record has" in lines[4]
    assert "record 'conversation' (train.json[2])" in lines[4]
    assert (
        lines[5] == "1 answer without text, of which only the end token is supervised: record 'mute' (train.json[3])"
    )
    assert lines[-1] == "ready to train: all 4 records can be used."


def test_media_are_counted_for_imagebind_and_bad_records_for_another_tower(check, toy_llm_dir, tmp_path):
    write_media(tmp_path / "images")
    tower = write_imagebind(tmp_path / "imagebind", ["image", "audio"])
    own = ["--model_name_or_path", str(toy_llm_dir("llama")), "--vision_tower", tower]
    records = [
        record("sound", "<image>q", audio="bird.wav"),
        record("both", "<image>q", audio="bird.wav", image="0.png"),
    ]
    status, output = check(records, model=own)
    assert status == 0
    assert "an image is 1 tokens" in output
    assert "records whose media together are one image, by kind: 1 image, 2 audio" in output
    status, output = check(records)
    assert status == 1
    assert "2 of 2 records cannot be used (2 image)" in output
    assert (
        "record 'sound' (train.json[0]) has 'audio', which this model does not read: it reads images alone" in output
    )


def test_the_longest_record_and_the_percentiles_are_those_of_the_tokens(check, toy_tokenizer):
    from llava_lite.data.encode import RecordEncoder
    from llava_lite.data.records.record import parse_record

    records = [record(f"r{k}", "q", "so " * k) for k in range(1, 41)]
    encoder = RecordEncoder(toy_tokenizer, "v1")
    lengths = sorted(len(encoder(parse_record(item, "here"))[0]) for item in records)
    _, output = check(records)
    (line,) = [line for line in output.splitlines() if "supervised" in line]
    # The lower of the two in the middle, and of 40 the 38th.
    expected = f"a record has {lengths[19]} (p50), {lengths[37]} (p95), at most {lengths[-1]}: record 'r40'"
    assert expected in line
    assert line.startswith(f"{sum(lengths):,} tokens")


@pytest.mark.parametrize(("feature", "count"), [("patch", 16), ("cls_patch", 17)])
def test_features_of_an_image_are_those_of_the_named_tower(check, feature, count):
    _, output = check(GOOD[:1], "--mm_vision_select_feature", feature)
    assert f"an image is {count} tokens" in output


def test_features_of_an_image_are_those_of_the_checkpoint(check, toy_model, tmp_path, toy_tokenizer):
    model = toy_model(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad",
                      image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    status, output = check(GOOD, model=["--model_name_or_path", str(tmp_path / "model")])
    assert status == 0
    assert f"an image is up to {model.config.image_layout.most_tokens} (anyres) tokens" in output
    # 1 x 1 tiles or more: none of the three images is 16 tokens.
    _, square = check(GOOD, "--image_aspect_ratio", "square", model=["--model_name_or_path", str(tmp_path / "model")])
    tokens = [int(text.split(" tokens, ")[0].splitlines()[-1].replace(",", "")) for text in (output, square)]
    sizes = [(40, 40), (60, 30), (20, 90)]
    assert tokens[0] - tokens[1] == sum(model.config.image_layout.num_tokens(size) - 16 for size in sizes)


def test_images_without_a_tower_are_a_question_and_no_assumption(check, toy_llm_dir):
    model = ["--model_name_or_path", str(toy_llm_dir("llama"))]
    with pytest.raises(ValueError, match=r"2 records have images, and .* has no vision tower.*--vision_tower"):
        check(GOOD, model=model)
    status, output = check(GOOD, "--num_image_tokens", 16, model=model)
    assert status == 0
    assert "an image is 16 tokens" in output
    assert check(GOOD[2:], model=model)[0] == 0


BAD = [*GOOD, record("lost", "<image>\nq"), record("gone", "<image>\nq", image="9.png")]


def test_bad_records_are_named_and_the_verdict_says_what_to_do(check):
    status, output = check(BAD)
    assert status == 1
    assert "2 of 5 records cannot be used (1 image, 1 placeholder):" in output
    assert "no image in record 'lost' (train.json[3])" in output
    assert "record 'gone' (train.json[4]): cannot use the image" in output
    assert output.splitlines()[-1] == "not ready: 2 records must be mended, or left out with --bad_record skip."


def test_the_flags_that_messages_advise_are_taken(check, tmp_path):
    status, output = check(BAD, "--bad_record", "skip")
    assert status == 1
    assert "2 of 5 records (40.00%) cannot be used, and --bad_record skip leaves out at most 1.00%" in output
    status, output = check(
        BAD, "--bad_record", "skip", "--max_bad_fraction", 0.5, "--bad_records_file", tmp_path / "bad.jsonl"
    )
    assert status == 0
    assert output.splitlines()[-1] == "ready to train: 3 records; 2 left out (--bad_record skip)."
    assert [json.loads(line)["id"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == ["lost", "gone"]
    status, output = check(BAD[:4], "--placeholder_as_text", "True")
    assert status == 0
    assert (
        "1 record with an image placeholder and no image, used as plain text: record 'lost' (train.json[3])" in output
    )
    status, output = check(BAD[:4], "--placeholder_as_text")
    assert status == 0
    status, output = check([record("long", "<image>q", "so " * 3000, image="0.png")], "--model_max_length", 100)
    assert "1 record longer than --model_max_length, truncated in training" in output


def test_a_projector_without_an_image_is_not_ready(check):
    for flags in (["--tuning", "projector"], ["--tune_mm_mlp_adapter", "True"]):
        status, output = check(GOOD[2:], *flags)
        assert status == 1
        assert "none of 1 records has an image. --tuning projector trains" in output.splitlines()[-1]
        assert check(GOOD, *flags)[0] == 0


def test_the_flags_of_a_training_run_are_taken_as_they_are(check, tmp_path, capsys):
    flags = "--deepspeed zero2.json --learning_rate 2e-5 --bf16 True --output_dir out --mm_projector_lr 1e-5"
    flags += " --dataloader_num_workers 0 --image_aspect_ratio pad --gradient_checkpointing True --no_cuda True"
    assert check(GOOD, *flags.split())[0] == 0
    (tmp_path / "run.yaml").write_text("data: {data_path: [a.json], bad_record: skip}\nmodel_name_or_path: m\nlr: 3\n")
    with pytest.raises(SystemExit):
        parse_flags([str(tmp_path / "run.yaml")])
    assert "unknown flag --lr: write --learning_rate." in capsys.readouterr().err
    flags = parse_flags(["--data_path", "a.json", "b.json", "--model_name_or_path", "m", "--image_tower", "t"])
    assert (flags.data_path, flags.vision_tower) == (["a.json", "b.json"], "t")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data_path a.json", "--model_name_or_path is needed"),
        ("--model_name_or_path m", "--data_path is needed"),
        ("--data_path a.json --model_name_or_path m --image_folder nowhere", "--image_folder nowhere: there is no"),
    ],
)
def test_a_wrong_flag_is_reported_in_a_sentence(flags, words):
    with pytest.raises(ValueError, match=words):
        parse_flags(flags.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--bad_records skip", "unknown flag --bad_records: write --bad_record."),
        ("--epochs 3", "unknown flag --epochs: write --num_train_epochs."),
        ("--data x.json", "unknown flag --data: write --data_path."),
    ],
)
def test_an_unknown_flag_is_answered_with_the_one_that_is_meant(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_flags(["--data_path", "a.json", "--model_name_or_path", "m", *flags.split()])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_files_to_evaluate_on_are_checked_too(check, tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps([record("lost", "<image>\nq")]))
    status, output = check(GOOD, "--eval_data_path", path, "--tuning", "projector")
    assert status == 1
    assert output.splitlines()[-1] == "not ready: none of 1 record can be used."
    path.write_text(json.dumps(GOOD[2:]))
    status, output = check(GOOD, "--eval_data_path", path, "--tuning", "projector")
    assert (status, output.count("ready to train")) == (0, 2)


def test_words_that_the_run_adds_are_counted_as_one_token_each(check):
    def tokens(*flags):
        _, output = check([record("one", "where", "<loc_1> <loc_1> <loc_1>")], *flags)
        (line,) = [line for line in output.splitlines() if "supervised" in line]
        return int(line.split()[0])

    assert tokens() - tokens("--new_tokens", "<loc_1>") > 6
