"""`llava-lite answer`: a file of questions becomes a file of answers, in their order and after a kill too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_lite import cli, load, reply
from llava_lite.eval.answers import part_name
from llava_lite.eval.hold import hold
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor

QUESTIONS = [
    {"question_id": 7, "image": "0.png", "text": "What colour is the square?", "category": "conv"},
    {"question_id": "b", "text": "Hello!"},
    {"question_id": 7, "image": "1.png", "text": "How many circles are there? There are three."},
    {"question_id": 9, "image": ["1.png", "0.png"], "text": "What is it?"},
    {"question_id": 10, "image": "0.png", "text": "Who is there?"},
]


@pytest.fixture
def given(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """The words MODEL QUESTIONS.jsonl OUT.jsonl --image-folder DIR, and flags for short answers on a CPU."""
    model = toy_model(conv_template="v1", image_aspect_ratio="pad")
    processor = LlavaLiteProcessor.from_config(
        model.config, toy_tokenizer, load_image_processor(toy_tower_dir("clip"))
    )
    for part in (model, toy_tokenizer, processor.image_processor):
        part.save_pretrained(tmp_path / "llava-toy")
    for i, colour in enumerate(((200, 80, 10), (20, 90, 200))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30 + 20 * i), colour).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    words = [
        tmp_path / "llava-toy",
        tmp_path / "q.jsonl",
        tmp_path / "out.jsonl",
        "--image-folder",
        tmp_path / "images",
    ]
    return [*map(str, words), "--device", "cpu", "--max-new-tokens", "6"]


def answer(given, *flags):
    """Run the command; return its status."""
    return cli.main(["answer", *given, *flags])


def lines_of(path):
    """Return the objects of a file."""
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def as_paths(directory, names):
    """Return the paths of one image or of several."""
    return [os.path.join(directory, name) for name in ([names] if isinstance(names, str) else names)]


def expected(given):
    """Return the answers of `reply` to each question alone."""
    model, processor = load(given[0], device="cpu")
    images = [None if "image" not in q else as_paths(given[4], q["image"]) for q in QUESTIONS]
    return [
        reply(model, processor, question["text"], image, max_new_tokens=6)
        for question, image in zip(QUESTIONS, images, strict=True)
    ]


@pytest.mark.parametrize("batch", ["1", "3"])
def test_lines_are_llavas_in_the_order_of_the_questions(given, batch, capsys):
    assert answer(given, "--batch-size", batch) == 0
    lines = lines_of(given[2])
    assert [line["question_id"] for line in lines] == [7, "b", 7, 9, 10]
    assert [line["prompt"] for line in lines] == [question["text"] for question in QUESTIONS]
    assert [line["text"] for line in lines] == expected(given)
    assert set(lines[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert capsys.readouterr().out.endswith(f"wrote 5 answers to {given[2]}\n")
    assert not os.path.exists(f"{given[2]}.parts")


def test_chunks_are_joined_when_all_are_answered(given, capsys):
    assert answer(given, "--num-chunks", "2", "--chunk-idx", "1") == 0
    assert "chunk 1 of 2 is answered" in capsys.readouterr().out
    assert answer(given, "--num-chunks", "2") == 1
    assert "chunk 0 of 2 has 0 of 3 answers" in capsys.readouterr().err
    assert not os.path.exists(given[2])
    assert answer(given, "--num-chunks", "2", "--chunk-idx", "0") == 0
    assert answer(given, "--num-chunks", "2") == 0
    assert [line["text"] for line in lines_of(given[2])] == expected(given)


def test_run_goes_on_after_a_kill(given, monkeypatch):
    asked = []

    def dying(model, processor, texts, *args, **more):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(texts)
        return reply(model, processor, texts, *args, **more)

    monkeypatch.setattr("llava_lite.eval.asking.reply", dying)
    assert answer(given) == cli.EXIT_INTERRUPTED
    part = os.path.join(f"{given[2]}.parts", part_name(1, 0))
    with open(part, "rb+") as file:
        file.truncate(os.path.getsize(part) - 4)
    monkeypatch.setattr("llava_lite.eval.asking.reply", lambda *a, **k: asked.extend(a[2]) or reply(*a, **k))
    assert answer(given) == 0
    # The answer that the kill has cut is asked for again, the one before it is not.
    assert sorted(asked) == sorted([asked[1], *(question["text"] for question in QUESTIONS)])
    assert [line["text"] for line in lines_of(given[2])] == expected(given)


def test_other_settings_do_not_go_on_with_earlier_answers(given, capsys):
    answer(given, "--num-chunks", "2", "--chunk-idx", "1")
    assert answer(given, "--num-beams", "2") == 1
    assert "holds the answers of another run: num_beams is 2 now and was 1" in capsys.readouterr().err
    with open(given[1], "a") as file:
        file.write("\n")
    assert answer(given) == 1
    assert "holds the answers of another run: file is" in capsys.readouterr().err
    assert answer(given, "--overwrite") == 0


def test_file_that_is_there_stays(given, capsys):
    with open(given[2], "w") as file:
        file.write("mine")
    assert answer(given) == 1
    assert "out.jsonl is there already. Name another file, or --overwrite" in capsys.readouterr().err
    assert answer(given, "--overwrite") == 0
    assert len(lines_of(given[2])) == 5


def test_sampling_is_the_same_again_and_takes_top_p(given):
    texts = []
    for flags in (("--temperature", "2"), ("--temperature", "2"), ("--temperature", "2", "--top-p", "0.0001")):
        assert answer(given, "--overwrite", *flags) == 0
        texts.append([line["text"] for line in lines_of(given[2])])
    assert texts[0] == texts[1] != texts[2]
    assert texts[2] == expected(given)
    os.remove(given[2])
    for flags in (["--chunk-idx", "1"], ["--chunk-idx", "0"], []):
        assert answer(given, "--temperature", "2", "--num-chunks", "2", *flags) == 0
    assert [line["text"] for line in lines_of(given[2])] == texts[0]


def test_what_is_wrong_is_said_before_the_model_is_loaded(given, tmp_path, capsys):
    wrong = ["nowhere", *given[1:]]
    (tmp_path / "images" / "1.png").unlink()
    assert answer(wrong) == 1
    assert "1.png of question 7 is not there. Name the directory of the images with --image-folder" in (
        capsys.readouterr().err
    )
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "prompt": "x"}\n')
    assert answer(wrong) == 1
    assert "q.jsonl, line 1" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "x", "image": 3}\n')
    assert answer(wrong) == 1
    assert "q.jsonl: question 1 has the text 'x' and the image 3; expected a text" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text("")
    assert answer(wrong) == 1
    assert "q.jsonl has no questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"text": "a\ud83d"}, "question 'q1': character 1 of its text is half of a pair"),
        (
            {"text": "<image> <image>", "image": "0.png"},
            "question 'q1': 2 <image> placeholders in the conversation but 1",
        ),
    ],
)
def test_a_question_that_cannot_be_asked_is_named_before_the_model_is_loaded(item, says, given, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": "q1", **item}) + "\n")
    assert answer(["nowhere", *given[1:]]) == 1
    assert says in capsys.readouterr().err


def test_an_id_may_hold_half_of_a_pair_of_characters(given, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": "i\ud83d", "text": "What?"}) + "\n")
    assert answer(given) == 0
    assert [line["question_id"] for line in lines_of(given[2])] == ["i\ud83d"]


def test_flags_that_cannot_hold_are_refused_in_a_sentence(given, capsys):
    for flags, says in (
        (["--device", "gpu"], "--device gpu: this machine has cpu"),
        (["--revision", "main"], "--revision main is a branch, tag or commit of a repository, and "),
    ):
        assert answer(given, *flags) == 1
        assert capsys.readouterr().err.startswith(f"llava-lite answer: {says}")


def test_a_file_that_another_process_answers_is_left_alone(given, capsys):
    with hold(Path(f"{given[2]}.parts"), 1, 0):
        assert answer(given) == 1
        assert "another process answers the questions in" in capsys.readouterr().err
    assert answer(given) == 0
    assert not os.path.exists(f"{given[2]}.parts")


def test_a_directory_of_images_may_be_written_in_two_ways(given, monkeypatch, tmp_path):
    assert answer(given, "--num-chunks", "2", "--chunk-idx", "0") == 0
    monkeypatch.chdir(tmp_path)
    given[4] = "images/../images"
    assert answer(given, "--num-chunks", "2", "--chunk-idx", "1") == 0
    assert answer(given, "--num-chunks", "2") == 0


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_questions(given):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "llava_lite.cli", "answer", *given],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["text"] for line in lines_of(given[2])] == expected(given)
    assert done.stdout.count("wrote 5 answers") == 1


@pytest.mark.parametrize(
    "item",
    [{"images": ["0.png"]}, {"image_file": "0.png"}, {"picture": "0.png"}, {"audio": "bird.wav"}],
    ids=lambda item: next(iter(item)),
)
def test_an_image_under_another_key_is_not_left_unseen(item, given, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "text": "What?", **item}) + "\n")
    assert answer(given) == 1
    said = capsys.readouterr().err
    assert f"question 1 has the key {next(iter(item))!r}, which would not be seen" in said
