"""A real tokenizer and its own chat template: what is supervised, and that a prompt is what training has seen."""

import pytest
import torch

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.conversation import get_template
from llava_lite.conversation.tokenize import tokenize_rendered
from llava_lite.data.collator import DataCollatorForSupervisedDataset
from llava_lite.data.encode import RecordEncoder
from llava_lite.data.records.record import Record
from llava_lite.processing.processor import LlavaLiteProcessor

pytestmark = pytest.mark.slow

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = ("<image>\nWhat colour?", "And 12  34?", "\n\nWhy?\n")
ANSWERS = {
    "words": ("Red.", "Yes, 12.", "Because."),
    "empty": ("", "", ""),
    "blank": (" ", "\n", "\t\n "),
    "spaces around": (" red", "red ", "\n\n1. red\n\n2. blue\n\n"),
    "numbers": ("7", "3.14", "10 000"),
    "roles": ("assistant", "user\nWhat?", "system"),
    "letters of the world": ("\u6f22\u5b57\u3002", "e\u0301", "\U0001f642\u200d!"),
}
SYSTEMS = (None, "Be brief.", "\nBe brief.\n\n", " ", "")


def ids_of(tokenizer, text):
    """Return the ids of a text on its own, with one image where it says <image>."""
    before, *after = text.split("<image>")
    ids = tokenizer(before)["input_ids"]
    for part in after:
        ids += [IMAGE_TOKEN_INDEX, *tokenizer(part)["input_ids"]]
    return ids


def truth(tokenizer, pairs, system):
    """Return ids and labels from parts: no token reaches over the marks of ChatML, or from prompt to answer."""
    ids = ids_of(tokenizer, f"<|im_start|>system\n{DEFAULT_SYSTEM if system is None else system}<|im_end|>\n")
    labels = [IGNORE_INDEX] * len(ids)
    for question, answer in pairs:
        prompt = ids_of(tokenizer, f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        ids, labels = ids + prompt, labels + [IGNORE_INDEX] * len(prompt)
        if answer is not None:
            own = [*ids_of(tokenizer, answer), tokenizer.convert_tokens_to_ids("<|im_end|>")]
            end = ids_of(tokenizer, "\n")
            ids, labels = [*ids, *own, *end], [*labels, *own, *[IGNORE_INDEX] * len(end)]
    return ids, labels


def pairs_of(answers, num_turns):
    return list(zip(QUESTIONS, answers, strict=True))[:num_turns]


def turns_of(pairs):
    return [turn for pair in pairs for turn in zip(("human", "gpt"), pair, strict=True)]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_answers_with_their_end_token_are_supervised_and_nothing_else(smollm2_tokenizer, num_turns, answers, system):
    pairs = pairs_of(answers, num_turns)
    record = Record("r", ("a.png",), tuple(turns_of(pairs)), "toy.json[0]", system=system)
    ids, labels = RecordEncoder(smollm2_tokenizer, "chat")(record)
    assert (ids, labels) == truth(smollm2_tokenizer, pairs, system)
    assert [label for label in labels if label == smollm2_tokenizer.eos_token_id] == [2] * num_turns


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_a_prompt_is_what_training_has_seen_before_the_answer(smollm2_tokenizer, num_turns, system):
    pairs = pairs_of(ANSWERS["spaces around"], num_turns)
    template = get_template("chat")
    trained, _ = tokenize_rendered(
        template.with_turns(turns_of(pairs), system).render(smollm2_tokenizer), smollm2_tokenizer, True
    )
    pairs[-1] = (pairs[-1][0], None)
    asked, _ = tokenize_rendered(
        template.with_turns(turns_of(pairs), system).render(smollm2_tokenizer), smollm2_tokenizer, True
    )
    assert asked == truth(smollm2_tokenizer, pairs, system)[0] == trained[: len(asked)]


def test_the_processor_prompts_as_transformers_does(smollm2_tokenizer):
    processor = LlavaLiteProcessor(None, smollm2_tokenizer, conv_template="chat")
    turns = [("Hello, 12  34?", "Hi!\n\n1. one"), ("Bye?", None)]
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
        if text is not None
    ]
    expected = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    inputs = processor.encode([processor.render(turns)], [[]])
    assert inputs["input_ids"].tolist() == [expected["input_ids"]]


def test_end_tokens_stay_supervised_beside_padding_of_the_same_id(smollm2_tokenizer):
    assert smollm2_tokenizer.pad_token_id == smollm2_tokenizer.eos_token_id
    encoder = RecordEncoder(smollm2_tokenizer, "chat")
    batch = []
    for answers in (("Red.",), ("", "No.")):
        turns = turns_of(zip(("What?", "Really?"), answers, strict=False))
        ids, labels = encoder(Record("r", (), tuple(turns), "toy.json[0]"))
        batch.append({"id": "r", "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    out = DataCollatorForSupervisedDataset(smollm2_tokenizer.pad_token_id)(batch)
    assert out["attention_mask"].sum(dim=1).tolist() == [len(one["labels"]) for one in batch]
    assert (out["labels"] == smollm2_tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 2]
