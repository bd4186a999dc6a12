"""CIDEr by pycocoevalcap: what is said where it cannot run, and its figures where it can."""

import math
import shutil
import sys
from collections import Counter
from types import ModuleType

import pytest

from llava_lite.eval.scoring.cider import cider

REFERENCES = [
    ["A cat is sitting on a mat.", "a cat on the mat", "The cat sits"],
    ["A red bus, in the street!", "a bus drives down the street"],
    ["Two dogs run over the grass.", "two brown dogs running on grass"],
]
CAPTIONS = ["A cat sitting on the mat", "a red bus", "a bus in the street"]


def install(monkeypatch, tokenize):
    """Put a stand-in for pycocoevalcap in place: its tokenizer is `tokenize`, its scorer finds equal captions."""
    scorer, tokenizer = ModuleType("cider"), ModuleType("ptbtokenizer")
    scorer.Cider = type(
        "Cider",
        (),
        {"compute_score": lambda self, truths, found: (0.5, [float(found[i][0] in truths[i]) for i in truths])},
    )
    tokenizer.PTBTokenizer = type("PTBTokenizer", (), {"tokenize": lambda self, captions: tokenize(captions)})
    modules = {
        "": None,
        ".cider": None,
        ".cider.cider": scorer,
        ".tokenizer": None,
        ".tokenizer.ptbtokenizer": tokenizer,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"pycocoevalcap{name}", module or ModuleType(name))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


def take_lines(captions):
    return {image: [caption["caption"] for caption in group] for image, group in captions.items()}


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    # The inner one too: it is found without the outer one where a test before has imported it.
    for name in ("pycocoevalcap", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        cider(CAPTIONS, REFERENCES)


def test_without_java_there_is_no_score(monkeypatch):
    install(monkeypatch, take_lines)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="java, which runs it, is not on the PATH"):
        cider(CAPTIONS, REFERENCES)


def test_a_line_break_in_a_caption_shifts_nothing(monkeypatch):
    install(monkeypatch, take_lines)
    captions = ["a\ncat", "a\r\nbus\u2028here", "", "dogs "]
    assert cider(captions, [["a cat"], ["a bus here"], ["x"], ["dogs"]]) == (0.5, [1, 1, 0, 1])


def test_a_caption_that_the_tokenizer_loses_is_an_error(monkeypatch):
    install(monkeypatch, lambda captions: dict(list(take_lines(captions).items())[:-1]))
    with pytest.raises(RuntimeError, match="0 of the 2 captions of image 2"):
        cider(CAPTIONS, REFERENCES)


def test_images_need_references():
    with pytest.raises(ValueError, match=r"image 1 has the references \[\]"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="image 0 has the references 'a cat'"):
        cider(["a"], ["a cat"])
    with pytest.raises(ValueError, match="0 captions"):
        cider([], [])
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        cider(["a", "b"], [["a"]])


def cider_by_hand(captions, references):
    """Return CIDEr of each image from its formula. captions: words; references: lists of words."""

    def count(words):
        return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, 5)]

    seen = Counter()
    for group in references:
        seen.update({gram for words in group for grams in count(words) for gram in grams})

    def weigh(words):
        total = math.log(len(references))
        return [
            {gram: number * (total - math.log(max(1, seen[gram]))) for gram, number in grams.items()}
            for grams in count(words)
        ]

    def norm(weights):
        return math.sqrt(sum(value * value for value in weights.values()))

    scores = []
    for words, group in zip(captions, references, strict=True):
        mine, found = weigh(words), []
        for other in group:
            for left, right in zip(mine, weigh(other), strict=True):
                product = sum(min(value, right.get(gram, 0)) * right.get(gram, 0) for gram, value in left.items())
                length = norm(left) * norm(right)
                # The program measures lengths in pairs of words.
                gap = max(0, len(words) - 1) - max(0, len(other) - 1)
                found.append((product / length if length else 0) * math.exp(-gap * gap / 72))
        scores.append(10 * sum(found) / len(found))
    return scores


@pytest.fixture
def programs():
    pytest.importorskip("pycocoevalcap.cider.cider", reason="pip install pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("needs Java")


def test_figures_are_those_of_the_formula_on_ptb_tokens(programs):
    def split(text):
        return text.lower().replace(".", "").replace(",", "").replace("!", "").split()

    expected = cider_by_hand([split(text) for text in CAPTIONS], [[split(text) for text in g] for g in REFERENCES])
    total, each = cider(CAPTIONS, REFERENCES)
    assert each == pytest.approx(expected)
    assert total == pytest.approx(sum(expected) / 3)
    assert 0 < total < 10


def test_one_image_scores_nothing(programs):
    assert cider(["a cat"], [["a cat"]]) == (0, [0])


def test_empty_and_foreign_captions_keep_their_places(programs):
    total, each = cider(["", "caf\u00e9 \u732b here now", ""], [["a cat"], ["caf\u00e9 \u732b here now"], ["a dog"]])
    assert each == [0, pytest.approx(10), 0]
    assert total == pytest.approx(10 / 3)
