"""The name of a model that does not exist is reported at once, in one sentence."""

import os
import re
import subprocess
import sys

import pytest

from llava_lite.hub.errors import HubError
from llava_lite.hub.source import check_source, did_you_mean


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("checkpoints/llava-v1", "checkpoints/llava-moe", "vicuna"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model.safetensors").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["vicuna", "./vicuna", "checkpoints/llava-v1", "checkpoints/llava-v1/"])
def test_a_directory_passes(name, here):
    check_source(name)
    check_source(here / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./vicunna", "'./vicunna': there is no such directory. Did you mean './vicuna'?"),
        (
            "/nowhere/at/all",
            "'/nowhere/at/all': there is no such directory. Give the path of one, or a hub id such as",
        ),
        ("a/b/c", "'a/b/c': there is no such directory."),
        (
            "model.safetensors",
            "'model.safetensors' is a file; give the directory that holds it, with its config.json.",
        ),
        ("two words", "'two words': there is no such directory."),
        ("~/nothing-of-that-name", "'~/nothing-of-that-name': there is no such directory."),
        # These could be repositories; the cache knows none and asking is switched off in the tests.
        ("vicunna", "'vicunna': there is no such directory. Did you mean 'vicuna'? As a repository of the Hub:"),
        ("checkpoints/llava-v2", "Did you mean 'checkpoints/llava-v1' or 'checkpoints/llava-moe'? As a rep"),
    ],
)
def test_a_source_that_does_not_exist_is_reported(name, words, here):
    with pytest.raises(OSError, match=re.escape(words)) as refused:
        check_source(name)
    assert len(str(refused.value).splitlines()) == 1


def test_the_flag_begins_the_sentence(here):
    with pytest.raises(OSError, match=r"^--vision_tower './clip': there is no such directory\."):
        check_source("./clip", "--vision_tower")
    with pytest.raises(HubError, match=r"^--vision_tower 'user/clip': there is no such directory\."):
        check_source("user/clip", "--vision_tower")


def test_home_that_was_not_opened_by_the_shell_is_written_out(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert did_you_mean("~/vicuna") == f" Write '{here}/vicuna'."


# Without a network the Hub's client looks half a minute for every file; the names of one run are many files.
CUT_OFF = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}


@pytest.mark.parametrize(
    "command",
    [
        ["check", "--data_path", "a.json", "--model_name_or_path", "user/gone"],
        ["convert", "user/gone", "out"],
    ],
)
def test_without_a_network_a_command_asks_once(command, here, tmp_path):
    (here / "a.json").write_text("[]")
    # Imports take their time on a busy machine; the look-ups would take minutes.
    env = os.environ | CUT_OFF | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.cli", *command], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr.splitlines()[-1]
    assert "Retry" not in done.stderr
