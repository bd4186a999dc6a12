"""Turn captions into CIDEr, by the program that papers use.

CIDEr (Vedantam et al. 2015, arXiv 1411.5726), computed by pycocoevalcap on the tokens of Stanford's PTB tokenizer,
which runs in Java. Other tokens give other figures, so without Java there is no score.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from llava_lite.eval.scoring.means import check_lengths

PACKAGE = "pycocoevalcap"


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Return CIDEr of all captions, 0 to 10, and that of each image; papers print the first times 100.

    predictions: one caption for each image; references: one or more for each. How rare words are is counted over these
    references: one image alone scores 0, and a part of a data set scores unlike the same images within all of it.
    Raises ImportError without pycocoevalcap, RuntimeError without Java, ValueError for an image without references.
    """
    check_lengths(predictions=predictions, references=references)
    bare = [i for i, captions in enumerate(references) if isinstance(captions, str) or not captions]
    if bare or not predictions:
        raise ValueError(
            f"image {bare[0]} has the references {references[bare[0]]!r}; expected a list of one caption or more."
            if bare
            else "0 captions have no CIDEr; expected one or more."
        )
    scorer, tokenizer = load_programs()
    truths = tokenize(tokenizer, references)
    found = tokenize(tokenizer, [[prediction] for prediction in predictions])
    total, each = scorer.compute_score(truths, found)
    return float(total), [float(score) for score in each]


def load_programs():
    """Return pycocoevalcap's scorer and tokenizer; errors that say what to install."""
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        raise ImportError(f"CIDEr is computed by {PACKAGE}: pip install {PACKAGE} (104 MB).") from error
    if shutil.which("java") is None:
        raise RuntimeError(
            "CIDEr is defined on the tokens of Stanford's PTB tokenizer, and java, which runs it, is not on the PATH. "
            "Install a Java runtime (apt-get install default-jre-headless); other tokens would give another figure."
        )
    return Cider(), PTBTokenizer()


def tokenize(tokenizer, captions: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Return {image: captions as tokens with spaces between}; RuntimeError if the tokenizer loses a caption.

    The tokenizer gets one caption a line and pairs lines with captions by position, so a line break inside a caption
    would shift all after it.
    """
    lines = {i: [{"caption": " ".join(caption.split())} for caption in group] for i, group in enumerate(captions)}
    found = tokenizer.tokenize(lines)
    lost = [i for i, group in lines.items() if len(found.get(i, [])) != len(group)]
    if lost:
        raise RuntimeError(
            f"the PTB tokenizer returned {len(found.get(lost[0], []))} of the {len(lines[lost[0]])} captions of image "
            f"{lost[0]}; see its messages above."
        )
    return found
