"""What a person sees when a run cannot begin."""

import pytest

from llava_lite.train.refusal import told_in_a_line
from llava_lite.train.train import main


def test_wrong_folder_is_one_line_and_no_traceback(stage_flags, tmp_path, capfd):
    flags = stage_flags("full", tmp_path / "out", "--model_name_or_path", "./no/such/model")
    with pytest.raises(SystemExit) as end:
        main(flags)
    shown = capfd.readouterr().err
    assert end.value.code == 1
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if "no such folder" in line]
    assert line.startswith("llava-lite train: --model_name_or_path './no/such/model'")


def test_checkpoint_that_is_not_there_is_refused_before_the_run(stage_flags, tmp_path, capfd):
    flags = stage_flags("projector", tmp_path / "out", "--resume_from_checkpoint", str(tmp_path / "checkpoint-7"))
    with pytest.raises(SystemExit):
        main(flags)
    assert "checkpoint-7" in capfd.readouterr().err.splitlines()[-1]


def test_missing_deepspeed_config_is_named_with_what_to_do(stage_flags, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main(stage_flags("projector", tmp_path / "out", "--deepspeed", "nofile.json", "--bf16", "True"))
    line = capfd.readouterr().err.splitlines()[-1]
    assert "--deepspeed nofile.json: there is no such file" in line
    assert "zero2.json" in line


def test_a_rank_says_which_it_is(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit), told_in_a_line():
        raise ValueError("no.")
    assert capfd.readouterr().err == "llava-lite train (rank 3): no.\n"


def test_a_file_is_named_and_not_only_its_number(tmp_path, capfd):
    with pytest.raises(SystemExit), told_in_a_line():
        (tmp_path / "gone.json").read_text()
    assert capfd.readouterr().err == f"llava-lite train: '{tmp_path}/gone.json': No such file or directory.\n"


def test_the_place_is_shown_on_demand_and_other_errors_always(monkeypatch):
    with pytest.raises(KeyError), told_in_a_line():
        raise KeyError("a bug")
    monkeypatch.setenv("LLAVA_LITE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no"), told_in_a_line():
        raise ValueError("no.")
