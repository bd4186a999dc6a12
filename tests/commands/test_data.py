"""`llava-lite data convert` as a user calls it, and that its result trains."""

import json

import pytest
from conftest import draw_image

from llava_lite import cli
from llava_lite.commands.data import build_parser


@pytest.fixture
def captions(tmp_path):
    """A file of captions in COCO's format, one image of three without a caption, and the directory of its images."""
    directory = tmp_path / "train2017"
    directory.mkdir()
    for k in range(3):
        draw_image(k).save(directory / f"{k:012d}.jpg")
    images = [{"id": k, "file_name": f"{k:012d}.jpg"} for k in range(3)]
    notes = [{"image_id": k, "caption": f"a square {k} {n}"} for k in range(2) for n in range(5)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return tmp_path / "captions.json", directory


def test_it_ends_with_what_was_written_what_was_left_out_and_the_next_command(captions, tmp_path, capsys):
    source, directory = map(str, captions)
    out = str(tmp_path / "coco.json")
    flags = ["data", "convert", source, out, "--image_folder", directory]
    assert cli.main(flags) == 1
    output = capsys.readouterr().out.splitlines()
    assert output[:2] == [f"wrote 0 records, 0 with images, to {out}", "left out 3:"]
    assert "5 different captions" in output[2]
    assert output[-1] == f"nothing was written to {out}"
    assert cli.main([*flags, "--answers", "first"]) == 1
    output = capsys.readouterr().out.splitlines()
    assert output == [
        f"wrote 2 records, 2 with images, to {out}",
        "8 captions not used (--answers first)",
        "left out 1:",
        "  1 x image 2 (captions.json[2]) has no caption.",
        f"next: llava-lite check --data_path {out} --image_folder {directory} --model_name_or_path MODEL "
        "--vision_tower TOWER",
        "exit status 1, since records were left out; --bad_record skip accepts that",
    ]
    assert cli.main([*flags, "--answers", "first"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["data", "convert", source, f"{out}l", "--answers", "all", "--bad_record", "skip"]) == 0
    assert "--image_folder DIR" in capsys.readouterr().out


def test_what_it_writes_is_checked_and_trained_on(captions, tmp_path, monkeypatch, capsys, toy_llm_dir, toy_tower_dir):
    from llava_lite.train.train import train

    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "cache"))
    source, directory = map(str, captions)
    out = str(tmp_path / "coco.json")
    flags = ["--answers", "all", "--image_folder", directory, "--bad_record", "skip"]
    assert cli.main(["data", "convert", source, out, *flags]) == 0
    model = ["--model_name_or_path", str(toy_llm_dir("llama")), "--vision_tower", str(toy_tower_dir("clip"))]
    data = ["--data_path", out, "--image_folder", directory, "--version", "plain", "--tuning", "projector"]
    assert cli.main(["check", *data, *model]) == 0
    assert "ready to train: all 10 records can be used." in capsys.readouterr().out
    run = "--use_cpu True --max_steps 1 --save_strategy no --disable_tqdm True --report_to none"
    trainer = train([*data, *model, *run.split(), "--output_dir", str(tmp_path / "run")])
    assert trainer.state.global_step == 1
    assert len(trainer.train_dataset) == 10


def test_the_help_names_the_formats_and_shows_commands(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["convert", "--help"])
    output = capsys.readouterr().out
    for words in ("LLaMA-Factory", "COCO captions", "VQAv2", "--answers {all,first,majority}", "examples:"):
        assert words in output
