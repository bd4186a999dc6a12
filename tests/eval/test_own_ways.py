"""Benchmarks that ask or score in their own way, from the command line: no padding, sampling, a judge."""

import json

import pytest
from toy_eval_data import png, write_images, write_json, write_lines, write_table
from toy_judge import serve

from llava_lite import cli, load, reply
from llava_lite.eval.scoring.mmmu import SUBJECTS

TOKENS = 5


@pytest.fixture(autouse=True)
def table_cache(tmp_path, monkeypatch):
    """Keep what `datasets` makes of tables out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "table_cache")


@pytest.fixture
def run(checkpoint, tmp_path):
    """Return a function: benchmark, flags -> status of `llava-lite eval` with a model that pads its images."""
    model = checkpoint(conv_template="v1", image_aspect_ratio="pad")

    def call(benchmark, *flags):
        words = [
            benchmark,
            "--model",
            model,
            "--data",
            tmp_path / "data",
            "--device",
            "cpu",
            "--out",
            tmp_path / "out",
        ]
        return cli.main(["eval", *map(str, [*words, "--max-new-tokens", TOKENS, *flags])])

    call.model = model
    return call


def texts_of(directory):
    """Return the answers in the order of the questions."""
    return [json.loads(line)["text"] for line in (directory / "answers.jsonl").read_text().splitlines()]


def test_images_of_qbench_are_not_padded(run, tmp_path):
    names = [f"{i}.png" for i in range(8)]
    (tmp_path / "data/images_llvisionqa").mkdir(parents=True)
    for i, name in enumerate(names):
        (tmp_path / "data/images_llvisionqa" / name).write_bytes(png(30 * i, (80, 20 + i)))
    records = [
        {"img_path": name, "question": "What is it?", "candidates": ["a", "b"], "correct_ans": "b"} for name in names
    ]
    write_json(tmp_path / "data/llvisionqa_dev.json", records)
    assert run("qbench") == 0
    model, processor = load(str(run.model), device="cpu")
    text = "What is it?\nChoose between one of the options as follows:\nA. a\nB. b\n"
    found = {}
    for ratio in ("pad", "square"):
        processor.image_aspect_ratio = ratio
        images = [tmp_path / "data/images_llvisionqa" / name for name in names]
        found[ratio] = [reply(model, processor, text, image, max_new_tokens=TOKENS) for image in images]
    assert found["pad"] != found["square"]
    assert texts_of(tmp_path / "out") == found["square"]
    assert json.loads((tmp_path / "out/run.json").read_text())["image_aspect_ratio"] == "square"


def test_flagperfs_way_samples_the_same_again_and_the_run_says_so(run, tmp_path):
    for subject in SUBJECTS:
        row = {"id": f"validation_{subject}_1", "question": f"What is {subject}?", "options": "['x', 'y']"}
        row |= {"answer": "A", "question_type": "multiple-choice", "image_1": png(len(subject))}
        write_table(tmp_path / f"data/{subject}/validation-00000-of-00001.parquet", [row], ("image_1",))
    texts = []
    for _ in range(2):
        assert run("mmmu", "--variant", "flagperf", "--limit", "6", "--overwrite") == 0
        texts.append(texts_of(tmp_path / "out"))
    assert texts[0] == texts[1]
    stored = json.loads((tmp_path / "out/run.json").read_text())
    assert (stored["variant"], stored["temperature"], stored["num_beams"], stored["seed"]) == ("flagperf", 1.0, 5, 42)
    assert run("mmmu", "--limit", "6", "--overwrite") == 0
    assert texts_of(tmp_path / "out") != texts[0]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["run"]["temperature"] == 0
    assert "random (seed 42)" in results["notes"][0]
    assert list(results["scores"])[:2] == ["Overall-Art and Design", "Art"]


def test_judged_answers_are_written_before_the_judge_is_asked(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava_lite.eval.judge.time.sleep", lambda seconds: None)
    data = tmp_path / "data"
    write_images(data / "images", **{"001": 10})
    write_lines(data / "questions.jsonl", [{"question_id": 0, "image": "001.png", "text": "Hm?", "category": "conv"}])
    write_lines(data / "context.jsonl", [{"image": "001.png", "caption": "A cat."}])
    write_lines(data / "answers_gpt4.jsonl", [{"question_id": 0, "text": "A cat."}])
    assert run("llavabench") == 0
    assert "judged, % of GPT-4's answers** | **not scored here" in capsys.readouterr().out
    (tmp_path / "out/answers.jsonl").unlink()
    assert run("llavabench", "--judge", "http://127.0.0.1:9") == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("llava-lite eval: the judge at http://127.0.0.1:9/v1/chat/completions did")
    assert "Traceback" not in said
    assert len(texts_of(tmp_path / "out")) == 1
    with serve(lambda request: "10 4") as server:
        assert run("llavabench", "--judge", server.address, "--judge-model", "toy") == 0
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert (stored["score"], stored["scores"]["conv"]) == (40, 40)
    note = "Judged by toy at 127.0.0.1, not by the paper's gpt-4-0314: do not compare the two."
    assert stored["notes"][0] == note
