"""--deepspeed takes the name of a config of the package, and answers a wrong value with the names that it knows."""

import logging

import pytest

from llava_lite.train.deepspeed.files import CONFIGS, DIRECTORY, deepspeed_advice, read_deepspeed, resolve_config

NAMES = "zero2, zero3, zero2_offload, zero3_offload, zero3_offload_nvme"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_name_is_the_file_of_the_package(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        path = resolve_config(name)
    assert path == str(DIRECTORY / f"{name}.json")
    assert caplog.messages == [f"--deepspeed {name}: reading {path}."]
    assert read_deepspeed(path)["zero_optimization"]["stage"] == int(name[len("zero")])


def test_a_file_of_that_very_name_comes_first_and_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").mkdir()
    assert resolve_config("zero3") == str(DIRECTORY / "zero3.json")
    (tmp_path / "zero2").write_text('{"zero_optimization": {"stage": 1}}')
    assert read_deepspeed(resolve_config("zero2")) == {"zero_optimization": {"stage": 1}}
    assert f"reading the file {tmp_path / 'zero2'}, not {DIRECTORY / 'zero2.json'}" in caplog.text


@pytest.mark.parametrize("value", [None, "zero2.json", "./zero2", '{"zero_optimization": {"stage": 2}}', {"a": 1}])
def test_any_other_value_stays_as_it_is(value):
    assert resolve_config(value) == value


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("zero9", "zero9: there is no such file."),
        ("zero2.json", "zero2.json: there is no such file."),
        ("{bad", "{bad is no JSON (Expecting property name"),
        ("broken.json", "broken.json is no JSON (Expecting value"),
        ("list.json", "list.json holds a list and no fields."),
    ],
)
def test_a_config_that_cannot_be_read_is_answered_with_the_known_names(config, words, tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("stage: 2")
    (tmp_path / "list.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--deepspeed ") as refused:
        read_deepspeed(config)
    assert str(refused.value).startswith(f"--deepspeed {words}")
    assert f"Give one of {NAMES}; or the path of a DeepSpeed JSON" in str(refused.value)


def test_the_text_that_is_advised_is_one_that_can_be_given():
    assert read_deepspeed(deepspeed_advice().split("'")[1]) == {"zero_optimization": {"stage": 2}}
