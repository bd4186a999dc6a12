"""`llava-lite serve`: what is wrong is one sentence before a model is loaded; a process serves until it is stopped."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

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
        (["{model}", "--api-key", ""], "the API key is empty; give one by --api-key or LLAVA_LITE_API_KEY"),
        (
            ["{model}", "--api-key", "gr\u00fcn\u00e9"],
            "the API key has '\u00e9' (U+00E9), '\u00fc' (U+00FC), which clients",
        ),
        (
            ["{model}", "--api-key", "a\x7fb"],
            "the API key has '\\x7f' (U+007F), which clients cannot send in a header",
        ),
        (["{model}", "--served-model-name", ""], "the model has no name in requests; give one by --served-model-name"),
        (["/"], "the model has no name in requests"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_anything_is_loaded(checkpoint, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(server, "load", None)
    shown = answer_to(capsys, *[one.format(model=checkpoint()) for one in arguments], "--port", 0)
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        *[
            ("--port", value, "is no port: a whole number from 0 to 65535")
            for value in ("70000", "-1", "8e3", "", "\u00b2")
        ],
        *[
            ("--timeout", value, "is no time: a number of seconds above 0")
            for value in ("-1", "0", "inf", "nan", "5s")
        ],
        ("--max-batch", "0", "is no whole number of at least 1"),
        ("--max-queue", "1.5", "is no whole number of at least 1"),
    ],
)
def test_wrong_values_are_refused_with_the_range(flag, value, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "model", f"{flag}={value}"])
    assert ended.value.code == 2
    assert f"{flag}: {value!r} {reason}" in capsys.readouterr().err


def test_without_the_extra_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(
        ImportError, match=r"fastapi is not installed; install the extra: pip install 'llava-lite\[serve\]'"
    ):
        server.check_extra()


def test_the_model_has_the_name_of_its_directory_or_the_one_given():
    assert server.model_name(options()) == "llava-toy"
    assert server.model_name(options("--served-model-name", "mine")) == "mine"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (".", "run"),
        ("./", "run"),
        ("..", "models"),
        ("logs/..", "run"),
        ("../../models/run/", "run"),
        ("../latest//", "latest"),
        ("user/llava-7b", "llava-7b"),
    ],
)
def test_a_directory_that_is_named_by_dots_has_its_own_name(model, name, tmp_path, monkeypatch):
    (tmp_path / "models/run/logs").mkdir(parents=True)
    (tmp_path / "models/latest").symlink_to(tmp_path / "models/run")
    monkeypatch.chdir(tmp_path / "models/run")
    assert server.model_name(build_parser().parse_args([model])) == name


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


@contextmanager
def process_of(model, *flags):
    """Yield (process, name of the model, address) of `llava-lite serve` once it answers."""
    command = [sys.executable, "-m", "llava_lite.cli", "serve", str(model), "--port", "0", "--device", "cpu", *flags]
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
            yield process, found[1], found[2]
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_serves_until_it_is_told_to_stop(checkpoint, number):
    openai = pytest.importorskip("openai", reason="asks with OpenAI's client, of the extra dev")
    with process_of(checkpoint("llava-v1.5-toy", conv_template="v1")) as (process, name, url):
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=60) as client:
            asked = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
            assert client.chat.completions.create(**asked).usage.completion_tokens <= 4
        process.send_signal(number)
        left = process.communicate(timeout=60)[1]
    assert (process.returncode, left) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_gives_running_requests_up_without_a_traceback(checkpoint, number):
    model = checkpoint("llava-v1.5-toy", conv_template="v1")
    stored = json.loads((model / "generation_config.json").read_text())
    # No answer ends by itself, and each takes the time of thousands of tokens.
    (model / "generation_config.json").write_text(json.dumps(stored | {"suppress_tokens": [2]}))
    with process_of(model) as (process, name, url):
        body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1900}
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(post, f"{url}/chat/completions", body | {"stream": i > 3}) for i in range(8)]
            wait_until(lambda: "llava_lite_running 8.0" in get(f"{url[:-3]}/metrics"))
            process.send_signal(number)
            # Two signals at once may be delivered as one.
            assert "Stopping; 8 requests are running" in process.stderr.readline()
            process.send_signal(number)
            left = process.communicate(timeout=120)[1]
            answers = [one.result() for one in asked]
    assert (process.returncode, left) == (0, "")
    assert [status for status, _ in answers] == [503] * 4 + [200] * 4
    assert all("the server is stopping." in text.splitlines()[-2 if status == 200 else 0] for status, text in answers)


def get(url):
    request = urllib.request.Request(url, headers={"Authorization": "Bearer secret"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return response.read().decode()


def post(url, body):
    """Return (status, text) of the response to a request."""
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def wait_until(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
