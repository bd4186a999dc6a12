"""What the page does with a question, before gradio shows it."""

from threading import Lock

import pytest
import torch
from conftest import draw_image

from llava_lite.eval.expert_routes import routes
from llava_lite.inference import reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.demo import DemoPage, read_seed
from llava_lite.serve.demo_conversation import Conversation, Session
from llava_lite.serve.demo_model import DemoModel, Settings

MOE = {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}
GREEDY = Settings(temperature=0.0, max_new_tokens=9)
NAMES = ["dense", "moe"]


@pytest.fixture
def page(toy_model, toy_tokenizer, toy_tower_dir):
    """A page of a dense model and one with experts."""
    lock, models = Lock(), {}
    for name, moe in zip(NAMES, (None, MOE), strict=True):
        model = toy_model(conv_template="v1", moe=moe)
        image_processor = load_image_processor(toy_tower_dir("clip"))
        processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, image_processor)
        models[name] = DemoModel(name, model, processor, lock, routes if moe else None)
    return DemoPage(models, GREEDY, [])


@pytest.fixture
def session():
    return Session([Conversation(), Conversation()])


@pytest.fixture
def image(tmp_path):
    draw_image(0).save(tmp_path / "0.png")
    return str(tmp_path / "0.png")


def test_both_models_are_asked_and_the_one_with_experts_says_where_tokens_went(page, session, image):
    steps = list(page.ask("What?", [image], session, NAMES, GREEDY, True))
    for panel, name in zip(session.panels, NAMES, strict=True):
        model = page.models[name]
        answer = reply(model.model, model.processor, "What?", image, max_new_tokens=9)
        assert panel.history == [("<image>\nWhat?", answer)]
    notice, (nothing, chart) = steps[-1]
    assert (notice, nothing) == ("", "")
    assert "16 image tokens" in chart
    assert list(page.answer(Session(session.panels, session.last), NAMES, GREEDY, False))[-1] == ("", ["", ""])


def test_a_file_that_nobody_reads_is_a_sentence_a_model_and_no_turn(page, session, tmp_path):
    (tmp_path / "clip.mp4").touch()
    steps = list(page.ask("What?", [str(tmp_path / "clip.mp4")], session, NAMES, GREEDY, True))
    assert steps[-1][0] == (
        "dense: clip.mp4 is of kind video, and dense reads image and text. "
        "moe: clip.mp4 is of kind video, and moe reads image and text."
    )
    assert [panel.turns for panel in session.panels] == [[], []]


def test_a_model_that_fails_does_not_keep_the_other_from_answering(page, session):
    def full(module, args):
        raise torch.OutOfMemoryError("full")

    hook = page.models["dense"].model.register_forward_pre_hook(full)
    steps = list(page.ask("What?", [], session, NAMES, GREEDY, True))
    assert steps[-1][0] == "dense: the device has no memory left for this conversation; start a new one."
    assert [len(panel.turns) for panel in session.panels] == [0, 1]
    hook.remove()
    # Asking again asks both, and the second answer of the other takes the place of its first.
    assert session.take_back().text == "What?"
    list(page.answer(session, NAMES, GREEDY, True))
    assert [len(panel.turns) for panel in session.panels] == [1, 1]


def test_an_answer_without_words_is_said_to_be_one(page, session):
    # Every token but the end token is forbidden, by the config that a checkpoint may bring.
    model = page.models["dense"].model
    model.generation_config.suppress_tokens = [i for i in range(model.config.vocab_size) if i != 2]
    steps = list(page.ask("What?", [], session, NAMES, GREEDY, False))
    assert steps[-1][0] == "dense ended its answer at once; ask in another way, or with a temperature."
    assert [len(panel.turns) for panel in session.panels] == [0, 1]


def test_a_question_that_cannot_be_asked_leaves_the_last_one(page, session):
    list(page.ask("What?", [], session, NAMES, GREEDY, False))
    with pytest.raises(ValueError, match="the question is empty"):
        list(page.ask("", [], session, NAMES, GREEDY, False))
    assert session.last.text == "What?"


def test_a_seed_is_a_whole_number_or_empty():
    assert [read_seed(text) for text in ("", "  ", None, "0", " 42 ")] == [None, None, None, 0, 42]
    for text in ("x", "-1", "1.5", str(2**63), "²"):
        with pytest.raises(ValueError, match="give a whole number from 0 to"):
            read_seed(text)
