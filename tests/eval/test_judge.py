"""The judge: asked again while it is busy, refused in a sentence, and its reviews kept line by line."""

import json
import socket

import pytest
from toy_judge import serve

from llava_lite.eval.judge import Judge, Review, review_all

MESSAGES = [{"role": "user", "content": "Is it good?"}]


def quick(address, **more):
    """Return a judge that does not pause."""
    return Judge(address, "toy", **({"pause_s": 0.0, "num_tries": 3} | more))


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("https://h/api/v1", "https://h/api/v1/chat/completions"),
        ("https://h/v4/", "https://h/v4/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ],
)
def test_address_may_be_given_in_part(address, url):
    assert Judge(address, "m").url == url


def test_request_is_openais_and_the_key_is_of_the_environment(monkeypatch):
    with serve(lambda request: "Yes. ") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert quick(server.address).ask(MESSAGES, temperature=0.2, max_tokens=7) == "Yes. "
        monkeypatch.delenv("OPENAI_API_KEY")
        quick(server.address).ask(MESSAGES)
    assert server.requests[0] == {"model": "toy", "messages": MESSAGES, "temperature": 0.2, "max_tokens": 7}
    path, headers = server.headers[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert "Authorization" not in server.headers[1][1]


def test_busy_server_is_asked_again(monkeypatch):
    pauses = []
    monkeypatch.setattr("llava_lite.eval.judge.time.sleep", pauses.append)
    with serve(lambda request: "ok") as server:
        server.failures = [(429, "slow down", {"Retry-After": "7"}), (None, "", {}), (503, "starting", {})]
        assert Judge(server.address, "toy", num_tries=4).ask(MESSAGES) == "ok"
    assert pauses == [7, 2, 4]


def test_pause_has_an_end(monkeypatch):
    pauses = []
    monkeypatch.setattr("llava_lite.eval.judge.time.sleep", pauses.append)
    with serve(lambda request: "ok") as server:
        server.failures = [(429, "", {"Retry-After": "100000"}), (429, "", {"Retry-After": "soon"})]
        quick(server.address, longest_pause_s=5).ask(MESSAGES)
    assert pauses == [5, 0]


def test_server_that_stays_busy_is_given_up_with_its_words():
    with serve(lambda request: "ok") as server:
        server.failures = [(500, "out of\nmemory", {})] * 3
        with pytest.raises(
            ConnectionError, match=r"did not answer in 3 tries: HTTP 500: out of memory Reviews so far"
        ):
            quick(server.address).ask(MESSAGES)


def test_server_that_is_not_there_is_said():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        ConnectionError, match=r"the judge at http://127.* did not answer in 2 tries: ConnectionRefused"
    ):
        quick(address, num_tries=2).ask(MESSAGES)


def test_server_that_hangs_is_given_up():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"(?i)timed? ?out"):
            quick(address, num_tries=1, timeout_s=0.2).ask(MESSAGES)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ((401, '{"error": "bad key"}', {}), r"refuses with HTTP 401: .*bad key.* Set OPENAI_API_KEY, or check it."),
        ((404, "no model toy", {}), r"refuses with HTTP 404: no model toy$"),
        ((200, "<html>hello", {}), r"answers no chat completion: <html>hello Expected JSON with choices"),
        ((200, '{"choices": [{"message": {"content": null}}]}', {}), r"answers no chat completion"),
    ],
)
def test_refusal_and_nonsense_are_said_at_once(failure, words):
    with serve(lambda request: "ok") as server:
        server.failures = [failure]
        with pytest.raises(ValueError, match=words):
            quick(server.address).ask(MESSAGES)
        assert server.failures == []
        assert server.requests == []


def test_address_has_to_be_one():
    with pytest.raises(ValueError, match="--judge 'gpt-4' is no address; expected http://HOST:PORT"):
        Judge("gpt-4", "m").ask(MESSAGES)


def length(judge, prompt):
    """Review a prompt by what the judge says."""
    text = judge.ask([{"role": "user", "content": prompt}])
    return Review(text, [float(text)] if text.isdigit() else None)


def test_reviews_are_kept_and_asked_for_once(tmp_path):
    path, ids = tmp_path / "reviews.jsonl", ["a", "b", "c"]
    with serve(lambda request: str(len(request["messages"][0]["content"]))) as server:
        judge = quick(server.address, num_tries=1)
        server.failures = []
        assert [one.figures for one in review_all(judge, path, ["x", "xx", "xxx"], length, ids)] == [[1], [2], [3]]
        assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == ids
        assert [one.figures for one in review_all(judge, path, ["x", "xxxx", "xxx"], length, ids)] == [[1], [4], [3]]
        assert server.prompts == ["x", "xx", "xxx", "xxxx"]
        # Another judge says something of its own.
        review_all(Judge(server.address, "other"), path, ["x"], length, ids)
        assert len(server.requests) == 5


def test_reviews_go_on_after_a_kill(tmp_path):
    path, prompts = tmp_path / "reviews.jsonl", ["x", "xx", "xxx"]
    with serve(lambda request: str(len(request["messages"][0]["content"]))) as server:
        judge = quick(server.address, num_tries=1)

        def fail_at_last(judge, prompt):
            if prompt == "xxx":
                server.failures = [(503, "busy", {})]
            return length(judge, prompt)

        with pytest.raises(ConnectionError):
            review_all(judge, path, prompts, fail_at_last, prompts)
        path.write_bytes(path.read_bytes()[:-5])
        assert [one.figures for one in review_all(judge, path, prompts, length, prompts)] == [[1], [2], [3]]
        assert server.prompts == ["x", "xx", "xx", "xxx"]


def test_judge_that_gives_no_figure_at_all_is_said(tmp_path):
    with (
        serve(lambda request: "As a model I cannot.") as server,
        pytest.raises(ValueError, match=r"'toy' gave no figure in 2 reviews; the last says 'As a model I cannot.'"),
    ):
        review_all(quick(server.address), tmp_path / "r.jsonl", ["x", "y"], length, [1, 2])


def test_file_that_holds_no_reviews_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"model": "toy"}\n')
    with pytest.raises(
        ValueError, match=r"r.jsonl, line 1 is no review \(KeyError\('content'\)\). Move the file away"
    ):
        review_all(quick("http://h"), tmp_path / "r.jsonl", ["x"], length, [1])
