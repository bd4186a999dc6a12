"""`llava-lite serve`: what is wrong is one sentence before a model is loaded; a process serves until it is stopped."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from llava_lite.cli import main
from llava_lite.commands.serve import build_parser
from llava_lite.serve.api import server


def options(*flags):
    return build_parser().parse_args(["models/llava-toy/", *flags])


@pytest.fixture
def busy_port():
    """A port that another program listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def answer_to(capsys, *arguments):
    """Return what a call of `llava-lite serve` that fails writes."""
    capsys.readouterr()
    assert main(["serve", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_a_port_in_use_is_one_sentence(checkpoint, busy_port, capsys):
    shown = answer_to(capsys, checkpoint(), "--port", busy_port)
    assert shown == (
        f"llava-lite serve: cannot listen at 127.0.0.1:{busy_port}: another program uses it. "
        "Name another --port or --host.\n"
    )


def test_an_address_that_is_not_here_is_one_sentence(checkpoint, capsys):
    shown = answer_to(capsys, checkpoint(), "--host", "192.0.2.1", "--port", 0)
    assert re.fullmatch(r"llava-lite serve: cannot listen at 192\.0\.2\.1:0: .+\. Name another .*\n", shown)


def test_a_model_that_needs_more_memory_than_is_free_is_refused(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("llava_lite.serve.memory.free_ram", lambda: 2**10)
    shown = answer_to(capsys, checkpoint(), "--port", 0, "--device", "cpu")
    assert re.search(r"needs [\d.]+ MiB of memory for its weights, and 0\.0 MiB are free", shown)
    assert "--load-4bit" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "no/such/model"),
        (["{model}", "--conv-mode", "v9"], "v9"),
        (["{model}", "--device", "gpu"], "--device gpu: this machine has "),
        (["{model}", "--api-key", " "], "the API key is empty; give one by --api-key or LLAVA_LITE_API_KEY"),
    ],
)
def test_what_is_wrong_is_one_sentence(checkpoint, capsys, arguments, message):
    shown = answer_to(capsys, *[one.format(model=checkpoint()) for one in arguments], "--port", 0)
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    "flags", [["--port", "70000"], ["--max-batch", "0"], ["--timeout", "-1"], ["--timeout", "inf"]]
)
def test_wrong_values_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "model", *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_without_the_extra_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(
        ImportError, match=r"fastapi is not installed; install the extra: pip install 'llava-lite\[serve\]'"
    ):
        server.check_extra()


def test_the_model_has_the_name_of_its_directory_or_the_one_given():
    assert server.model_name(options()) == "llava-toy"
    assert server.model_name(options("--served-model-name", "mine")) == "mine"


def test_the_key_is_that_of_the_flag_else_of_the_environment(monkeypatch):
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    assert server.api_key(options()) is None
    monkeypatch.setenv(server.KEY_VARIABLE, "of the environment\n")
    assert server.api_key(options()) == "of the environment"
    assert server.api_key(options("--api-key", "a")) == "a"
    monkeypatch.setenv(server.KEY_VARIABLE, "")
    with pytest.raises(ValueError, match="empty"):
        server.api_key(options())


def test_an_address_that_others_reach_is_warned_of(caplog):
    with caplog.at_level(logging.INFO, logger=server.logger.name):
        with server.listen("127.0.0.1", 0) as listener:
            server.announce(options(), listener)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert re.search(r"Serving llava-toy at http://127\.0\.0\.1:\d+/v1", caplog.text)
        with server.listen("0.0.0.0", 0) as listener:
            server.announce(options(), listener)
            server.announce(options("--api-key", "a"), listener)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "anyone who reaches it (there is no --api-key) may ask" in warnings[0]
    assert "whoever has the key may ask, and nothing is encrypted" in warnings[1]


@pytest.mark.slow
def test_a_process_serves_until_it_is_interrupted(checkpoint):
    openai = pytest.importorskip("openai", reason="asks with OpenAI's client, of the extra dev")
    model = checkpoint("llava-v1.5-toy", conv_template="v1")
    command = [sys.executable, "-m", "llava_lite.cli", "serve", str(model), "--port", "0", "--device", "cpu"]
    environment = os.environ | {server.KEY_VARIABLE: "secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Serving (\S+) at (http://\S+/v1)", line):
                break
        else:
            pytest.fail("".join(lines))
        try:
            with openai.OpenAI(base_url=found[2], api_key="secret", max_retries=0, timeout=60) as client:
                asked = {"model": found[1], "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
                assert client.chat.completions.create(**asked).usage.completion_tokens <= 4
        finally:
            process.send_signal(signal.SIGINT)
            left = process.communicate(timeout=60)[1]
    assert (process.returncode, left) == (0, "")
