"""The text of the tiny world and the tokenizer that is made from it."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from playground.tiny import llm, text, world
from playground.tiny.make_base import world_tokenizer

DIGIT = np.array([3, world.EMPTY, 5, 7])
COLOUR = np.array([0, world.EMPTY, 2, 5])


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


def test_each_word_of_an_answer_is_one_token_before_the_end_token(tokenizer):
    for word in [*map(str, range(10)), *world.PLACES, *world.COUNTS, *world.COLOUR_NAMES]:
        after_colon = tokenizer(f"ASSISTANT: {word}</s>", add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(after_colon)[-2:] == [f"▁{word}", "</s>"]


def test_text_comes_back_from_its_tokens_and_begins_with_bos_once(tokenizer):
    output = "USER: red 3 top-left, blue 7 bottom-right.\nWhere is the 7? ASSISTANT: bottom-right"
    ids = tokenizer(output).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == output
    assert tokenizer.unk_token_id not in ids


def test_any_printable_text_can_be_read(tokenizer):
    assert tokenizer.unk_token_id not in tokenizer("Zebra? {x} [y] ~ 100% & more!").input_ids


def answer_by_hand(question):
    """Return what a person would answer, from the wording alone."""
    words = question.rstrip("?").split()
    if words[3] == "after":
        return str(int(words[-1]) + 1)
    if words[3] == "before":
        return str(int(words[-1]) - 1)
    if "plus" in words:
        return str(int(words[2]) + int(words[4]))
    height, side = words[-1].split("-")
    if "opposite" in words:
        return {"top": "bottom", "bottom": "top"}[height] + "-" + {"left": "right", "right": "left"}[side]
    return f"bottom-{side}" if "below" in words else f"{height}-right"


def test_questions_without_an_image_have_one_right_answer():
    rng = np.random.default_rng(0)
    for _ in range(300):
        question = text.text_question(rng)
        assert question.answer == answer_by_hand(question.text), question


def test_questions_of_a_scene_are_of_the_wanted_kinds_and_never_twice():
    rng = np.random.default_rng(1)
    for _ in range(50):
        asked = text.scene_questions(DIGIT, COLOUR, 3, rng, {"digit": 1, "where": 1})
        assert {q.kind for q in asked} <= {"digit", "where"}
        assert len({q.text for q in asked}) == len(asked) <= 3


def test_an_image_of_one_digit_is_never_searched():
    alone = np.array([world.EMPTY, 4, world.EMPTY, world.EMPTY])
    rng = np.random.default_rng(2)
    kinds = {
        q.kind
        for _ in range(50)
        for q in text.scene_questions(alone, alone, 2, rng, world.QUESTIONS.fromkeys(world.QUESTIONS, 1))
    }
    assert kinds == {"digit", "colour", "count", "caption"}


def test_notes_name_each_item_once_in_any_order():
    rng = np.random.default_rng(3)
    seen = {text.notes(DIGIT, COLOUR, rng) for _ in range(100)}
    assert len(seen) == 6
    expected = sorted(["red 3 top-left", "yellow 5 bottom-left", "blue 7 bottom-right"])
    assert all(sorted(output.rstrip(".").split(", ")) == expected for output in seen)


def test_only_answers_and_repetitions_weigh_in_full(tokenizer):
    rng = np.random.default_rng(4)
    for is_early in (True, False):
        ids, mask, weight = llm.batch_of(tokenizer, [llm.document(rng, is_early) for _ in range(16)])
        assert ids.shape == mask.shape == weight.shape
        is_known = (weight == 0) | (weight == 1) | torch.isclose(weight, torch.tensor(llm.TEXT_WEIGHT))
        assert is_known.all()
        assert (weight[mask == 0] == 0).all()
    document, spans = llm.document(np.random.default_rng(5), is_early=False)
    assert all(document[start:end].endswith(("</s>", ".")) for start, end in spans)


def test_repeated_notes_name_the_same_items_three_times():
    output, ((start, end),) = llm.repeated_notes(np.random.default_rng(6))
    once, again = output[:start], output[start:end]
    assert end == len(output)
    words = sorted(once.replace(",", "").replace(".", "").split())
    assert sorted(again.replace(",", "").replace(".", "").split()) == sorted(words * 2)
