"""Flags of `llava-lite demo`, answered before a model is loaded."""

import socket
import sys

import pytest

from llava_lite.cli import main
from llava_lite.commands.demo import name_models
from llava_lite.model.placement import list_devices


@pytest.fixture
def with_gradio(monkeypatch, tmp_path):
    """A module of gradio's name: what stands before the page is what is tested."""
    (tmp_path / "gradio.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gradio", raising=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a", "b", "--model-base", "c"], "--model-base is for one model, and 2 are given."),
        (["a", "a"], "a model is given twice: a, a. Give each once."),
        (["a", "--temperature", "3"], "--temperature is 0 to 2 and --top-p 0.01 to 1; got 3.0 and 1.0."),
        (["a", "--top-p", "0"], "--temperature is 0 to 2 and --top-p 0.01 to 1; got 0.2 and 0.0."),
        (["a", "--seed", "-1"], "--seed -1: a seed is a whole number from 0 to 2^63-1."),
        (["a", "--port", "70000"], "--port 70000: a port is a number from 0 to 65535."),
        (["a", "--device", "tpu9"], f"--device tpu9: this machine has {', '.join(list_devices())}."),
        (["a", "--examples", "gone.jsonl"], "'gone.jsonl': No such file or directory."),
    ],
)
def test_wrong_flags_are_one_sentence(flags, message, with_gradio, capsys):
    assert main(["demo", *flags]) == 1
    assert capsys.readouterr().err == f"llava-lite demo: {message}\n"


def test_a_port_in_use_is_one_sentence(with_gradio, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["demo", "a", "--port", str(port)]) == 1
    reason = f"cannot listen at 127.0.0.1:{port}: another program uses it. Name another --port or --host."
    assert capsys.readouterr().err == f"llava-lite demo: {reason}\n"


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "a"]) == 1
    assert "pip install 'llava-lite[serve]'" in capsys.readouterr().err


def test_models_are_named_by_what_tells_them_apart():
    assert name_models(["runs/a", "user/b"]) == {"a": "runs/a", "b": "user/b"}
    assert name_models(["x/final", "y/final"]) == {"x/final": "x/final", "y/final": "y/final"}
    assert name_models(["runs/a/"]) == {"a": "runs/a/"}
