"""What a person sees when a run cannot begin."""

import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_lite.train.load_data import refuse_missing
from llava_lite.train.offload import OLD_LOCK_S, refuse_unusable_nvme, warn_of_old_locks
from llava_lite.train.refusal import told_in_a_line
from llava_lite.train.train import main


def test_wrong_folder_is_one_line_and_no_traceback(stage_flags, tmp_path, capfd):
    flags = stage_flags("full", tmp_path / "out", "--model_name_or_path", "./no/such/model")
    with pytest.raises(SystemExit) as end:
        main(flags)
    shown = capfd.readouterr().err
    assert end.value.code == 1
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if "no such directory" in line]
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


def test_a_lock_that_a_killed_build_left_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / name / "lock" for name in ("cpu_adam", "py311_cpu/shm", "fresh")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    for lock in locks[:2]:
        os.utime(lock, (time.time() - 2 * OLD_LOCK_S,) * 2)
    with caplog.at_level(logging.WARNING, logger="llava_lite.train.offload"):
        warn_of_old_locks()
    assert len(caplog.records) == 2
    assert all(str(lock) in caplog.text for lock in locks[:2])
    assert "20 minutes old" in caplog.text


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


@pytest.fixture
def refused(stage_flags, tmp_path, capfd, monkeypatch):
    """Start a run that must end before a model is loaded; return the line that it ends with."""
    monkeypatch.setattr("llava_lite.train.train.build_model", lambda *args: pytest.fail("a model was loaded"))

    def start(*flags):
        with pytest.raises(SystemExit):
            main(stage_flags("projector", tmp_path / "out", *flags))
        shown = capfd.readouterr().err
        assert "Traceback" not in shown
        return shown.splitlines()[-1]

    return start


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data_path", "gone.json"], "--data_path gone.json: no such file"),
        (["--eval_data_path", "gone.json"], "--eval_data_path gone.json: no such file"),
        (["--data_path", "gone.tar", "--max_steps", "1"], "gone.tar: 0 of 1 shards are there"),
        (["--feature_cache", "True"], "--feature_cache True: give a folder for the features, auto or off."),
        (["--feature_cache", "Auto"], "--feature_cache Auto: give a folder for the features, auto or off."),
        (["--feature_cache", f"{__file__}/features"], "test_refusal.py is no folder; name a folder"),
    ],
)
def test_what_is_not_there_is_missed_before_a_model_is_loaded(refused, flags, said):
    assert said in refused(*flags)


def test_a_link_to_nowhere_is_no_folder_for_features(refused, tmp_path):
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    assert "link is no folder" in refused("--feature_cache", str(tmp_path / "link"))


def test_shards_are_looked_for_once_a_node_and_not_at_addresses(monkeypatch):
    looked = []
    monkeypatch.setattr("llava_lite.data.shards.find_shards", looked.append)
    data_args = SimpleNamespace(data_path=["a.tar", "hf://datasets/user/name"], eval_data_path=None)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        refuse_missing(data_args)
    assert looked == [["a.tar"]]


def test_an_accelerator_that_cannot_build_asynchronous_io_is_refused(tmp_path, monkeypatch):
    import deepspeed.accelerator as ours

    known = SimpleNamespace(device_name=lambda: "mps", create_op_builder=lambda name: None)
    monkeypatch.setattr(ours, "get_accelerator", lambda: known)
    part = {"device": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(ValueError, match="install libaio"):
        refuse_unusable_nvme({"zero_optimization": {"offload_param": part}})


def test_a_disk_for_deepspeed_that_is_not_there_is_missed_before_a_model_is_loaded(refused, tmp_path, monkeypatch):
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        # As a launcher would; what stands in for one would outlive the test.
        monkeypatch.setenv(name, str(value))
    config = json.loads(Path("scripts/zero3_offload_nvme.json").read_text())
    for part in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][part]["nvme_path"] = str(tmp_path / "disk")
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(config))
    flags = ["--deepspeed", str(file), "--bf16", "False"]
    assert f"nvme_path {tmp_path}/disk, which is no folder that can be written" in refused(*flags)
    (tmp_path / "disk").mkdir()
    assert "install libaio" in refused(*flags)


def test_a_checkpoint_of_another_run_is_refused_in_a_line(stage_flags, tmp_path, capfd, monkeypatch, caplog):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"]
    main(stage_flags("projector", tmp_path / "out", *flags))
    main(stage_flags("projector", tmp_path / "out", *flags, "--learning_rate", "0.5", "--max_steps", "2"))
    assert caplog.text.count("goes on otherwise than it began: max_steps was 1, is 2; learning_rate") == 1
    monkeypatch.setattr("llava_lite.train.features.use_features", lambda *args: pytest.fail("features were made"))
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(stage_flags("projector", tmp_path / "out", *flags, "--seed", "7", "--feature_cache", "auto"))
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    assert "cannot be resumed exactly: seed was" in shown.splitlines()[-1]
