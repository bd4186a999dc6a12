"""Turn answers to MMMU into accuracy: the letter of a choice, or the number or words of an open answer.

MMMU (Yue et al. 2024, arXiv 2311.16502), by the rules of its own evaluation program. An answer in which it finds no
letter gets one at random; `Draws` is the generator of such letters and counts them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from llava_lite.eval.scoring.means import group_by

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS = tuple(subject for subjects in DOMAINS.values() for subject in subjects)
# How an option's letter may stand in an answer, tried in this order. lmms-eval wants no space before it.
FORMS = {"official": ("({})", " {} "), "lmms": ("({})", "{} ", "{}.")}
EDGES = ",.!?;:'"
# An answer is searched for the text of an option if it has more words than this.
MAX_WORDS_WITHOUT_TEXT = 5
KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 12,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e4
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.2 and .2
)


class Draws:
    """Draw a letter at random for an answer without one, and count.

    The official program draws from one generator with seed 42, so which letter an answer gets depends on those before
    it; this one is private, so nothing else shifts its sequence.
    """

    def __init__(self, seed: int = 42):
        self.count = 0
        self._random = random.Random(seed)

    def __call__(self, letters: Sequence[str]) -> str:
        self.count += 1
        return self._random.choice(letters)


def score(
    response: str,
    truth: str | Sequence[str],
    options: Mapping[str, str] | None = None,
    draw: Callable[[Sequence[str]], str] | None = None,
) -> float:
    """Return 1 if an answer is right, else 0.

    options: {letter: text} of a multiple-choice question, None for an open one. draw: for answers without a letter,
    such as `Draws()`; None counts them as wrong.
    """
    if options is None:
        return score_open(parse_open(response), truth)
    return score_choice(parse_choice(response, options, draw), truth)


def parse_choice(
    response: str,
    options: Mapping[str, str],
    draw: Callable[[Sequence[str]], str] | None = None,
    form: str = "official",
) -> str | None:
    """Return the letter that an answer names; one that is drawn, or None without `draw`, if it names none.

    options: {letter: text}. form: official, or lmms for lmms-eval's looser look at letters. Of several letters in the
    same form the one whose last place is furthest back counts; in a long answer without a letter, the options' texts.
    """
    for edge in EDGES:
        response = response.strip(edge)
    response = f" {response} "
    for pattern in FORMS[form]:
        named = [letter for letter in options if pattern.format(letter) in response]
        if named:
            # Both programs look for the last place of a bare letter between spaces, however they found it.
            place = pattern if pattern == "({})" else " {} "
            return max(named, key=lambda letter: response.rfind(place.format(letter)))
    if len(response.split()) > MAX_WORDS_WITHOUT_TEXT:
        lower = response.lower()
        named = [letter for letter, text in options.items() if text.lower() in lower]
        if named:
            return max(named, key=lambda letter: lower.rfind(options[letter].lower()))
    return None if draw is None else draw(list(options))


def score_choice(letter: str | None, truth: str | Sequence[str]) -> float:
    """Return 1 if a letter is the truth, or one of several, else 0; None is wrong."""
    return float(letter in ([truth] if isinstance(truth, str) else truth))


def parse_open(response: str) -> list[str | float]:
    """Return what an open answer may mean: the ends of its lines after words such as "answer ", and their numbers."""
    # The program also splits where a point stands before a capital, which lower case has left none of.
    whole = response.strip().strip(".").lower()
    lines = whole.split("\n")
    tails = [find_tail(line, KEY_WORDS) for line in lines[:-1]] + [find_tail(lines[-1], (*KEY_WORDS, "="))]
    keys = [tail for tail in tails if tail and tail not in set(EDGES)] or [whole]
    numbers = [number for key in keys for pattern in NUMBERS for number in pattern.findall(key)]
    return list(dict.fromkeys(value for text in (*keys, *numbers) for value in normalize(text)))


def find_tail(line: str, key_words: Sequence[str]) -> str:
    """Return the shortest text after the last place of a key word, "" if there is none."""
    shortest = ""
    for word in key_words:
        if word in line:
            tail = line.rpartition(word)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def normalize(text: str) -> list[str | float]:
    """Return a number, rounded to two decimals, or a text in lower case; one letter twice, with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def score_open(values: Sequence[str | float], truth: str | Sequence[str]) -> float:
    """Return 1 if a text among the values holds the text of a truth, or a number is that of a truth, else 0."""
    truths = [value for one in ([truth] if isinstance(truth, str) else truth) for value in normalize(one)]
    texts = [value for value in truths if isinstance(value, str)]
    return float(
        any(any(text in value for text in texts) if isinstance(value, str) else value in truths for value in values)
    )


def get_subject(question_id: str) -> str:
    """Return the subject in an id such as validation_Art_Theory_3; ValueError for an id without a known one."""
    subject = "_".join(question_id.split("_")[1:-1])
    if subject not in SUBJECTS:
        raise ValueError(f"{question_id!r} names no subject of MMMU; expected an id such as validation_Art_Theory_3.")
    return subject


def aggregate(scores: Sequence[float], subjects: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return {"Overall-<domain>", <subject>, "Overall": {"num", "acc"}} in the order of the program's table.

    acc is the mean over questions, 0 to 1; the program prints three decimals. Domains and subjects without questions
    are left out. Raises ValueError for an unknown subject.
    """
    groups = group_by(scores, subjects)
    unknown = sorted(groups.keys() - set(SUBJECTS))
    if unknown or not groups:
        raise ValueError(f"the subjects are {unknown if unknown else 'none'}; known: {', '.join(SUBJECTS)}.")
    table = {}
    for domain, names in DOMAINS.items():
        found = {name: groups[name] for name in names if name in groups}
        if found:
            table[f"Overall-{domain}"] = to_row([one for group in found.values() for one in group])
            table |= {name: to_row(group) for name, group in found.items()}
    return table | {"Overall": to_row(scores)}


def to_row(scores: Sequence[float]) -> dict[str, float]:
    """Return {"num", "acc"} of some questions."""
    return {"num": len(scores), "acc": sum(scores) / len(scores)}
