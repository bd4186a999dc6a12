"""What lmms-eval asks in `reply`'s words: settings, messages, visuals, batches."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import draw_image
from PIL import Image

from llava_lite.eval.lmms_requests import (
    Asked,
    Settings,
    as_media,
    cut_at,
    in_batches,
    kind_of,
    to_asked,
    to_messages,
    to_settings,
    to_wav,
)
from llava_lite.media.image import open_image
from llava_lite.media.wav import read_wav


@pytest.mark.parametrize(
    ("given", "arguments", "until"),
    [
        ({}, {"max_new_tokens": 1024, "temperature": 0.0}, ()),
        (
            {"max_new_tokens": 16, "until": ["\n\n"], "do_sample": False},
            {"max_new_tokens": 16, "temperature": 0.0},
            (),
        ),
        ({"until": ["\n\n", "Q:"]}, {"max_new_tokens": 1024, "temperature": 0.0}, ("\n\n", "Q:")),
        ({"until": "ASSISTANT:", "max_gen_toks": 8}, {"max_new_tokens": 8, "temperature": 0.0}, ("ASSISTANT:",)),
        ({"until": [], "temperature": 0, "top_p": 1.0, "num_beams": 3}, {"num_beams": 3, "temperature": 0.0}, ()),
        ({"until": None, "temperature": 0.2, "top_p": None}, {"temperature": 0.2}, ()),
        ({"temperature": 0.7, "top_p": "0.9", "top_k": 5.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}, ()),
        ({"temperature": 0.7, "do_sample": False, "top_k": 5}, {"temperature": 0.0}, ()),
        ({"do_sample": True, "top_p": "None"}, {"temperature": 1.0}, ()),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}, ()),
        ({"repetition_penalty": 2, "stop": ["."]}, {"temperature": 0.0, "repetition_penalty": 2.0}, (".",)),
    ],
)
def test_settings_are_those_of_reply(given, arguments, until):
    assert to_settings(given) == Settings({"max_new_tokens": 1024, "temperature": 0.0} | arguments, until)


def test_settings_that_reply_does_not_have_are_named():
    settings = to_settings({"image_aspect_ratio": "original", "seed": 42, "max_new_tokens": 4})
    assert settings.unknown == ("image_aspect_ratio", "seed")
    assert settings.arguments == {"max_new_tokens": 4, "temperature": 0.0}


def test_an_end_that_lmms_eval_fills_in_counts_where_it_is_asked_for():
    assert to_settings({"until": ["\n\n"]}, stop_at_blank_line=True).until == ("\n\n",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_new_tokens": "many"}, "max_new_tokens='many'; expected a whole number"),
        ({"num_beams": 1.5}, r"num_beams=1\.5; expected a whole number"),
        ({"temperature": "hot"}, "temperature='hot'; expected a number"),
        ({"top_k": True}, "top_k=True; expected a whole number"),
    ],
)
def test_a_setting_that_is_no_number_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        to_settings(given)


def user(*parts):
    """Return a message of the user: a text, or a part as lmms-eval writes it."""
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def text(words):
    return {"type": "text", "text": words}


def shown(name):
    return {"type": "image", "url": name}


@pytest.mark.parametrize(
    ("parts", "question"),
    [
        (("What?",), "What?"),
        ((shown("a"), "What?"), "<image>\nWhat?"),
        ((shown("a"), shown("b"), "What?"), "<image>\n<image>\nWhat?"),
        (("Is", shown("a"), "like", shown("b"), "?"), "Is\n<image>\nlike\n<image>\n?"),
        ((shown("a"), shown("b"), "Is <image> like <image>?"), "Is <image> like <image>?"),
        ((shown("a"), "See <image 1>."), "<image>\nSee <image 1>."),
    ],
)
def test_images_stand_where_the_message_has_them(parts, question):
    names = tuple(part["url"] for part in parts if isinstance(part, dict))
    assert to_asked([user(*parts)]) == Asked(question, names)


def test_earlier_turns_and_their_images_are_the_history():
    messages = [
        {"role": "system", "content": "Be brief."},
        user(shown("a"), "What?"),
        {"role": "assistant", "content": [text("A square.")]},
        user(shown("b"), "And"),
        user("this?"),
    ]
    asked = to_asked(messages)
    assert asked.history == (("Be brief.\n\n<image>\nWhat?", "A square."),)
    assert asked.question == "<image>\nAnd\nthis?"
    assert asked.images == ("a", "b")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages of nobody; expected user and assistant in turns"),
        ([{"role": "system", "content": "Be brief."}], "messages of nobody"),
        ([user("a"), {"role": "assistant", "content": "b"}], "messages of user, assistant"),
        ([user("Is <image> like <image>?", shown("a"))], "2 <image> placeholders in a message with 1 images"),
        ([user("<image>")], "1 <image> placeholders in a message with 0 images"),
        ([user({"type": "audio", "url": "a.wav"}, {"type": "audio", "url": "b.wav"})], "a second audio"),
    ],
)
def test_messages_that_no_conversation_has_are_refused(messages, words):
    with pytest.raises(ValueError, match=words):
        to_asked(messages)


def test_visuals_go_before_the_text_by_their_kind():
    image = draw_image(0)
    (message,) = to_messages("What?", [image, "a.png", "b.WAV", "c.mp4"])
    assert [part["type"] for part in message["content"]] == ["image", "image", "audio", "video", "text"]
    assert to_messages("Hello!", None) == to_messages("Hello!", []) == [user("Hello!")]
    assert kind_of({"array": [0.0], "sampling_rate": 8000}) == "audio"
    assert kind_of({"type": "image", "url": "a"}) == "image"


def test_samples_of_a_sound_become_a_file_that_reads_as_they_were():
    samples = np.array([0.0, 0.5, -1.0, 32767 / 32768, 2.0], dtype=np.float32)
    read, rate = read_wav(to_wav(samples, 8000))
    assert rate == 8000
    # The fifth is out of range.
    assert read[:, 0].tolist() == [0.0, 0.5, -1.0, 32767 / 32768, 32767 / 32768]
    assert as_media({"array": np.stack([samples, samples * 0]), "sampling_rate": 8000}) == to_wav(samples, 8000)
    assert to_asked([user({"type": "audio", "url": "a.wav"}, "What?")]).media == {"audio": "a.wav"}


def test_an_image_beside_a_sound_becomes_a_file(tmp_path):
    image = draw_image(1)
    (tmp_path / "image.png").write_bytes(as_media(image))
    assert open_image(tmp_path / "image.png").tobytes() == image.tobytes()


def test_batches_have_the_same_settings_and_begin_with_the_longest():
    contexts = ["aa", "b", "cccc", "ddd", "eeeee"]
    greedy, sampled = {"max_new_tokens": 4, "until": ["."]}, {"max_new_tokens": 4, "temperature": 1}
    other_order = {"until": ["."], "max_new_tokens": 4}
    batches = list(in_batches(contexts, [greedy, sampled, other_order, greedy, sampled], 2))
    assert batches == [[2, 3], [0], [4, 1]]
    assert list(in_batches([], [], 2)) == []


@pytest.mark.parametrize(
    ("answer", "until", "kept"),
    [
        ("red. Q: blue", ["Q:", "."], "red"),
        ("red \n\nblue", ["\n\n"], "red"),
        ("red", ["."], "red"),
        ("red.", [], "red."),
    ],
)
def test_an_answer_ends_before_the_first_of_its_ends(answer, until, kept):
    assert cut_at(answer, until) == kept


def test_the_entry_point_costs_no_torch():
    """lmms-eval imports it at every start, whatever model it is to run."""
    code = "import sys, llava_lite.eval.lmms_manifest; print({'torch', 'transformers', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_images_of_any_kind_are_images():
    assert kind_of(Image.new("L", (2, 2))) == "image"
