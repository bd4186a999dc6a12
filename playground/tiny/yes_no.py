"""Turn scenes into questions whose answer is yes or no, in the manner of POPE and of MME's tasks.

No stage is trained on them: with a question of yes or no in every conversation of stages 2 and 3 the tiny model still
answered at chance.
"""

import numpy as np

from .world import COUNTS, EMPTY, PLACES, Question, filled_places


def existence_text(place):
    """Return the question whether a digit stands at a place."""
    return f"Is there a digit {PLACES[place]}?"


def existence_question(digit, holds, rng):
    """Ask whether there is a digit at a place; the image must have one that is filled and one that is empty."""
    return existence_text(rng.choice(np.flatnonzero((digit != EMPTY) == holds)))


def count_question(digit, holds, rng):
    """Ask whether there are so many digits."""
    count = len(filled_places(digit))
    asked = count if holds else rng.choice([one for one in range(1, 5) if one != count])
    return f"Are there {COUNTS[asked - 1]} digits?"


# By the names of their tasks in MME.
YES_NO = {"existence": existence_question, "count": count_question}


def yes_no_question(kind, digit, holds, rng):
    """Return a question of a kind about one scene, with the answer "yes" where `holds`, else "no"."""
    return Question(kind, YES_NO[kind](digit, holds, rng), "yes" if holds else "no")
