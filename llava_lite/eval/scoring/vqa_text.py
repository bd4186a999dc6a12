"""Turn a free answer and the answers of ten people into a score: the soft accuracy of VQA.

VQA (Antol et al. 2015, arXiv 1505.00468, section 3.3) compares texts after normalisation. Two normalisations are in
use: EvalAI's, which LLaVA takes from M4C (TextVQA, VizWiz, and every upload), and the same without its first step,
which lmms-eval takes for VQAv2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

NUM_ANSWERS = 10
# In this order; . is treated after them, and : ' $ % # & * stay.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
# M4C's pattern begins with a mistyped look-behind that is always true, and its flag stands where the count goes.
POINT = re.compile(r"\.(?!\d)")
MAX_POINTS = int(re.UNICODE)
ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""


def contractions() -> dict[str, str]:
    """Return {word: replacement}: each contraction by each of its spellings that lack one apostrophe.

    The last three are M4C's own. Keys with capitals match no word, since words are in lower case by then.
    """
    table = {}
    for word in CONTRACTED.split():
        for place in (match.start() for match in re.finditer("'", word)):
            table[word[:place] + word[place + 1 :]] = word
    return table | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


CONTRACTIONS = contractions()


def process_answer(text: str) -> str:
    """Return an answer as EvalAI compares it (the answer processor of M4C, which LLaVA and lmms-eval share)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return process_vqav2_answer(text.strip())


def process_vqav2_answer(text: str) -> str:
    """Return an answer as lmms-eval compares it in VQAv2: without the first step of `process_answer`."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return process_words(process_punctuation(text))


def process_punctuation(text: str) -> str:
    """Return a text without punctuation marks: each is deleted or becomes a space.

    A mark is deleted everywhere if it stands beside a space anywhere, or if a comma stands in a number; both are
    judged on the text as it came in.
    """
    found = text
    has_comma_in_number = COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if is_loose or has_comma_in_number else " ")
    return POINT.sub("", found, count=MAX_POINTS)


def process_words(text: str) -> str:
    """Return a text in lower case with digits for number words, without articles, contractions with apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str], process: Callable[[str], str] = process_answer) -> float:
    """Return the soft accuracy of an answer, 0 to 1: 0, 0.3, 0.6, 0.9 or 1 for 0, 1, 2, 3 or more people who agree.

    It is the mean of min(1, matches / 3) over the ten sets that leave one person out. answers: of ten people; process:
    the normalisation, applied to both sides. Raises ValueError for another number of answers.
    """
    if isinstance(answers, str) or len(answers) != NUM_ANSWERS:
        found = f"the text {answers!r}" if isinstance(answers, str) else f"{len(answers)} answers {list(answers)!r}"
        raise ValueError(f"soft accuracy compares with the answers of {NUM_ANSWERS} people; got {found}.")
    text = process(prediction)
    num_equal = sum(process(answer) == text for answer in answers)
    # Three times the sum over the sets, in whole numbers: rounding would make 0.8999... of 0.9.
    without_one = num_equal * min(3, num_equal - 1) + (NUM_ANSWERS - num_equal) * min(3, num_equal)
    return without_one / (3 * NUM_ANSWERS)
