"""The page of `llava-lite demo` in a real browser: Debian's chromium, driven by playwright."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import draw_image

from llava_lite import load, reply
from llava_lite.serve.demo import MAX_WAITING

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MOE = {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}
NAMES = ["llava-dense", "llava-moe"]
NUM_TOKENS = 24
# A sandbox of its own cannot be made by root, and no host of the internet is asked for anything.
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ANSWER = "#chat-{} .bot.message"
WAITING = "Loading content"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser; it comes with the extra dev")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here; Debian has it: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def server(directory, toy_llm_dir, toy_tower_dir, toy_tokenizer_for):
    """The address of a page of two models, which never end an answer by themselves."""
    write_models(directory, toy_llm_dir, toy_tower_dir, toy_tokenizer_for)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llava_lite.cli", "demo", *NAMES, "--port", str(port), "--device", "cpu"]
    command += ["--temperature", "0", "--max-new-tokens", str(NUM_TOKENS), "--examples", "examples.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_TEMP_DIR": str(directory / "uploads")}
    with open(directory / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for_line(process, directory / "log", "The page is at")
            yield f"http://127.0.0.1:{port}/"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
            process.wait()
    # What visitors uploaded goes when the page ends; gradio's copy of the example's image stays.
    assert {path.name for path in (directory / "uploads").rglob("*") if path.is_file()} == {"other.png"}
    assert "Traceback" not in (directory / "log").read_text(encoding="utf-8")


def write_models(directory, toy_llm_dir, toy_tower_dir, toy_tokenizer_for):
    """Save a dense model and one with experts, an example and the files that are uploaded."""
    import torch

    from llava_lite.media.preprocess import load_image_processor
    from llava_lite.model.assemble import assemble
    from llava_lite.model.moe.upcycle import upcycle

    for name in NAMES:
        tower, llm = str(toy_tower_dir("clip")), str(toy_llm_dir("llama"))
        torch.manual_seed(3)
        overrides = {"mm_projector_type": "mlp2x_gelu", "conv_template": "v1"}
        model = assemble(llm, tower, config_overrides=overrides, dtype=torch.float32)
        if name == "llava-moe":
            upcycle(model, MOE)
            # Experts that differ, or both models would answer the same.
            torch.manual_seed(5)
            for block in model.moe_layers().values():
                for parameter in block.parameters():
                    parameter.data += 0.2 * torch.randn_like(parameter)
        model.generation_config.suppress_tokens = [2]
        model.save_pretrained(directory / name)
        toy_tokenizer_for("llama").save_pretrained(directory / name)
        load_image_processor(tower).save_pretrained(directory / name)
    draw_image(0, 60).save(directory / "square.png")
    draw_image(7, 50).save(directory / "other.png")
    (directory / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (directory / "clip.mp4").write_bytes(b"no video")
    (directory / "examples.jsonl").write_text('{"text": "How many circles are there?", "image": "other.png"}\n')


def wait_for_line(process, path, line, timeout_s=180):
    """Wait until a process has written a line."""
    end = time.monotonic() + timeout_s
    while line not in path.read_text(encoding="utf-8"):
        assert process.poll() is None, path.read_text(encoding="utf-8")[-3000:]
        assert time.monotonic() < end, f"no {line!r} after {timeout_s} s"
        time.sleep(0.2)


@pytest.fixture
def open_page(browser, server):
    """Return a function that opens the page as another visitor; keywords as of playwright's new_context."""
    contexts = []

    def open_it(**options):
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(90_000)
        page.goto(server)
        page.wait_for_selector("#box textarea")
        return page

    yield open_it
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def expected(server, directory):
    """Return a function: model, question, ... -> the letters and digits of the answer that `reply` gives."""
    loaded = {name: load(str(directory / name), device="cpu") for name in NAMES}

    def answer(name, question, images=None, history=None):
        return reply(*loaded[name], question, images, history=history, max_new_tokens=NUM_TOKENS)

    return answer


def letters(text):
    """Return what Markdown and the layout of a page leave as it is."""
    return re.sub(r"[^A-Za-z0-9]", "", text)


def send(page, text, *paths):
    """Upload files, type a question and send it."""
    if paths:
        page.set_input_files("#box input[type=file]", [str(path) for path in paths])
        page.wait_for_function(f"document.querySelectorAll('#box .thumbnail-item').length == {len(paths)}")
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def answers(page, panel=1):
    """Return the answers that a panel shows; gradio's bubble of waiting is none."""
    shown = [letters(found.inner_text()) for found in page.query_selector_all(ANSWER.format(panel))]
    return [text for text in shown if text != letters(WAITING)]


