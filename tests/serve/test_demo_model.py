"""Answers of the page are those of `reply`, for many visitors of one model."""

import threading
from threading import Lock

import pytest
import torch
from conftest import draw_image
from test_media_inputs import build, sound

from llava_lite.eval.expert_routes import routes
from llava_lite.inference import reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.demo_conversation import Ask, Conversation, Upload
from llava_lite.serve.demo_model import DemoModel, Settings

MOE = {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}
GREEDY = Settings(temperature=0.0, max_new_tokens=9)

__all__ = ["sound"]


@pytest.fixture
def demo_model(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: keys of toy_model -> a DemoModel."""

    def make(**keys):
        model = toy_model(conv_template="v1", **keys)
        image_processor = load_image_processor(toy_tower_dir("clip"))
        processor = LlavaLiteProcessor.from_config(model.config, toy_tokenizer, image_processor)
        return DemoModel("toy", model, processor, Lock(), routes if model.moe_layers() else None)

    return make


@pytest.fixture
def images(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        draw_image(i).save(path)
    return [Upload(str(path), "image") for path in paths]


def finish(model, talk, ask, settings=GREEDY):
    """Answer a question to its end; return the answer."""
    for _ in model.answer(talk, ask, settings):
        pass
    return talk.turns[-1].answer


def test_each_turn_is_the_reply_to_the_conversation_so_far(demo_model, images):
    model, talk = demo_model(), Conversation()
    first = finish(model, talk, Ask("What colour?", (images[0],)))
    second = finish(model, talk, Ask("And this?", (images[1],)))
    third = finish(model, talk, Ask("Which?"), Settings("v0", 0.0, 1.0, 7))
    paths, asked = [image.path for image in images], {"max_new_tokens": 9}
    assert first == reply(model.model, model.processor, "What colour?", paths[0], **asked)
    history = [("<image>\nWhat colour?", first)]
    assert second == reply(model.model, model.processor, "And this?", paths, history=history, **asked)
    history.append(("<image>\nAnd this?", second))
    asked = {"max_new_tokens": 7, "conv_template": "v0"}
    assert third == reply(model.model, model.processor, "Which?", paths, history=history, **asked)


def test_the_answer_grows_and_closing_keeps_what_there_is_and_frees_the_model(demo_model):
    model, talk = demo_model(), Conversation()
    pieces, seen = model.answer(talk, Ask("Hello!"), Settings(temperature=0.0, max_new_tokens=400)), []
    while len(set(seen)) < 3:
        next(pieces)
        seen.append(talk.turns[-1].answer)
    assert seen[0] == ""
    assert model.lock.locked()
    pieces.close()
    assert not model.lock.locked()
    assert talk.turns[-1].answer == seen[-1]
    assert seen == sorted(seen, key=len)


def test_closing_before_the_first_word_leaves_the_conversation_as_it_was(demo_model):
    model, talk = demo_model(), Conversation()
    pieces = model.answer(talk, Ask("Hello!"), GREEDY)
    next(pieces)
    assert [message["content"] for message in talk.messages()] == ["Hello!"]
    pieces.close()
    assert talk.turns == []


def test_visitors_at_once_get_what_each_would_alone(demo_model, images):
    model = demo_model()
    questions = [["What colour?", "How many?"], ["Hello!", "And this?"], ["How many circles?", "Human:"]]
    settings = [Settings(temperature=1.3, seed=seed, max_new_tokens=12) for seed in range(3)]

    def visit(i, talk):
        for turn, text in enumerate(questions[i]):
            finish(model, talk, Ask(text, (images[i % 2],) if turn == 0 else ()), settings[i])

    alone, together = [Conversation() for _ in range(3)], [Conversation() for _ in range(3)]
    for i, talk in enumerate(alone):
        visit(i, talk)
    threads = [threading.Thread(target=visit, args=(i, talk)) for i, talk in enumerate(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [talk.history for talk in together] == [talk.history for talk in alone]
    assert len({talk.history[0][1] for talk in alone}) == 3


def test_a_conversation_beyond_the_context_is_refused_with_the_numbers(demo_model, images):
    model, talk = demo_model(tokenizer_model_max_length=64), Conversation()
    long = Ask("What colour is the square? " * 9, (images[0],))
    with pytest.raises(ValueError, match=r"the conversation has \d\d+ tokens, .* and toy reads 64 with its answer;"):
        finish(model, talk, long)
    assert talk.turns == []
    assert not model.lock.locked()


def test_an_answer_that_fills_the_context_is_said_to_be_cut(demo_model, images):
    model, talk = demo_model(tokenizer_model_max_length=64), Conversation()
    model.model.generation_config.suppress_tokens = [2]
    ask, settings = Ask("What?", (images[0],)), Settings(temperature=0.0, max_new_tokens=60)
    answer = finish(model, talk, ask, settings)
    room = model.longest_answer("<image>\nWhat?", [images[0].path], [], settings)
    assert 0 < room < 60
    assert talk.turns[0].remark.startswith(f"toy ended its answer after {room} tokens, where the 64 that it reads")
    assert answer == reply(model.model, model.processor, "What?", images[0].path, max_new_tokens=room)
    other = Conversation()
    finish(model, other, ask, Settings(temperature=0.0, max_new_tokens=room))
    assert (other.turns[0].answer, other.turns[0].remark) == (answer, "")


def test_a_file_that_is_gone_or_no_sound_leaves_the_model_free(demo_model, images, toy_tokenizer, tmp_path):
    model, talk = demo_model(), Conversation()
    with pytest.raises(ValueError, match=r"there is no such file"):
        finish(model, talk, Ask("What?", (Upload(str(tmp_path / "gone.png"), "image"),)))
    hearing = build(toy_tokenizer)
    processor = LlavaLiteProcessor.from_config(
        hearing.config, toy_tokenizer, hearing.get_vision_tower().image_processor
    )
    listener = DemoModel("listener", hearing, processor, Lock())
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    # Without PyAV, which the extra `media` brings, the message is another one.
    with pytest.raises((ValueError, ImportError), match=r"broken\.wav"):
        finish(listener, talk, Ask("What?", (Upload(str(tmp_path / "broken.wav"), "audio"),)))
    assert talk.turns == []
    assert not model.lock.locked()
    assert not listener.lock.locked()


def test_a_sound_is_answered_as_reply_answers_it(toy_tokenizer, sound):
    hearing = build(toy_tokenizer)
    processor = LlavaLiteProcessor.from_config(
        hearing.config, toy_tokenizer, hearing.get_vision_tower().image_processor
    )
    listener, talk = DemoModel("listener", hearing, processor, Lock()), Conversation()
    assert listener.kinds == ["image", "audio"]
    heard = finish(listener, talk, Ask("What is it?", (Upload(str(sound), "audio"),)))
    again = finish(listener, talk, Ask("Is it loud?"))
    media = {"audio": str(sound)}
    assert heard == reply(hearing, processor, "What is it?", media=media, max_new_tokens=9)
    history = [("<image>\nWhat is it?", heard)]
    assert again == reply(hearing, processor, "Is it loud?", media=media, history=history, max_new_tokens=9)


def test_routes_are_those_of_the_last_prompt(demo_model, images):
    model, talk = demo_model(moe=MOE), Conversation()
    assert model.last_routes(talk, GREEDY) is None
    finish(model, talk, Ask("What colour?", (images[0],)))
    finish(model, talk, Ask("Which?", (images[1],)))
    history, (question, _) = talk.history[:1], talk.history[1]
    expected = routes(model.model, model.processor, question, [image.path for image in images], history=history)
    assert model.last_routes(talk, GREEDY) == expected
    assert expected[0]["image"].num_tokens == 32
    assert demo_model().last_routes(talk, GREEDY) is None


def test_full_memory_leaves_the_model_free(demo_model, monkeypatch):
    model, talk = demo_model(), Conversation()

    def full(module, args):
        raise torch.OutOfMemoryError("full")

    hook = model.model.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        finish(model, talk, Ask("Hello!"))
    hook.remove()
    assert talk.turns == []
    assert finish(model, talk, Ask("Hello!"))
