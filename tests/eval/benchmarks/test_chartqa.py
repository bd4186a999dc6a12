"""ChartQA: its two parts, the tolerance for numbers, and both tables of Hugging Face."""

import pytest
from toy_eval_data import load, png, reds, write_images, write_json, write_table

WORD = "\nAnswer the question with a single word."


def write(directory, split="test"):
    """Write the files of ChartQA's repository: two questions of people, one of the program."""
    write_images(directory / split / "png", a=10, b=20)
    human = [
        {"imgname": "a.png", "query": "How many?", "label": "100"},
        {"imgname": "b.png", "query": "Which is largest?", "label": "Peru"},
    ]
    write_json(directory / split / f"{split}_human.json", human)
    augmented = [{"imgname": "a.png", "query": "What share?", "label": "5%"}]
    write_json(directory / split / f"{split}_augmented.json", augmented)


def test_people_come_first_and_one_word_is_asked_for(tmp_path):
    write(tmp_path)
    _, _, questions = load("chartqa", tmp_path)
    assert [(q.id, q.text, q.category, q.truth) for q in questions] == [
        ("human_0", "How many?" + WORD, "human", "100"),
        ("human_1", "Which is largest?" + WORD, "human", "Peru"),
        ("augmented_0", "What share?" + WORD, "augmented", "5%"),
    ]
    assert [reds(question) for question in questions] == [[10], [20], [10]]


def test_scores_are_those_of_a_person(tmp_path):
    write(tmp_path)
    benchmark, options, questions = load("chartqa", tmp_path)
    # 95 is within 5% of 100, "peru" differs in case alone, 0.06 is a fifth more than 5%.
    scores = benchmark.score(questions, ["95", "peru", "0.06"], options)
    assert (scores.main, scores.each) == (pytest.approx(200 / 3), [1, 1, 0])
    assert scores.table == {"human": 100, "augmented": 0}
    assert benchmark.write(tmp_path, questions, ["", "", ""], options) == []


def test_validation_split_is_read_from_its_own_directory(tmp_path):
    write(tmp_path, "val")
    assert len(load("chartqa", tmp_path, "val")[2]) == 3
    with pytest.raises(FileNotFoundError, match=r"ChartQA needs files[^$]*test_human.json[^$]*test_augmented.json"):
        load("chartqa", tmp_path)


def test_tables_of_hugging_face_give_the_same_questions(tmp_path):
    write(tmp_path / "own")
    _, _, own = load("chartqa", tmp_path / "own")
    texts = [question.text.removesuffix(WORD) for question in own]
    images = [png(colour) for colour in (10, 20, 10)]
    lmms = [
        {"question": text, "answer": q.truth, "type": f"{q.category}_test", "image": image}
        for text, q, image in zip(texts, own, images, strict=True)
    ]
    m4 = [
        {"query": text, "label": [q.truth], "human_or_machine": int(q.category == "augmented"), "image": image}
        for text, q, image in zip(texts, own, images, strict=True)
    ]
    for name, rows in (("lmms", lmms), ("m4", m4)):
        write_table(tmp_path / name / "data" / "test-00000-of-00001.parquet", rows)
        _, _, hub = load("chartqa", tmp_path / name)
        assert [q._replace(id=0, images=()) for q in hub] == [q._replace(id=0, images=()) for q in own]
        assert [reds(question) for question in hub] == [reds(question) for question in own]