def wait_for(page, condition, timeout_s=90):
    """Wait until a function of no arguments is true; return its value."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, page.inner_text("body")[-2000:]
        page.wait_for_timeout(50)
    return value


def set_longest(page, num_tokens):
    """Set the maximum of new tokens, in the settings."""
    if not page.is_visible("#seed"):
        page.click("#settings button")
    page.wait_for_selector("#seed", state="visible")
    box = page.get_by_label("number input for Max new tokens")
    box.fill(str(num_tokens))
    box.press("Tab")


def test_two_models_answer_two_turns_about_an_image_and_experts_are_shown(open_page, expected, directory):
    page, image = open_page(), str(directory / "square.png")
    assert page.inner_text("h1") == "llava-dense and llava-moe"
    assert not page.is_visible("#routing-1")
    send(page, "What colour is the square?", image)
    first = [expected(name, "What colour is the square?", image) for name in NAMES]
    assert first[0] != first[1]
    wait_for(page, lambda: [answers(page, i) for i in (1, 2)] == [[letters(text)] for text in first])
    assert page.is_visible("#chat-1 .user img")
    page.wait_for_selector("#routing-2 .routing", state="visible")
    assert not page.is_visible("#routing-1")
    routing = page.inner_text("#routing-2")
    assert "16 image tokens" in routing
    assert "layer 0" in routing
    assert "expert 3" in routing
    send(page, "How many circles?")
    histories = [[("<image>\nWhat colour is the square?", text)] for text in first]
    second = [expected(name, "How many circles?", image, turns) for name, turns in zip(NAMES, histories, strict=True)]
    both = [[letters(text) for text in pair] for pair in zip(first, second, strict=True)]
    wait_for(page, lambda: [answers(page, i) for i in (1, 2)] == both)
    assert not page.is_visible("#notice [role=alert]")


def test_an_answer_is_streamed_stopped_and_asked_again(open_page, expected):
    page = open_page()
    set_longest(page, 1500)
    send(page, "Hello!")
    lengths = set()

    def grows():
        lengths.update(len(text) for text in answers(page))
        return len(lengths) > 3

    wait_for(page, grows)
    page.fill("#box textarea", "Next, <b>?")
    lengths.clear()
    wait_for(page, grows)
    # What is typed meanwhile stays.
    assert page.input_value("#box textarea") == "Next, <b>?"
    page.click("#stop")
    page.wait_for_timeout(2000)
    (stopped,) = answers(page)
    page.wait_for_timeout(1500)
    assert answers(page) == [stopped]
    # The second model was not asked, for the question was stopped before.
    assert answers(page, 2) == []
    set_longest(page, NUM_TOKENS)
    page.click("#regenerate")
    first = [expected(name, "Hello!") for name in NAMES]
    wait_for(page, lambda: [answers(page, i) for i in (1, 2)] == [[letters(text)] for text in first])
    assert stopped.startswith(letters(first[0]))
    page.press("#box textarea", "Enter")
    second = letters(expected("llava-moe", "Next, <b>?", None, [("Hello!", first[1])]))
    wait_for(page, lambda: answers(page, 2) == [letters(first[1]), second])
    assert "Next, <b>?" in page.inner_text("#chat-1")
    page.click("#clear")
    wait_for(page, lambda: answers(page) == answers(page, 2) == [])


def test_what_is_wrong_is_a_sentence_on_the_page_and_the_server_goes_on(open_page, directory):
    page = open_page()
    notice = "#notice [role=alert]"
    send(page, "What is it?", directory / "broken.png")
    page.wait_for_selector(notice, state="visible")
    assert page.inner_text(notice).startswith("cannot use the image 'broken.png': ")
    assert "\n" not in page.inner_text(notice)
    assert page.input_value("#box textarea") == "What is it?"
    page = open_page()
    send(page, "What is it?", directory / "clip.mp4")
    page.wait_for_selector(notice, state="visible")
    assert page.inner_text(notice) == " ".join(
        f"{name}: clip.mp4 is of kind video, and {name} reads image and text." for name in NAMES
    )
    page = open_page()
    send(page, "How many circles? " * 600)
    page.wait_for_selector(notice, state="visible")
    assert "and llava-dense reads 2,048 with its answer; start a new conversation" in page.inner_text(notice)
    set_longest(page, 5)
    page.fill("#seed input, #seed textarea", "seven")
    send(page, "Hello!")
    wait_for(page, lambda: "the seed is 'seven'; give a whole number" in page.inner_text(notice))
    page.fill("#seed input, #seed textarea", "7")
    send(page, "Hello!")
    wait_for(page, lambda: len(answers(page)) == len(answers(page, 2)) == 1)
    assert not page.is_visible(notice)


def post(url, body):
    """Send JSON; return the status and the text of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def fill_queue(server):
    """Return a function: the request by which a page asked -> others ask the same until the queue is full."""
    waiting, join = [], f"{server}gradio_api/queue/join"

    def fill(asked):
        # The longest answers, so that none ends meanwhile.
        data = [1900 if value == NUM_TOKENS else value for value in asked["data"]]
        for i in range(2 * MAX_WAITING):
            body = asked | {"data": data, "session_hash": f"visitor{i}"}
            status, answer = post(join, body)
            if status != 200:
                break
            waiting.append({key: body[key] for key in ("session_hash", "fn_index")} | json.loads(answer))
        return status, answer

    yield fill
    # The last first, or each would begin when the one before it ends.
    for body in reversed(waiting):
        assert post(f"{server}gradio_api/cancel", body)[0] == 200


