"""Turn the tiny Llama into one that reads Alpaca's template, which LLaMA-Adapter and LLaMA2-Accessory are trained in.

Its tokenizer has the words of the template, which else were letters; all other words keep what they meant. It is
trained on notes, which stand in front of a prompt as an image does in LLaMA2-Accessory, and still sees no image.
"""

import copy

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from llava_lite.conversation import get_template
from llava_lite.conversation.templates import CAPTION_QUESTIONS

from .llm import NOTE_KINDS, fit, random_items, short_quiz
from .text import make_tokenizer, notes, one_caption, one_digit_questions, scene_questions, text_question

TEMPLATE = "alpaca"


def alpaca_frames():
    """Return the texts of the template that must be readable."""
    questions = ["question", *dict.fromkeys(CAPTION_QUESTIONS.values())]
    return [get_template(TEMPLATE).with_turns([("human", q), ("gpt", "answer")]).render().text for q in questions]


def alpaca_tokenizer():
    """Return the tokenizer of the world, which reads Alpaca's template well."""
    return make_tokenizer(alpaca_frames())


def alpaca_document(rng):
    """Return a text and the character spans that count in full: notes, a question about them, its answer."""
    drawn = rng.random()
    if drawn < 0.2:
        return short_quiz(rng)
    digit, colour = random_items(rng, max_count=1 if drawn < 0.4 else 4)
    if drawn < 0.4:
        questions = one_digit_questions(digit, colour)
        front, question = one_caption(digit, colour), questions[rng.integers(0, len(questions))]
    elif drawn < 0.5:
        front, question = "", text_question(rng)
    else:
        front, question = notes(digit, colour, rng), scene_questions(digit, colour, 1, rng, NOTE_KINDS)[0]
    front = f"{front}\n" if front else front
    turns = [("human", question.text), ("gpt", question.answer)]
    rendered = get_template(TEMPLATE).with_turns(turns).render()
    return front + rendered.text, [(len(front) + start, len(front) + end) for start, end in rendered.answers]


@torch.no_grad()
def with_vocabulary(model, old_tokenizer, tokenizer):
    """Return a copy of a LlamaForCausalLM for another tokenizer; a new word begins as the mean of its old parts."""
    config = copy.deepcopy(model.config)
    config.vocab_size = len(tokenizer)
    grown = LlamaForCausalLM(config)
    state = {name: value for name, value in model.state_dict().items() if "embed_tokens" not in name}
    grown.load_state_dict({name: value for name, value in state.items() if "lm_head" not in name}, strict=False)
    old_ids, table = old_tokenizer.get_vocab(), model.get_input_embeddings().weight
    for word, index in tokenizer.get_vocab().items():
        parts = [old_ids[word]] if word in old_ids else parts_of(word, old_tokenizer)
        grown.get_input_embeddings().weight[index] = table[parts].mean(dim=0)
    return grown


def parts_of(word, tokenizer):
    """Return the ids of a word that the tokenizer does not know as one; a space before it is a part."""
    return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(word)]


def train_alpaca_llm(model, old_tokenizer, num_steps, seed, learning_rate=1e-3):
    """Return the model of another tokenizer after `num_steps` batches of fresh text, and that tokenizer."""
    torch.manual_seed(seed)
    tokenizer = alpaca_tokenizer()
    model = with_vocabulary(model, old_tokenizer, tokenizer)
    return fit(model, tokenizer, lambda rng, step: alpaca_document(rng), num_steps, seed, learning_rate), tokenizer


@torch.no_grad()
def alpaca_accuracy(model, tokenizer, seed, num=200):
    """Return the fraction of answers right on fresh notes, one question each, greedy."""
    rng, hits = np.random.default_rng(seed), 0
    for _ in tqdm(range(num), desc="questions about notes", mininterval=2):
        digit, colour = random_items(rng)
        question = scene_questions(digit, colour, 1, rng, NOTE_KINDS)[0]
        prompt = get_template(TEMPLATE).with_turns([("human", question.text), ("gpt", None)]).render().text
        ids = tokenizer(f"{notes(digit, colour, rng)}\n{prompt}", return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids.input_ids.shape[1] :]
        hits += tokenizer.decode(out, skip_special_tokens=True).strip() == question.answer
    return hits / num
