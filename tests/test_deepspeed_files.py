"""Advice about --deepspeed names files that exist where the user stands."""

import os

import pytest

from llava_lite import deepspeed_files
from llava_lite.arguments import read_deepspeed
from llava_lite.deepspeed_files import deepspeed_advice, find_config


def test_config_of_the_repository_is_named_as_it_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(deepspeed_files.REPOSITORY)
    assert find_config("zero2.json") == "zero2.json"
    monkeypatch.chdir(deepspeed_files.REPOSITORY / "scripts")
    assert os.path.isfile(find_config("zero2.json"))
    monkeypatch.chdir(tmp_path)
    assert find_config("zero2.json") == str(deepspeed_files.REPOSITORY / "zero2.json")
    (tmp_path / "zero2.json").write_text("{}")
    assert find_config("zero2.json") == "zero2.json"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("zero9.json", "zero9.json: there is no such file."),
        ("{bad", "{bad is no JSON (Expecting property name"),
        ("broken.json", "broken.json is no JSON (Expecting value"),
        ("list.json", "list.json holds a list and no fields."),
    ],
)
def test_a_config_that_cannot_be_read_is_answered_with_one_that_can(config, words, tmp_path, monkeypatch):
    (tmp_path / "broken.json").write_text("stage: 2")
    (tmp_path / "list.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--deepspeed ") as refused:
        read_deepspeed(config)
    assert str(refused.value).startswith(f"--deepspeed {words}")
    assert str(refused.value).endswith(
        f"such as {deepspeed_files.REPOSITORY}/zero2.json or {deepspeed_files.REPOSITORY}/zero3.json."
    )


def test_without_the_repository_the_text_of_a_config_is_advised(tmp_path, monkeypatch):
    monkeypatch.setattr(deepspeed_files, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed(deepspeed_advice().split("'")[1]) == {"zero_optimization": {"stage": 2}}
