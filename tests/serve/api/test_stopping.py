"""A server that is told to stop lets requests end, tells the rest, and writes no traceback."""

import http.client
import json
import logging
import socket
import threading
import time

import pytest
from api_server import KEY, serving, show
from conftest import draw_image

from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.api import graceful

pytest.importorskip("openai", reason="asks with OpenAI's client, of the extra dev")
STOPPING = "The request was given up: the server is stopping."


@pytest.fixture
def endless(toy_model, toy_tokenizer, toy_tower_dir):
    """Return (model, processor) of a model whose answers end by their length alone."""
    model = toy_model(conv_template="v1")
    model.generation_config.suppress_tokens = [toy_tokenizer.eos_token_id]
    processor = load_image_processor(toy_tower_dir("clip"))
    return model, LlavaLiteProcessor.from_config(model.config, toy_tokenizer, processor)


@pytest.fixture
def quickly(monkeypatch):
    """Give running requests half a second once the server is stopped."""
    monkeypatch.setattr(graceful, "SHUTDOWN_S", 0.5)


def ask(server, **fields):
    """Return a connection that has sent a request for a long answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = {"model": "toy", "messages": show(draw_image(1)), "temperature": 0, "max_tokens": 1900} | fields
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
    return connection


def send_half(server):
    """Return a connection that has sent a request without the end of its body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.putrequest("POST", "/v1/chat/completions")
    for name, value in (("Authorization", f"Bearer {KEY}"), ("Content-Length", "1000")):
        connection.putheader(name, value)
    connection.endheaders(b'{"model": ')
    return connection


def answer_of(connection):
    """Return (status, text) of a response."""
    response = connection.getresponse()
    return response.status, response.read().decode()


def wait_for(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_whoever_is_left_gets_503_or_an_error_event(endless, quickly, caplog, capfd):
    with caplog.at_level(logging.INFO), serving(*endless, "--max-batch", "2") as server:
        asked = [ask(server), ask(server), ask(server), send_half(server)]
        streamed = ask(server, stream=True)
        # Two are answered, two wait in the queue, and of one the body is not there.
        wait_for(lambda: server.app.state.engine.num_running == 2 and server.app.state.engine.num_waiting == 2)
    answers = [answer_of(connection) for connection in asked]
    assert [status for status, _ in answers] == [503] * 4
    for _, text in answers:
        error = json.loads(text)["error"]
        assert (error["message"], error["type"], error["code"]) == (STOPPING, "server_error", "server_stopping")
    status, text = answer_of(streamed)
    assert status == 200
    assert json.loads(text.split("data: ")[-1])["error"]["message"] == STOPPING
    assert "Stopping; 5 requests are running" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_that_ends_in_time_is_answered(endless, monkeypatch, caplog, capfd):
    monkeypatch.setattr(graceful, "SHUTDOWN_S", 60)
    with caplog.at_level(logging.INFO), serving(*endless) as server:
        asked = ask(server, max_tokens=200)
        wait_for(lambda: server.app.state.engine.num_running == 1)
    assert "Stopping; 1 request is running and may take 60 s more" in caplog.text
    status, text = answer_of(asked)
    assert (status, json.loads(text)["usage"]["completion_tokens"]) == (200, 200)
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_reads_nothing_holds_no_server_up(endless, quickly, monkeypatch, caplog, capfd):
    monkeypatch.setattr(graceful, "CLOSE_S", 0.5)
    # Every event is larger than what the two ends of a connection keep for a reader.
    from llava_lite.serve.api.call import Call

    monkeypatch.setattr(Call, "_chunk", lambda *args, **more: b"data: " + b"x" * 2**22 + b"\n\n")
    with caplog.at_level(logging.INFO), serving(*endless) as server:
        asked = ask(server, stream=True)
        wait_for(lambda: server.app.state.engine.num_running == 1)
        time.sleep(1)
    asked.close()
    # uvicorn's own log is not of the root logger.
    assert "Traceback" not in capfd.readouterr().err


def test_half_bodies_hold_no_places_of_the_queue(endless):
    with serving(*endless, "--max-queue", "2") as server:
        halves = [send_half(server) for _ in range(6)]
        wait_for(lambda: len(server.app.state.calls.running) == 6)
        assert server.app.state.engine.num_waiting == 0
        answer = server.client.chat.completions.create(model="toy", messages=show(), max_tokens=3)
        assert answer.usage.completion_tokens == 3
        for half in halves:
            half.sock.shutdown(socket.SHUT_RDWR)
            half.close()
        wait_for(lambda: not server.app.state.calls.running)


def test_a_body_that_is_not_there_in_time_is_answered_with_408(endless):
    with serving(*endless) as server:
        server.app.state.calls.bodies.timeout_s = 0.3
        half = send_half(server)
        response = half.getresponse()
        assert (response.status, response.headers["Connection"]) == (408, "close")
        assert json.loads(response.read())["error"]["message"] == "The body was not complete after 0.3 s."


def test_a_client_that_leaves_while_its_images_are_read_is_forgotten(endless, monkeypatch):
    from llava_lite.serve.api import readers

    go_on = threading.Event()
    monkeypatch.setattr(readers, "read_bytes", lambda *args: go_on.wait(300))
    with serving(*endless, "--max-queue", "1") as server:
        asked = ask(server)
        wait_for(lambda: server.app.state.engine.num_waiting == 1)
        asked.sock.shutdown(socket.SHUT_RDWR)
        asked.close()
        wait_for(lambda: server.app.state.engine.num_waiting == 0)
        assert not go_on.is_set()
        go_on.set()