def test_a_full_queue_is_a_message_that_leaves_the_page_as_it_is(open_page, fill_queue):
    page, asked = open_page(), []
    page.on("request", lambda request: asked.append(request) if "queue/join" in request.url else None)
    send(page, "Hello!")
    wait_for(page, lambda: answers(page, 2) and page.is_visible("#routing-2 .routing"))
    before = [answers(page, i) for i in (1, 2)]
    assert fill_queue(asked[-1].post_data_json)[0] == 503
    send(page, "Is there room?")
    wait_for(page, lambda: "This application is currently busy." in page.inner_text("body"))
    assert [answers(page, i) for i in (1, 2)] == before
    assert not [one for one in page.query_selector_all("[data-testid=status-tracker] .error") if one.is_visible()]
    assert page.input_value("#box textarea") == "Is there room?"
    # Not through the queue.
    page.click("#clear")
    wait_for(page, lambda: answers(page) == answers(page, 2) == [])


def test_two_visitors_at_once_keep_their_conversations_apart(open_page, expected, directory):
    one, two = open_page(), open_page()
    image = str(directory / "square.png")
    send(one, "What colour is the square?", image)
    send(two, "How many circles are there?")
    for page, asked in ((one, ("What colour is the square?", image)), (two, ("How many circles are there?",))):
        told = [[letters(expected(name, *asked))] for name in NAMES]
        wait_for(page, lambda page=page, told=told: [answers(page, 1), answers(page, 2)] == told)
    assert not two.is_visible("#chat-1 .user img")


def test_a_visitor_who_leaves_does_not_keep_the_model(open_page, expected):
    leaving, staying = open_page(), open_page()
    # One answer of this length takes longer than what the second visitor waits for.
    set_longest(leaving, 1900)
    send(leaving, "Hello!")
    wait_for(leaving, lambda: answers(leaving))
    send(staying, "How many?")
    leaving.close()
    told = letters(expected("llava-dense", "How many?"))
    wait_for(staying, lambda: answers(staying) == [told], timeout_s=60)


@pytest.mark.parametrize("width", [768, 1024, 1920])
def test_two_models_are_side_by_side_before_an_answer_after_it_and_in_a_new_chat(width, open_page):
    page = open_page(viewport={"width": width, "height": 900})

    def boxes():
        return [page.locator(place).bounding_box() for place in ("#chat-1", "#chat-2", "#box")]

    def places():
        return [(round(box["x"]), round(box["width"])) for box in boxes()]

    # Up to 1280 pixels, less the margins of the page and the gap between the models.
    panel = (min(width, 1280) - 2 * 32 - 16) / 2
    empty = places()
    assert [size for _, size in empty[:2]] == [panel, panel]
    assert empty[1][0] == empty[0][0] + panel + 16
    assert boxes()[0]["y"] == boxes()[1]["y"]
    send(page, "Hello!")
    wait_for(page, lambda: answers(page, 2) and page.is_visible("#routing-2 .routing"))
    assert places() == empty
    page.click("#clear")
    wait_for(page, lambda: answers(page) == answers(page, 2) == [])
    assert places() == empty
    assert page.evaluate(OVERFLOW) <= 0


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_box_is_in_view(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True)
    assert page.evaluate(OVERFLOW) <= 0
    page.click("text=How many circles are there?")
    wait_for(page, lambda: page.input_value("#box textarea") == "How many circles are there?")
    page.wait_for_selector("#box .thumbnail-item")
    page.press("#box textarea", "Enter")
    wait_for(page, lambda: answers(page, 2) and page.is_visible("#routing-2 .routing"))
    assert page.evaluate(OVERFLOW) <= 0
    page.evaluate("window.scrollTo(0, 0)")
    box = page.locator("#box").bounding_box()
    assert 0 <= box["y"] <= 844 - box["height"]


def test_the_page_is_dark_where_the_visitor_wants_it(open_page):
    red = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    for scheme, is_dark in (("light", False), ("dark", True)):
        page = open_page(color_scheme=scheme)
        wait_for(page, lambda page=page, is_dark=is_dark: (page.evaluate(red) < 60) == is_dark)
        page.click("#theme")
        wait_for(page, lambda page=page, is_dark=is_dark: (page.evaluate(red) < 60) != is_dark)


def test_nothing_is_loaded_from_another_host(browser, server):
    asked, page = [], browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server)
    page.wait_for_selector("#box textarea")
    page.wait_for_timeout(1000)
    # An image of another host, as an answer may bring it.
    with page.expect_console_message(lambda line: "Content Security Policy" in line.text) as refused:
        page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.2:9/x.png'}))")
    assert "127.0.0.2" in refused.value.text
    page.close()
    assert asked
    assert {url for url in asked if not url.startswith((server, "data:", "blob:"))} <= {"http://127.0.0.2:9/x.png"}
