"""What a person sees when a run cannot begin."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_lite.data.errors import DataError
from llava_lite.train.arguments.fields import TrainingArguments
from llava_lite.train.deepspeed.offload import check_nvme
from llava_lite.train.inputs.check import check_images_exist
from llava_lite.train.startup import check_optimizer, errors_in_one_line, launch_hint, use_one_device
from llava_lite.train.train import main


def test_wrong_directory_is_one_line_and_no_traceback(stage_flags, tmp_path, capfd):
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
    assert "Give one of zero2, zero3, " in line


def test_a_rank_says_which_it_is(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit), errors_in_one_line():
        raise ValueError("no.")
    assert capfd.readouterr().err == "llava-lite train (rank 3): no.\n"


def test_a_file_is_named_and_not_only_its_number(tmp_path, capfd):
    with pytest.raises(SystemExit), errors_in_one_line():
        (tmp_path / "gone.json").read_text()
    assert capfd.readouterr().err == f"llava-lite train: '{tmp_path}/gone.json': No such file or directory.\n"


def test_the_place_is_shown_on_demand_and_other_errors_always(monkeypatch):
    with pytest.raises(KeyError), errors_in_one_line():
        raise KeyError("a bug")
    monkeypatch.setenv("LLAVA_LITE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no"), errors_in_one_line():
        raise ValueError("no.")


@pytest.fixture
def refused(stage_flags, unloadable, tmp_path, capfd):
    """Start a run that must end before a model is loaded; return the line that it ends with."""

    def start(*flags):
        with pytest.raises(SystemExit):
            main(stage_flags("projector", tmp_path / "out", "--model_name_or_path", unloadable, *flags))
        shown = capfd.readouterr().err
        assert "Traceback" not in shown
        return shown.splitlines()[-1]

    return start


@pytest.mark.parametrize(
    ("flags", "output"),
    [
        (["--data_path", "gone.json"], "--data_path gone.json: no such file"),
        (["--eval_data_path", "gone.json"], "--eval_data_path gone.json: no such file"),
        (["--data_path", "gone.tar", "--max_steps", "1"], "gone.tar: 0 of 1 shards are there"),
        (["--feature_cache", "True"], "--feature_cache True: give a directory for the features, auto or off."),
        (["--feature_cache", "Auto"], "--feature_cache Auto: give a directory for the features, auto or off."),
        (["--feature_cache", f"{__file__}/features"], "test_startup.py is no directory; name a directory"),
        # Optimizers of packages that are not installed here; transformers reports some with one kind of error, some
        # with another.
        (["--optim", "adamw_torch_4bit"], "--optim adamw_torch_4bit: You need to have `torchao>=0.4.0`"),
        (["--optim", "schedule_free_adamw"], "--optim schedule_free_adamw: You need to install `schedulefree`"),
        (["--optim", "lomo"], "--optim lomo: You need to install `lomo_optim`"),
        (["--optim", "stable_adamw"], "--optim stable_adamw: You need to install `torch-optimi`"),
        (["--optim", "grokadamw"], "--optim grokadamw: Please install grokadamw"),
        (["--optim", "adamw_anyprecision"], "--optim adamw_anyprecision: Please install https://github.com"),
        (["--optim", "adamw_torch_npu_fused"], "--optim adamw_torch_npu_fused: Trainer failed to import FusedAdamW"),
    ],
)
def test_what_is_not_there_is_missed_before_a_model_is_loaded(refused, flags, output):
    assert output in refused(*flags)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_an_optimizer_of_torch_is_not_refused(optim):
    check_optimizer(TrainingArguments(output_dir="out", use_cpu=True, report_to="none", optim=optim))


def test_an_optimizer_that_is_made_for_a_model_is_not_refused_before_there_is_one(monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: True)
    check_optimizer(TrainingArguments(output_dir="out", use_cpu=True, report_to="none", optim="lomo"))


@pytest.mark.parametrize(
    "optim",
    [
        "galore_adamw",
        "galore_adafactor",
        "galore_adamw_layerwise",
        "apollo_adamw",
        "apollo_adamw_layerwise",
        "adalomo",
    ],
)
def test_an_optimizer_that_no_checkpoint_holds_is_refused(optim):
    flags = {"optim": optim, "optim_target_modules": "all-linear", "report_to": "none", "use_cpu": True}
    with pytest.raises(ValueError, match=rf"^--optim {optim}: no checkpoint can hold its state"):
        check_optimizer(TrainingArguments(output_dir="out", **flags))


def test_a_schedule_free_optimizer_under_deepspeed_is_refused():
    plugin = SimpleNamespace(deepspeed_config={})
    with pytest.raises(ValueError, match=r"^--optim schedule_free_adamw: under DeepSpeed nothing sets the averaged"):
        check_optimizer(SimpleNamespace(uses_deepspeed=True, deepspeed_plugin=plugin, optim="schedule_free_adamw"))


def test_an_optimizer_of_the_deepspeed_json_needs_no_package_of_the_flag():
    plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}})
    check_optimizer(SimpleNamespace(uses_deepspeed=True, deepspeed_plugin=plugin, optim="adamw_torch_4bit"))


def test_a_link_to_nowhere_is_no_directory_for_features(refused, tmp_path):
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    assert "link is no directory" in refused("--feature_cache", str(tmp_path / "link"))


def test_shards_are_looked_for_once_a_node_and_not_at_addresses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data_args = SimpleNamespace(data_path=["a.tar", "hf://datasets/user/name"], eval_data_path=None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match=r"a\.tar"):
        check_images_exist(data_args)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_images_exist(data_args)
    monkeypatch.setenv("LOCAL_RANK", "0")
    (tmp_path / "a.tar").touch()
    check_images_exist(data_args)


def test_an_accelerator_that_cannot_build_asynchronous_io_is_refused(tmp_path, monkeypatch):
    import deepspeed.accelerator as ours

    known = SimpleNamespace(device_name=lambda: "mps", create_op_builder=lambda name: None)
    monkeypatch.setattr(ours, "get_accelerator", lambda: known)
    part = {"device": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(ValueError, match="install libaio"):
        check_nvme({"zero_optimization": {"offload_param": part}})


def set_launchers_variables(monkeypatch):
    """Start as a launcher would; what stands in for one would outlive the test."""
    one = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in one.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell what processes do")
def test_the_lock_of_a_killed_build_ends_a_run_with_deepspeed_before_a_model_is_loaded(refused, tmp_path, monkeypatch):
    set_launchers_variables(monkeypatch)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    line = refused("--deepspeed", "zero2.json")
    assert line.startswith(f"llava-lite train: {lock} is ")
    assert line.endswith("Remove the file and start again.")


def test_a_disk_for_deepspeed_that_is_not_there_is_missed_before_a_model_is_loaded(refused, tmp_path, monkeypatch):
    set_launchers_variables(monkeypatch)
    config = json.loads(Path("scripts/zero3_offload_nvme.json").read_text())
    for part in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][part]["nvme_path"] = str(tmp_path / "disk")
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps(config))
    flags = ["--deepspeed", str(file), "--bf16", "False"]
    assert f"nvme_path {tmp_path}/disk, which is no directory that can be written" in refused(*flags)
    (tmp_path / "disk").mkdir()
    assert "install libaio" in refused(*flags)


def test_a_checkpoint_of_another_run_is_refused_in_a_line(stage_flags, tmp_path, capfd, monkeypatch, caplog):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"]
    main(stage_flags("projector", tmp_path / "out", *flags))
    main(stage_flags("projector", tmp_path / "out", *flags, "--learning_rate", "0.5", "--max_steps", "2"))
    assert caplog.text.count("is resumed with another schedule: max_steps was 1, is 2; learning_rate") == 1
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main(stage_flags("projector", tmp_path / "out", *flags, "--seed", "7", "--feature_cache", "auto"))
    shown = capfd.readouterr().err
    assert "Traceback" not in shown
    assert "cannot be resumed exactly: seed was" in shown.splitlines()[-1]
    assert not list((tmp_path / "cache").glob("features/*"))


# The hint that names the command for all devices.

FLAGS = ["--output_dir", "my run", "--bf16", "True"]


def command_of(hint):
    return hint.splitlines()[-1].strip()


def test_hint_names_a_config_that_comes_with_the_package():
    hint = launch_hint(FLAGS, 8)
    assert hint.startswith("this process trains on 1 of 8 devices.")
    assert command_of(hint) == (
        "deepspeed --module llava_lite.train.train --deepspeed zero2 --output_dir 'my run' --bf16 True"
    )


@pytest.mark.parametrize(
    "argv", [["run.yaml", "--seed", "1"], ["--deepspeed=z.json"], ["--seed", "1", "--deepspeed", "z"]]
)
def test_flags_with_a_config_of_their_own_are_kept(argv):
    assert command_of(launch_hint(argv, 2)) == f"deepspeed --module llava_lite.train.train {' '.join(argv)}"


def test_hint_comes_only_where_devices_would_stay_idle(caplog):
    for n_gpu, times in ((0, 0), (1, 0), (8, 1)):
        caplog.clear()
        args = SimpleNamespace(n_gpu=n_gpu, _n_gpu=n_gpu)
        use_one_device(FLAGS, args)
        assert caplog.text.count("of 8 devices") == times
        assert args._n_gpu == min(n_gpu, 1)
