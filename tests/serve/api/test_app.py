"""OpenAI's own client is answered over HTTP as `reply` answers, and whoever asks wrongly is told why."""

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_server import KEY, data_url, serving, show
from conftest import draw_image
from pages import ROOT, blocks, commands

from llava_lite.inference import reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor

openai = pytest.importorskip("openai", reason="asks with OpenAI's client, of the extra dev")
TEXT = "What colour is the square?"


@pytest.fixture
def pair(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: arguments of toy_model -> (model, processor)."""

    def make(**options):
        options = {"conv_template": "v1"} | options
        model = toy_model(**options)
        tower = load_image_processor(toy_tower_dir("clip")) if options.get("tower", "clip") else None
        return model, LlavaLiteProcessor.from_config(model.config, toy_tokenizer, tower)

    return make


def create(server, messages, **more):
    """Return what the client makes of a request, greedy and short unless it says otherwise."""
    return server.client.chat.completions.create(
        **{"model": "toy", "messages": messages, "temperature": 0, "max_tokens": 12} | more
    )


def fetch(server, path, key=KEY, body=None):
    """Return (status, headers, body) of a request that is no client's of OpenAI."""
    request = urllib.request.Request(f"{server.url}{path}", body, {"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def metrics(server):
    """Return {name with labels: value} of the server's metrics."""
    lines = fetch(server, "/metrics")[2].splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def wait_for(condition, timeout_s=30):
    """Wait until a condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_client_lists_and_asks_the_model(pair):
    asked = pair()
    images = [draw_image(1), draw_image(2)]
    with serving(*asked) as server:
        assert [model.id for model in server.client.models.list()] == ["toy"]
        assert server.client.models.retrieve("toy").owned_by == "llava_lite"
        answer = create(server, show(images[0]))
        assert answer.choices[0].message.content == reply(*asked, TEXT, images[0], max_new_tokens=12)
        assert answer.choices[0].finish_reason == "length"
        assert (answer.object, answer.model, answer.choices[0].logprobs) == ("chat.completion", "toy", None)
        # 16 features of the image stand in the prompt.
        plain = create(server, show())
        assert answer.usage.prompt_tokens - plain.usage.prompt_tokens > 14
        assert answer.usage.completion_tokens == 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
        assert plain.choices[0].message.content == reply(*asked, TEXT, max_new_tokens=12)
        both = create(server, show(*images)).choices[0].message.content
        assert both == reply(*asked, TEXT, images, max_new_tokens=12)
        history = [("What?", "Red.")]
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}, *show(images[1])]
        second = create(server, messages).choices[0].message.content
        assert second == reply(*asked, TEXT, images[1], history=history, max_new_tokens=12)
        briefly = create(server, [{"role": "system", "content": "Be brief."}, *show()]).choices[0].message.content
        assert briefly != plain.choices[0].message.content


def test_pieces_of_a_stream_add_up_and_carry_the_usage(pair):
    with serving(*pair()) as server:
        whole = create(server, show(draw_image(1)), max_tokens=20)
        options = {"include_usage": True}
        chunks = list(create(server, show(draw_image(1)), max_tokens=20, stream=True, stream_options=options))
        assert {chunk.id for chunk in chunks} == {chunks[0].id}
        assert chunks[0].choices[0].delta.role == "assistant"
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(texts) == whole.choices[0].message.content
        assert sum(map(bool, texts)) > 3
        assert chunks[-2].choices[0].finish_reason == "length"
        assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
        assert all(chunk.usage is None for chunk in chunks[:-1])
        without = list(create(server, show(), stream=True))
        assert all(chunk.choices for chunk in without)


def test_several_answers_have_the_seeds_one_after_another(pair):
    with serving(*pair()) as server:
        sampled = {"temperature": 1, "max_tokens": 10}
        three = create(server, show(draw_image(1)), n=3, seed=5, **sampled)
        assert [choice.index for choice in three.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in three.choices]
        assert len(set(texts)) == 3
        alone = [create(server, show(draw_image(1)), seed=seed, **sampled) for seed in (5, 6, 7)]
        assert texts == [answer.choices[0].message.content for answer in alone]
        assert three.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in alone)
        streamed = {0: "", 1: "", 2: ""}
        for chunk in create(server, show(draw_image(1)), n=3, seed=5, stream=True, **sampled):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert list(streamed.values()) == texts


def test_a_stop_ends_an_answer_and_is_no_part_of_it(pair):
    with serving(*pair()) as server:
        whole = create(server, show(draw_image(1)), max_tokens=20).choices[0].message.content
        stop = whole[5:8]
        for more in ({}, {"stream": True}):
            answer = create(server, show(draw_image(1)), max_tokens=20, stop=[stop, "never there"], **more)
            if more:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            else:
                text = answer.choices[0].message.content
                assert answer.choices[0].finish_reason == "stop"
                assert answer.usage.completion_tokens < 20
            assert text == whole.partition(stop)[0].strip()


def test_log_probabilities_come_whole_and_in_pieces(pair):
    with serving(*pair()) as server:
        asked = {"logprobs": True, "top_logprobs": 3, "max_tokens": 6}
        whole = create(server, show(draw_image(1)), **asked).choices[0].logprobs.content
        assert len(whole) == 6
        for entry in whole:
            best = [one.logprob for one in entry.top_logprobs]
            assert len(best) == 3
            # Greedy: the token is the most probable one.
            assert entry.logprob == best[0] == max(best) < 0
        pieces = []
        for chunk in create(server, show(draw_image(1)), stream=True, **asked):
            pieces += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
        assert pieces == whole


@pytest.mark.parametrize(
    ("change", "error", "code", "message"),
    [
        (
            {"model": "gpt-4o"},
            openai.NotFoundError,
            "model_not_found",
            'There is no model "gpt-4o"; this server has "toy"',
        ),
        (
            {"presence_penalty": 1},
            openai.BadRequestError,
            "unsupported_parameter",
            "presence_penalty is not supported",
        ),
        ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "unknown_parameter", 'Unknown field "top_k"'),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "from 0 to 2"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "context is 2,048 tokens"),
        (
            {"messages": show(text="red " * 3000)},
            openai.BadRequestError,
            "context_length_exceeded",
            "the messages have",
        ),
        ({"messages": show(*[draw_image(1)] * 3)}, openai.BadRequestError, "too_many_images", "3 images; this server"),
        (
            {"messages": show(draw_image(1, 80))},
            openai.BadRequestError,
            "invalid_image",
            "more than 5,000. Make it smaller",
        ),
        ({"messages": show(text="x" * 2**21)}, openai.APIStatusError, None, "The body has more than"),
        (
            {"n": 9},
            openai.BadRequestError,
            "invalid_value",
            "n is 9; each answer needs one of the 8 places in the queue",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_answered_is_refused_and_the_server_goes_on(pair, change, error, code, message):
    flags = ("--max-images", "2", "--max-image-pixels", "5000", "--max-queue", "8", "--max-image-bytes", "2000")
    with serving(*pair(), *flags) as server:
        with pytest.raises(error) as refused:
            create(server, **{"messages": show(draw_image(1))} | change)
        assert message in refused.value.body["message"]
        assert refused.value.code == code
        assert create(server, show(draw_image(1))).choices[0].message.content
        counted = metrics(server)
        assert counted[f'llava_lite_requests_total{{status="{refused.value.status_code}"}}'] == 1
        assert counted['llava_lite_requests_total{status="200"}'] == 1


def test_images_for_a_model_without_a_tower_are_refused(pair):
    with serving(*pair(tower=None)) as server:
        with pytest.raises(openai.BadRequestError, match="has no vision tower"):
            create(server, show(draw_image(1)))
        assert create(server, show()).choices[0].message.content


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[1]"])
def test_a_body_that_is_no_request_is_refused(pair, body):
    with serving(*pair()) as server:
        status, _, text = fetch(server, "/v1/chat/completions", body=body)
        assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")
        assert fetch(server, "/health")[0] == 200


def test_all_but_the_health_need_the_key(pair):
    with serving(*pair()) as server:
        assert fetch(server, "/health", key=None)[::2] == (200, '{"status":"ok"}')
        for path in ("/v1/models", "/v1/models/toy", "/metrics", "/v1/chat/completions"):
            for key in (None, "wrong", f"{KEY}x", KEY[:-1], "sécret"):
                body = b"{}" if "chat" in path else None
                status, headers, text = fetch(server, path, key and key.encode().decode("latin-1"), body)
                assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
                assert json.loads(text)["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="wrong").models.list()


def test_half_a_character_is_refused_like_any_other_fault(pair):
    with serving(*pair()) as server:
        message = {"role": "user", "content": "Hello!"}
        half = "a\ud800"
        for more in ({"messages": [{**message, "content": half}]}, {half: 1}, {"messages": [{**message, half: 1}]}):
            body = json.dumps({"model": "toy", "messages": [message], **more}).encode()
            status, _, text = fetch(server, "/v1/chat/completions", body=body)
            assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")


def test_another_prompt_format_is_the_one_of_reply(pair):
    asked = pair()
    plain = reply(*asked, TEXT, draw_image(1), max_new_tokens=12)
    with serving(*asked, "--conv-mode", "llava_llama_2") as server:
        answer = create(server, show(draw_image(1))).choices[0].message.content
    assert answer == reply(*asked, TEXT, draw_image(1), "llava_llama_2", max_new_tokens=12) != plain


def test_a_path_that_is_not_there_is_answered_in_the_same_form(pair):
    with serving(*pair()) as server:
        for path, body, expected in (("/v1/embeddings", b"{}", 404), ("/v1/models", b"{}", 405), ("/docs", None, 404)):
            status, _, text = fetch(server, path, body=body)
            assert (status, set(json.loads(text)["error"])) == (expected, {"message", "type", "param", "code"})
        with pytest.raises(openai.NotFoundError, match='no model "other"'):
            server.client.models.retrieve("other")


def ask_raw(server, **fields):
    """Return a connection that has sent a request, and waits for nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": "toy", "messages": show(draw_image(1)), "temperature": 0, "max_tokens": 1900} | fields
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {KEY}"})
    return connection


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_gives_its_place_to_the_next(pair, streams):
    asked = pair()
    # The text never ends by itself.
    asked[0].generation_config.suppress_tokens = [asked[1].tokenizer.eos_token_id]
    with serving(*asked, "--max-batch", "1") as server:
        first = ask_raw(server, stream=streams)
        wait_for(lambda: metrics(server)["llava_lite_running"] == 1)
        second = ask_raw(server, stream=streams)
        wait_for(lambda: metrics(server)["llava_lite_queue_length"] == 1)
        # One waits in the queue and one is answered.
        for connection, left in ((second, 1), (first, 0)):
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            wait_for(lambda left=left: metrics(server)["llava_lite_running"] == left)
        assert create(server, show(draw_image(1))).choices[0].message.content
        counted = metrics(server)
        assert counted['llava_lite_requests_total{status="499"}'] == 2
        assert counted["llava_lite_queue_length"] == 0


def test_a_full_queue_is_answered_with_429(pair):
    asked = pair()
    asked[0].generation_config.suppress_tokens = [asked[1].tokenizer.eos_token_id]
    with serving(*asked, "--max-batch", "1", "--max-queue", "1") as server:
        connections = [ask_raw(server)]
        wait_for(lambda: metrics(server)["llava_lite_running"] == 1)
        connections.append(ask_raw(server))
        wait_for(lambda: metrics(server)["llava_lite_queue_length"] == 1)
        with pytest.raises(openai.RateLimitError, match="1 of the 1 places in the queue are taken") as refused:
            create(server, show())
        assert refused.value.response.headers["Retry-After"] == "1"
        for connection in connections:
            connection.close()


def test_an_answer_that_takes_too_long_is_given_up(pair):
    asked = pair()
    asked[0].generation_config.suppress_tokens = [asked[1].tokenizer.eos_token_id]
    with serving(*asked, "--timeout", "1.5") as server:
        with pytest.raises(openai.APIStatusError, match="was not ready in time") as refused:
            create(server, show(), max_tokens=1900)
        assert (refused.value.status_code, refused.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="was not ready in time"):
            list(create(server, show(), max_tokens=1900, stream=True))
        wait_for(lambda: metrics(server)["llava_lite_running"] == 0)
        assert metrics(server)['llava_lite_requests_total{status="504"}'] == 2
        assert create(server, show(), max_tokens=2).usage.completion_tokens == 2


def test_a_model_that_fails_once_answers_the_next(pair):
    model, processor = pair()
    faults = [RuntimeError("a fault of the device")]

    def fail(module, args, kwargs):
        if faults:
            raise faults.pop()

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    with serving(model, processor) as server:
        with pytest.raises(openai.InternalServerError, match=r"The model failed \(RuntimeError\)"):
            create(server, show())
        assert create(server, show()).choices[0].message.content
    hook.remove()


def test_the_requests_of_the_page_are_answered(pair, tmp_path, monkeypatch, capsys):
    page = ROOT / "docs" / "serving.md"
    (code,) = blocks(page, "python")
    draw_image(1).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    with serving(*pair(), "--served-model-name", "stage3") as server:
        exec(code.replace("http://127.0.0.1:8000", server.url).replace('"none"', f'"{KEY}"'), {})
        assert capsys.readouterr().out.strip()
        (curl,) = [command.words for command in commands(page) if command.words[0] == "curl"]
        address, body = curl[1].removeprefix("http://127.0.0.1:8000"), curl[curl.index("-d") + 1]
        status, headers, text = fetch(server, address, body=body.encode())
        assert (status, headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        assert text.endswith("data: [DONE]\n\n")


def test_clients_at_once_share_a_batch_and_the_metrics_say_so(pair):
    asked = pair()
    images = [draw_image(i) for i in range(8)]
    expected = [reply(*asked, TEXT, image, max_new_tokens=16) for image in images]
    with serving(*asked) as server, ThreadPoolExecutor(8) as clients:
        texts = clients.map(lambda image: create(server, show(image), max_tokens=16), images)
        assert [answer.choices[0].message.content for answer in texts] == expected
        counted = metrics(server)
    assert counted['llava_lite_requests_total{status="200"}'] == 8
    assert counted["llava_lite_generated_tokens_total"] == counted["llava_lite_request_seconds_count"] * 16
    assert counted["llava_lite_first_token_seconds_count"] == counted["llava_lite_queue_seconds_count"] == 8
    # Fewer steps than the 15 of each answer after its first token.
    assert counted["llava_lite_batch_size_sum"] == 8 * 15
    assert counted["llava_lite_batch_size_count"] < 8 * 15


def test_two_servers_of_a_process_count_apart(pair):
    asked = pair()
    with serving(*asked) as first, serving(*asked) as second:
        create(first, show())
        assert metrics(first)['llava_lite_requests_total{status="200"}'] == 1
        assert 'llava_lite_requests_total{status="200"}' not in metrics(second)


def test_an_image_that_is_an_address_is_fetched_from_no_host_by_default(pair):
    with serving(*pair()) as server:
        message = show(draw_image(1))
        message[0]["content"][0]["image_url"]["url"] = "http://127.0.0.1:8000/secret.png"
        with pytest.raises(openai.BadRequestError, match="this server fetches no images"):
            create(server, message)
        message[0]["content"][0]["image_url"]["url"] = data_url(draw_image(1))
        assert create(server, message).choices[0].message.content
