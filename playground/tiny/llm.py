"""Turn text into a small Llama: pre-training of the language model, which never sees an image.

It is trained on conversations about written notes; stages 1 to 3 then put images where the notes stood.
Letters: `B` documents, `T` tokens.
"""

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from llava_lite.conversation import get_template

from .text import MAX_LEN, notes, scene_questions, text_question
from .world import COLOURS, EMPTY, items

BATCH = 48
# The loss is on answers; system prompt, questions and random notes weigh little, to keep the rest of the text alive.
TEXT_WEIGHT = 0.05
NOTE_KINDS = {"digit": 3, "colour": 2, "count": 1, "where": 3, "colour_of": 3, "caption": 1}
# Looking up comes first, on short documents: without this a model of this size picks an item at random for ever.
LOOK_UP_FRACTION = 0.45
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LEN,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}


def random_items(rng, max_count=4):
    """Return digits [4] and colours [4] of one scene that nobody draws."""
    count = rng.integers(1, max_count + 1)
    filled = rng.permutation(4) < count
    digit = np.where(filled, rng.permutation(10)[:4], EMPTY)
    return digit, np.where(filled, rng.integers(0, len(COLOURS), 4), EMPTY)


def noted_conversation(rng):
    """Return turns about written notes."""
    digit, colour = random_items(rng)
    questions = scene_questions(digit, colour, int(rng.integers(2, 7)), rng, NOTE_KINDS)
    first = f"{notes(digit, colour, rng)}\n{questions[0].text}"
    return [turn for i, q in enumerate(questions) for turn in (("human", q.text if i else first), ("gpt", q.answer))]


def plain_conversation(rng):
    """Return turns that need no notes."""
    questions = [text_question(rng) for _ in range(rng.integers(1, 4))]
    return [turn for q in questions for turn in (("human", q.text), ("gpt", q.answer))]


def notes_in_order(digit, colour, order, rng):
    """Return the items of a scene in a random order, each with its (colour, digit, place) in the given order."""
    texts = [text.split() for text in items(digit, colour, rng.permutation(4))]
    return ", ".join(" ".join(words[i] for i in order) for words in texts) + "."


def repeated_notes(rng):
    """Return notes repeated three times, their words in another order each time, and the span of the repetitions.

    Repetition is where a small model finds out how to look things up (Olsson et al. 2022, "In-context learning and
    induction heads", https://arxiv.org/abs/2209.11895); the other orders teach it to do so from any word of an item.
    """
    digit, colour = random_items(rng)
    once = notes(digit, colour, rng)
    text = " ".join([once, *(notes_in_order(digit, colour, rng.permutation(3), rng) for _ in range(2))])
    return text, ((len(once), len(text)),)


def short_quiz(rng):
    """Return notes, questions and answers without any template, and the spans of the answers."""
    digit, colour = random_items(rng)
    text, answers = notes(digit, colour, rng) + "\n", []
    for question in scene_questions(digit, colour, 5, rng, NOTE_KINDS):
        start = len(text) + len(question.text)
        text += f"{question.text} {question.answer}\n"
        answers.append((start, len(text)))
    return text, tuple(answers)


def document(rng, is_early):
    """Return a text and the character spans that count in full. is_early: short ones only."""
    drawn = rng.random()
    if is_early:
        return repeated_notes(rng) if drawn < 0.5 else short_quiz(rng)
    if drawn < 0.1:
        return repeated_notes(rng)
    rendered = (
        get_template("v1").with_turns(plain_conversation(rng) if drawn < 0.2 else noted_conversation(rng)).render()
    )
    return rendered.text, rendered.answers


def batch_of(tokenizer, documents):
    """Return input_ids and attention_mask [B, T], and the weight [B, T] of each token as a target."""
    batch = tokenizer([text for text, _ in documents], padding=True, return_offsets_mapping=True, return_tensors="pt")
    offsets = batch["offset_mapping"]  # [B, T, 2]
    weight = TEXT_WEIGHT * batch["attention_mask"].float()
    for row, (_, spans) in enumerate(documents):
        for start, end in spans:
            weight[row, (offsets[row, :, 0] < end) & (offsets[row, :, 1] > start)] = 1.0
    return batch["input_ids"], batch["attention_mask"], weight


def weighted_loss(logits, input_ids, weight):
    """Return the weighted mean of the next-token losses. logits: [B, T, V]."""
    target = input_ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target, reduction="none")
    weight = weight[:, 1:].flatten()
    return (loss * weight).sum() / weight.sum()


def train_llm(tokenizer, num_steps, seed, learning_rate=2e-3):
    """Return a LlamaForCausalLM trained on `num_steps` batches of fresh text."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.pad_token_id
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES, **ends))
    num_early = LOOK_UP_FRACTION * num_steps
    return fit(model, tokenizer, lambda rng, step: document(rng, step < num_early), num_steps, seed, learning_rate)


def fit(model, tokenizer, draw_document, num_steps, seed, learning_rate):
    """Return the model after `num_steps` batches of documents, each from `draw_document(rng, step)`; in eval mode."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps, pct_start=0.03)
    bar = tqdm(range(num_steps), desc="llm", unit="step", mininterval=2)
    for step in bar:
        documents = [draw_document(rng, step) for _ in range(BATCH)]
        input_ids, attention_mask, weight = batch_of(tokenizer, documents)
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = weighted_loss(logits, input_ids, weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def notes_accuracy(model, tokenizer, seed, num=300):
    """Return {kind: fraction of answers right} on fresh notes of two items or more, one question each, greedy."""
    rng = np.random.default_rng(seed)
    right = {}
    for kind in tqdm(NOTE_KINDS, desc="questions about notes", unit="kind"):
        hits = []
        for _ in range(num // len(NOTE_KINDS)):
            digit, colour = random_items(rng)
            question = scene_questions(digit, colour, 1, rng, {kind: 1, "count": 1e-9})[0]
            turns = [("human", f"{notes(digit, colour, rng)}\n{question.text}"), ("gpt", None)]
            ids = tokenizer(get_template("v1").with_turns(turns).render().text, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids.input_ids.shape[1] :]
            hits.append(tokenizer.decode(out, skip_special_tokens=True).strip() == question.answer)
        right[kind] = sum(hits) / len(hits)
    return right
