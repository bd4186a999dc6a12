"""The benchmarks of the tiny world: `llava-lite eval` reads their files, and their truths are those of the images."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from toy_eval_data import load

from playground.tiny import eval_data, world

NUM_TASKS = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    eval_data.write_eval_data(out, world.draw_tiles([world.HELD_OUT_FOLD], 1, rng), rng)
    return out


@pytest.mark.parametrize(
    ("name", "directory", "num"),
    [
        ("pope", "pope", 3 * 2 * eval_data.NUM_POPE_IMAGES),
        ("mme", "MME", NUM_TASKS * 2 * eval_data.NUM_MME_IMAGES),
        ("textvqa", "textvqa", eval_data.NUM_TEXTVQA_IMAGES),
    ],
)
def test_a_benchmark_reads_its_files_and_right_answers_get_all_points(root, name, directory, num):
    benchmark, options, questions = load(name, root / directory)
    assert len(questions) == num
    right = {
        "pope": lambda truth: truth,
        "mme": lambda truth: truth.answer.lower(),
        "textvqa": lambda truth: truth[0],
    }[name]
    scores = benchmark.score(questions, [right(question.truth) for question in questions], options)
    assert set(scores.each) == {1.0}
    if name == "mme":
        assert [scores.table[task] for task in ("existence", "count")] == [200.0] * NUM_TASKS
        assert scores.main is None
        assert scores.notes[0].startswith("Not asked: position, color, ")
    else:
        assert scores.main == 100.0


def test_yes_and_no_are_equally_frequent_in_each_part_and_task(root):
    for name, directory in (("pope", "pope"), ("mme", "MME")):
        _, _, questions = load(name, root / directory)
        truths = Counter(
            (one.category, (one.truth.answer if name == "mme" else one.truth).lower()) for one in questions
        )
        assert len(truths) == {"pope": 6, "mme": 2 * NUM_TASKS}[name]
        assert len(set(truths.values())) == 1


def test_empty_places_follow_the_rules_of_pope():
    def image(*filled):
        return "", np.where(np.isin(np.arange(4), filled), 5, world.EMPTY), None

    # Place 0 is filled in three images, 1 in two of these; 3 together with 2 alone.
    images = [image(0, 1), image(0, 1), image(0), image(2, 3), image(2)]
    empty = eval_data.empty_places(images, np.random.default_rng(0))
    for (_, digit, _), *chosen in zip(images, *empty.values(), strict=True):
        assert all(digit[place] == world.EMPTY for place in chosen)
    assert empty["popular"][3:] == [0, 0]
    assert empty["adversarial"][2] == 1
    assert empty["adversarial"][4] == 3
