"""Files of answers: what a kill leaves, what another run left, and the order of the questions."""

import json

import pytest

from llava_lite.eval.answers import AnswerFile, claim, compare, forget, merge, part_name, read_answers, write_merged
from llava_lite.eval.questions import Question, chunk_of

QUESTIONS = [Question(7, "What?"), Question(7, "Who?"), Question("x", "Which?", saved="<image>\nWhich?")]


def answer(directory, positions, text="it", num_chunks=1, index=0):
    """Append answers at some positions."""
    AnswerFile(directory, num_chunks, index).append({i: (QUESTIONS[i], text) for i in positions}, "model")


def test_equal_ids_keep_their_own_answers(tmp_path):
    answer(tmp_path, [1], "second")
    answer(tmp_path, [0], "first")
    answer(tmp_path, [2], "third")
    lines = merge(tmp_path, QUESTIONS, 1)
    assert [(line["question_id"], line["text"]) for line in lines] == [(7, "first"), (7, "second"), ("x", "third")]
    assert lines[2]["prompt"] == "<image>\nWhich?"


@pytest.mark.parametrize("text", ["two\nlines", "a\u2028b\x85c", "", "ÄÖ 你好"])
def test_any_text_comes_back(text, tmp_path):
    answer(tmp_path, [0, 1], text)
    assert [read_answers(tmp_path, QUESTIONS[:2])[i]["text"] for i in (0, 1)] == [text] * 2


def test_half_of_a_pair_of_characters_comes_back(tmp_path):
    AnswerFile(tmp_path).append({0: (Question("i\ud83d", "What?"), "a\ud83d")}, "model")
    lines = merge(tmp_path, [Question("i\ud83d", "What?")], 1)
    assert (lines[0]["question_id"], lines[0]["text"]) == ("i\ud83d", "a\ud83d")
    path = write_merged(tmp_path, lines, None)
    # The file itself is text as any other, in JSON's own spelling.
    assert r"a\ud83d" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8"))["text"] == "a\ud83d"


@pytest.mark.parametrize("kept", [0, 1])
def test_a_cut_line_is_left_out_and_removed(kept, tmp_path):
    answer(tmp_path, range(kept + 1))
    path = tmp_path / part_name(1, 0)
    path.write_bytes(path.read_bytes()[:-9])
    assert sorted(read_answers(tmp_path, QUESTIONS)) == [*range(kept)]
    answer(tmp_path, [2])
    assert sorted(read_answers(tmp_path, QUESTIONS)) == [*range(kept), 2]


def test_lines_that_are_no_answers_are_named(tmp_path):
    path = tmp_path / part_name(1, 0)
    path.write_text('{"question_id": 1, "text": "of LLaVA", "metadata": {}}\n')
    with pytest.raises(
        ValueError, match=r"part_0_of_1\.jsonl, line 1 is no answer of llava-lite eval \(KeyError: 'index'"
    ):
        read_answers(tmp_path, QUESTIONS)
    path.write_text('{"text": null, "metadata": {"index": 0}}\n')
    with pytest.raises(ValueError, match="line 1 is no answer"):
        read_answers(tmp_path, QUESTIONS)
    path.unlink()
    answer(tmp_path, [0, 2])
    with pytest.raises(ValueError, match=r"line 2 answers question 2, and there are 2\. It is of another run"):
        read_answers(tmp_path, QUESTIONS[:2])


def test_a_run_owns_its_directory(tmp_path):
    # Without an answer there is nothing to mix: a wrong first call does not hold the directory.
    claim(tmp_path / "out", {"model": "wrong"})
    claim(tmp_path / "out", {"model": "a", "flags": (1, 2)})
    answer(tmp_path / "out", [0])
    claim(tmp_path / "out", {"model": "a", "flags": [1, 2]})
    with pytest.raises(ValueError, match=r"model is 'b' now and was 'a'\. Write elsewhere, or --overwrite"):
        claim(tmp_path / "out", {"model": "b", "flags": [1, 2]})
    with pytest.raises(ValueError, match="flags is None now and was"):
        claim(tmp_path / "out", {"model": "a"})
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/results.json").write_text("{}")
    forget(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    forget(tmp_path / "none")


def test_answers_of_an_unknown_run_are_not_taken(tmp_path):
    answer(tmp_path, [0])
    for call in (claim, compare):
        with pytest.raises(
            ValueError, match=r"holds answers and no run\.json that says of which run\. Write elsewhere"
        ):
            call(tmp_path, {"model": "a"})
    for text, says in (
        ("{", r"run\.json is broken \(Expecting"),
        ("", "is broken"),
        ("[1]", "holds a list; expected"),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            claim(tmp_path, {"model": "a"})
    forget(tmp_path)
    claim(tmp_path, {"model": "a"})


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Question(8, "What?"), r"line 1 answers another question: its question_id is 7, and that of question 0 is 8"),
        (Question("7", "What?"), "its question_id is 7, and that of question 0 is '7'"),
        (Question(7, "Why?"), r"its prompt is 'What\?', and that of question 0 is 'Why\?'"),
    ],
)
def test_an_answer_to_another_question_is_not_taken_for_this_one(other, says, tmp_path):
    answer(tmp_path, [0])
    with pytest.raises(ValueError, match=says):
        read_answers(tmp_path, [other])


def test_chunks_are_llavas_and_the_last_ones_may_be_empty():
    assert [[*chunk_of(7, 3, index)] for index in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [[*chunk_of(3, 5, index)] for index in range(5)] == [[0], [1], [2], [], []]


def test_merged_file_has_the_order_of_the_questions_and_scores(tmp_path):
    answer(tmp_path, [2, 0, 1])
    path = write_merged(tmp_path, merge(tmp_path, QUESTIONS, 1), [1.0, None, 0.0])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["metadata"]["index"] for line in lines] == [0, 1, 2]
    assert [line.get("score") for line in lines] == [1.0, None, 0.0]
    write_merged(tmp_path, merge(tmp_path, QUESTIONS, 1), None)
    assert "score" not in path.read_text()
