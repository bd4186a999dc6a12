"""Turn scenes into text about them: the tokenizer's and the language model's only school.

A conversation's notes stand where an image will stand later: "red 3 top-left, blue 7 bottom-right." and then the
questions.
"""

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .world import COLOUR_NAMES, COUNTS, PLACES, QUESTIONS, Question, filled_places, items

MAX_LEN = 512
IMAGE_KINDS = tuple(QUESTIONS)


def order_question(rng):
    """Ask for the neighbour of a digit."""
    digit = int(rng.integers(0, 9))
    if rng.random() < 0.5:
        return Question("text", f"Which digit comes after {digit}?", str(digit + 1))
    return Question("text", f"Which digit comes before {digit + 1}?", str(digit))


def sum_question(rng):
    """Ask for a sum below ten."""
    total = int(rng.integers(0, 10))
    part = int(rng.integers(0, total + 1))
    return Question("text", f"What is {part} plus {total - part}?", str(total))


def world_question(rng):
    """Ask for a fact of this world that needs no image."""
    place = PLACES[rng.integers(0, 4)]
    side, other = place.split("-")
    return [
        Question("text", f"What is opposite of {place}?", PLACES[3 - PLACES.index(place)]),
        Question("text", f"What is below top-{other}?", f"bottom-{other}"),
        Question("text", f"What is right of {side}-left?", f"{side}-right"),
    ][rng.integers(0, 3)]


TEXT_QUESTIONS = (order_question, sum_question, world_question)


def text_question(rng):
    """Return a question that needs neither image nor notes."""
    return TEXT_QUESTIONS[rng.integers(0, len(TEXT_QUESTIONS))](rng)


def notes(digit, colour, rng):
    """Return the items of a scene in a random order."""
    return ", ".join(items(digit, colour, rng.permutation(4))) + "."


def one_caption(digit, colour):
    """Return the sentence about a scene of one digit."""
    return f"{COLOUR_NAMES[colour.max()]} {digit.max()}."


def one_digit_questions(digit, colour):
    """Return a question of each kind about a scene of one digit."""
    return [
        Question("digit", "Which digit is there?", str(digit.max())),
        Question("colour", "What colour is the digit?", COLOUR_NAMES[colour.max()]),
        Question("caption", "Describe the picture.", one_caption(digit, colour)),
    ]


def scene_questions(digit, colour, num, rng, weights):
    """Return `num` questions about one scene, kinds drawn by `weights` ({kind: fraction}), no question twice.

    Kinds that search are asked of scenes with two digits or more.
    """
    places = filled_places(digit)
    kinds = [kind for kind in weights if len(places) > 1 or kind not in ("where", "colour_of")]
    fraction = np.array([weights[kind] for kind in kinds], dtype=float)
    chosen = {}
    for kind in rng.choice(kinds, size=2 * num, p=fraction / fraction.sum()):
        question = QUESTIONS[kind](digit, colour, places[rng.integers(0, len(places))])
        chosen[question.text] = question
    return list(chosen.values())[:num]


def sentences():
    """Return one of each wording, for the tokenizer's vocabulary."""
    digit, colour = np.arange(4), np.arange(4)
    rng = np.random.default_rng(0)
    asked = [question(digit, colour, place) for question in QUESTIONS.values() for place in range(4)]
    asked += [text_question(rng) for _ in range(200)]
    return [part for question in asked for part in (question.text, f"\n{question.text}", question.answer)]


def make_tokenizer(frames):
    """Return a Llama-like tokenizer: a space belongs to the word after it, punctuation stands alone, BOS comes first.

    frames: further texts that must be readable, such as a rendered conversation.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = pre_tokenizers.Metaspace(prepend_scheme="first")
    punctuation = pre_tokenizers.Split(Regex(r"[?.,:\n]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([spaces, punctuation])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    printable = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    # Every word of the world comes often enough to become one token, alone and after a space.
    words = [*map(str, range(10)), *PLACES, *COUNTS, *COLOUR_NAMES]
    texts = (sentences() + [f"{word} {word}" for word in words] + list(frames)) * 50
    special = ["<unk>", "<s>", "</s>"]
    options = {"special_tokens": special, "initial_alphabet": printable, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, **options))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="right",
        model_max_length=MAX_LEN,
        clean_up_tokenization_spaces=False,
    )
