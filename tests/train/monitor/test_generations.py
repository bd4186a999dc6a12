"""A few held-out records are answered in training, and the answers written down."""

import json
import logging

import pytest
import torch
from conftest import CHATML

from llava_lite.train.monitor.generations import (
    GENERATIONS,
    begin_answers,
    decode,
    generate_answers,
    prompt_and_answer,
    report_answers,
    write_answers,
)


def test_prompt_ends_where_the_first_answer_begins():
    ids = torch.tensor([1, 5, 6, 7, 2, 8, 9, 2])
    labels = torch.tensor([-100, -100, -100, 7, 2, -100, 9, 2])
    prompt, answer = prompt_and_answer(ids, labels)
    assert prompt.tolist() == [1, 5, 6]
    assert answer.tolist() == [7, 2]


def test_answer_at_the_end_of_a_record():
    _, answer = prompt_and_answer(torch.tensor([1, 5, 6]), torch.tensor([-100, 5, 6]))
    assert answer.tolist() == [5, 6]


def test_decoded_text_has_neither_images_nor_special_tokens(toy_tokenizer):
    ids = torch.tensor([1, -200, -200, *toy_tokenizer("The square is red.", add_special_tokens=False).input_ids, 2])
    assert decode(toy_tokenizer, ids) == "The square is red."


def test_answers_are_what_the_model_generates(toy_model, toy_tokenizer):
    model = toy_model()
    toy_tokenizer.pad_token = toy_tokenizer.unk_token
    image = torch.randn(1, 3, 32, 32)
    words = toy_tokenizer(" What colour is the square?", add_special_tokens=False).input_ids
    answer = toy_tokenizer(" The square is red.", add_special_tokens=False).input_ids
    ids = torch.tensor([1, *[-200] * 16, *words, *answer, 2])
    labels = torch.tensor([-100] * (17 + len(words)) + [*answer, 2])
    example = {"id": "r1", "input_ids": ids, "labels": labels, "images": image}
    answers = generate_answers(model, toy_tokenizer, [example], "cpu", max_new_tokens=6)
    expected = model.generate(ids[None, : 17 + len(words)], images=image, max_new_tokens=6, do_sample=False)
    assert answers[0]["id"] == "r1"
    assert answers[0]["answer"] == decode(toy_tokenizer, expected[0])
    assert answers[0]["expected"] == "The square is red."
    assert answers[0]["prompt"] == "What colour is the square?"


def test_answers_are_written_and_shown(tmp_path, caplog):
    answer = {"id": "r", "prompt": "p", "expected": "é", "answer": "b"}
    write_answers(tmp_path, 5, [answer])
    write_answers(tmp_path, 6, [answer])
    write_answers(tmp_path, 7, [answer | {"id": "\ud800"}])
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"step": 5, **answer}, {"step": 6, **answer}, {"step": 7, **answer, "id": "\ud800"}]
    with caplog.at_level(logging.INFO):
        report_answers([], 5, [answer])
    assert "step 5, r: expected 'é', answered 'b'" in caplog.text


@pytest.mark.parametrize(
    ("name", "end"), [("mpt", "<|im_end|>"), ("chat", "<|im_end|>"), ("llava_v0", "###"), (None, "</s>")]
)
def test_an_answer_ends_at_the_end_token_of_the_prompt_format(toy_model, toy_tokenizer, name, end):
    toy_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    toy_tokenizer.chat_template = CHATML
    toy_tokenizer.pad_token = toy_tokenizer.unk_token
    model = toy_model(conv_template=name)
    model.resize_token_embeddings(len(toy_tokenizer))
    output = toy_tokenizer(f"The square is red.{end} Human: How many?", add_special_tokens=False).input_ids
    labels = torch.tensor([-100, *output])
    example = {"id": "r", "input_ids": torch.tensor([1, *output]), "labels": labels}
    steps = iter([*output, 0])

    def dictate(head, inputs, logits):
        """Let one token win at each step."""
        forced = torch.full_like(logits, -torch.inf)
        forced[..., next(steps)] = 0
        return forced

    model.lm_head.register_forward_hook(dictate)
    (answer,) = generate_answers(model, toy_tokenizer, [example], "cpu", max_new_tokens=len(output))
    assert answer["answer"] == "The square is red."


def test_an_answer_ends_at_the_next_token_once_it_is_stopped(toy_model, toy_tokenizer):
    model = toy_model()
    toy_tokenizer.pad_token = toy_tokenizer.unk_token
    ids = torch.tensor([1, 5, 6, 7])
    example = {"id": "a", "input_ids": ids, "labels": torch.where(ids == 7, ids, -100)}
    calls = []
    model.register_forward_hook(lambda *args: calls.append(0))
    generate_answers(model, toy_tokenizer, [example], "cpu", max_new_tokens=6, is_stopped=lambda: len(calls) == 2)
    assert len(calls) == 2


@pytest.mark.parametrize(("is_answered", "steps"), [(True, [2, 4]), (False, [2])])
def test_a_resumed_run_drops_the_answers_that_it_gives_again(tmp_path, is_answered, steps):
    begin_answers(tmp_path, 4, is_answered)
    assert not (tmp_path / GENERATIONS).exists()
    for step in (2, 4, 6):
        write_answers(tmp_path, step, [{"id": "a", "prompt": "b", "expected": "c", "answer": "d"}])
    begin_answers(tmp_path, 4, is_answered)
    lines = (tmp_path / GENERATIONS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == steps
