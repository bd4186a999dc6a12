"""A toy checkpoint scored on tiny POPE: every way to run it gives the answers of `reply`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_benchmarks as toy
from PIL import Image

from llava_lite import load, reply
from llava_lite.cli import main as cli
from llava_lite.commands.eval import build_parser
from llava_lite.eval.hold import hold
from llava_lite.eval.run import evaluate, place_of, weights_digest

TOKENS = 6


@pytest.fixture
def data(tmp_path):
    """LLaVA's playground/data/eval with POPE in it."""
    toy.pope(tmp_path / "eval/pope")
    return tmp_path / "eval"


@pytest.fixture
def model(checkpoint):
    """Directory of a toy model."""
    return checkpoint(conv_template="v1")


@pytest.fixture
def run(model, data, tmp_path):
    """Return a function: flags -> report of a run on the toy POPE, whose answers are in tmp_path/out."""

    def call(*flags, out="out", benchmark="pope", model=model):
        words = [benchmark, "--model", model, "--data", data, "--device", "cpu", "--out", tmp_path / out]
        words += ["--max-new-tokens", TOKENS, *flags]
        return evaluate(build_parser().parse_args([str(word) for word in words]))

    return call


def lines_of(path: Path) -> list[dict]:
    """Return the lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts_of(directory: Path) -> list[str]:
    """Return the answers in the order of the questions."""
    return [line["text"] for line in lines_of(directory / "answers.jsonl")]


@pytest.fixture
def expected(model, data):
    """What `reply` answers to each question of the toy POPE, one by one."""
    opened, processor = load(str(model), device="cpu")
    return [
        reply(
            opened, processor, line["text"] + toy.SHORT, data / "pope/val2014" / line["image"], max_new_tokens=TOKENS
        )
        for line in toy.pope_lines()
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_reply_whatever_the_batch(batch_size, run, expected, tmp_path):
    run("--batch-size", batch_size)
    assert texts_of(tmp_path / "out") == expected
    # The toy model does not say the same to everything.
    assert len(set(expected)) > 1


def test_questions_without_an_image_are_asked_without(run, model, data, tmp_path):
    toy.sqa(data / "scienceqa")
    opened, processor = load(str(model), device="cpu")
    images = [None, *(data / f"scienceqa/images/test/{key}/image.png" for key in ("11", "12"))]
    texts = [text + toy.LETTER for text in toy.SQA_TEXTS.values()]
    expected = [reply(opened, processor, *one, max_new_tokens=TOKENS) for one in zip(texts, images, strict=True)]
    run("--batch-size", 3, benchmark="sqa")
    assert texts_of(tmp_path / "out") == expected
    assert [line["prompt"] for line in lines_of(tmp_path / "out/answers.jsonl")] == [
        texts[0],
        f"<image>\n{texts[1]}",
        f"<image>\n{texts[2]}",
    ]


def test_answer_lines_are_llavas(run, data, model, tmp_path):
    run("--limit", 2)
    line = lines_of(tmp_path / "out/answers.jsonl")[1]
    assert list(line)[:6] == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert line["question_id"] == 2
    assert line["prompt"] == f"Is there a cat in the image?{toy.SHORT}"
    assert (line["model_id"], line["metadata"]) == (str(model), {"index": 1})
    assert line["score"] in (0, 1)


def test_report_holds_score_settings_versions_and_what_papers_say(run, model, tmp_path, capsys):
    report = run()
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert stored["benchmark"] == "pope"
    assert stored["metric"] == "F1, mean of the three parts, %"
    assert stored["num_questions"] == 6
    assert 0 <= stored["interval_95"][0] <= stored["score"] <= stored["interval_95"][1] <= 100
    assert stored["scores"]["random: questions"] == 2
    assert stored["run"]["model"] == str(model)
    assert stored["run"]["max_new_tokens"] == TOKENS
    assert stored["run"]["temperature"] == 0
    assert {"llava-lite", "torch", "transformers"} <= stored["versions"].keys()
    # Of six questions; theirs are of all.
    assert stored["published"] == []
    assert "figures of others are left out" in stored["notes"][-1]
    table = (tmp_path / "out/results.md").read_text()
    assert f"| **F1, mean of the three parts, %** | **{stored['score']:,.1f}** |" in table
    printed = capsys.readouterr().out
    assert table in printed
    assert f"wrote {tmp_path / 'out/results.json'}" in printed
    with Image.open(tmp_path / "out/results.png") as plot:
        assert plot.format == "PNG"
        assert plot.width > 500


def test_a_run_goes_on_where_it_was_killed(run, expected, tmp_path):
    run()
    part = tmp_path / "out/part_0_of_1.jsonl"
    whole = part.read_bytes().splitlines(keepends=True)
    # Two answers, and the third one cut.
    part.write_bytes(b"".join(whole[:2]) + whole[2][:25])
    run()
    again = part.read_bytes().splitlines(keepends=True)
    assert again[:2] == whole[:2]
    assert len(again) == 6
    assert sorted(line["metadata"]["index"] for line in lines_of(part)) == [*range(6)]
    assert texts_of(tmp_path / "out") == expected


def test_a_complete_run_is_scored_again_without_the_model(run, model, tmp_path):
    first = run()
    part = (tmp_path / "out/part_0_of_1.jsonl").read_bytes()
    (tmp_path / "out/results.json").unlink()
    # Weights are not read again, whose name, size and time are the same.
    weights = model / "model.safetensors"
    known = weights.stat()
    weights.write_bytes(bytes(known.st_size))
    os.utime(weights, ns=(known.st_atime_ns, known.st_mtime_ns))
    second = run()
    assert (tmp_path / "out/part_0_of_1.jsonl").read_bytes() == part
    assert first["score"] == second["score"]


def test_answers_about_other_images_are_not_taken_for_these(run, data, tmp_path):
    run()
    image = next((data / "pope/val2014").iterdir())
    Image.new("RGB", (30, 30)).save(image)
    with pytest.raises(ValueError, match="holds the answers of another run: questions is"):
        run()


def test_answers_of_another_image_processor_are_not_taken_for_these(run, model, tmp_path):
    run()
    path = model / "preprocessor_config.json"
    path.write_text(path.read_text().replace("}", " }", 1))
    with pytest.raises(ValueError, match="holds the answers of another run: weights is"):
        run()


def test_answers_of_another_run_are_not_mixed_with_these(run, checkpoint, tmp_path):
    run("--limit", 2)
    with pytest.raises(ValueError, match=r"holds the answers of another run: temperature is 0\.5 now and was 0\.0"):
        run("--limit", 2, "--temperature", 0.5)
    with pytest.raises(ValueError, match="num_questions is 3 now and was 2"):
        run("--limit", 3)
    other = checkpoint("llava-other", conv_template="v1")
    with pytest.raises(ValueError, match=r"model is '.*llava-other' now and was"):
        run("--limit", 2, model=other)
    assert run("--limit", 3, "--overwrite")["num_questions"] == 3
    assert len(lines_of(tmp_path / "out/part_0_of_1.jsonl")) == 3


def test_greedy_answers_go_on_in_batches_of_another_size(run, expected, tmp_path):
    run("--num-chunks", 2, "--chunk-idx", 0, "--batch-size", 3)
    report = run("--batch-size", 2)
    assert (report["run"]["batch_size"], report["run"]["num_chunks"]) == (2, 1)
    assert texts_of(tmp_path / "out") == expected


def test_sampled_answers_depend_on_their_batch_and_stay_in_it(run, tmp_path):
    sampled = ["--temperature", 2, "--batch-size", 3]
    run(*sampled)
    texts = texts_of(tmp_path / "out")
    with pytest.raises(ValueError, match="another run: batch_size is 2 now and was 3"):
        run(*sampled[:3], 2)
    with pytest.raises(ValueError, match="another run: num_chunks is 2 now and was 1"):
        run(*sampled, "--num-chunks", 2, "--chunk-idx", 0)
    # A kill has cut the first batch: its answers that are there stay, the other ones are those that they would be.
    part = tmp_path / "out/part_0_of_1.jsonl"
    whole = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(whole[1])
    run(*sampled)
    assert texts_of(tmp_path / "out") == texts
    assert len(part.read_bytes().splitlines()) == 6
    # One at a time each question has a seed of its own, whoever asks it.
    run("--temperature", 2, "--num-chunks", 2, "--chunk-idx", 0, out="alone")
    run("--temperature", 2, out="alone")
    run("--temperature", 2, out="again")
    assert texts_of(tmp_path / "alone") == texts_of(tmp_path / "again")


def test_one_directory_of_a_model_is_one_model_however_it_is_written(run, model, tmp_path, monkeypatch):
    run("--limit", 1)
    part = (tmp_path / "out/part_0_of_1.jsonl").read_bytes()
    monkeypatch.chdir(model.parent)
    for name in (model.name, f"./{model.name}/", f"../{model.parent.name}/{model.name}"):
        assert run("--limit", 1, model=name)["run"]["model"] == str(model)
    assert (tmp_path / "out/part_0_of_1.jsonl").read_bytes() == part


def test_a_model_in_one_file_is_known_by_its_place_and_its_state(tmp_path, monkeypatch):
    (tmp_path / "model.pth").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    first = weights_digest("model.pth")
    assert first == weights_digest(str(tmp_path / "model.pth")) is not None
    assert place_of("./model.pth") == place_of(str(tmp_path / "model.pth"))
    (tmp_path / "model.pth").write_bytes(b"other weights")
    assert weights_digest("model.pth") != first
    assert (place_of("user/name"), weights_digest("user/name"), place_of(None)) == ("user/name", None, None)


def test_other_tables_at_the_same_place_are_other_questions(run, data, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    toy.mme_table(data / "MME")
    run("--limit", 2, benchmark="mme")
    # The same words, in a file of another time, as new images would be.
    table = next((data / "MME").rglob("*.parquet"))
    known = table.stat()
    os.utime(table, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="holds the answers of another run: tables is"):
        run("--limit", 2, benchmark="mme")


@pytest.mark.parametrize(
    ("benchmark", "flags", "says"),
    [
        ("pope", ["--judge", "http://x"], "--judge: pope is scored without a judge. Leave it out; judged are llavab"),
        ("pope", ["--judge-model", "gpt-4"], "--judge-model: pope is scored without a judge"),
        ("mmvet", ["--judge-model", "gpt-4"], "--judge-model is asked for at a server; name that too: --judge http:/"),
        ("easy_vqa", ["--questions", "x"], "--questions x: easy_vqa reads its own files alone. Leave it out."),
        ("pope", ["--revision", "main"], "--revision main is a branch, tag or commit of a repository, and "),
        ("pope", ["--device", "gpu"], "--device gpu: this machine has cpu"),
        ("pope", ["--device", "cuda:99"], "--device cuda:99: this machine has cpu"),
        ("pope", ["--device", "meta"], "--device meta: this machine has cpu"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused_in_a_sentence(benchmark, flags, says, model, data, tmp_path, capsys):
    words = ["eval", benchmark, "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
    assert cli([*words, *flags]) == 1
    assert capsys.readouterr().err.startswith(f"llava-lite eval: {says}")
    assert not (tmp_path / "out").exists()


def test_a_question_file_beside_tables_alone_is_refused(run, data):
    toy.mme_table(data / "MME")
    toy.write_lines(data / "MME/mine.jsonl", [])
    with pytest.raises(ValueError, match=r"--questions mine\.jsonl: .*MME holds tables, which are asked as they are"):
        run("--questions", "mine.jsonl", benchmark="mme")


def test_a_directory_that_another_process_writes_is_left_alone(run, tmp_path):
    run("--limit", 1)
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with hold(tmp_path / "out", 1, 0):
        for flags in ([], ["--overwrite"], ["--num-chunks", 2, "--chunk-idx", 1], ["--num-chunks", 1]):
            with pytest.raises(BlockingIOError, match="another process answers the questions in"):
                run("--limit", 1, *flags)
    assert {path: path.read_bytes() for path in kept} == kept


def test_other_weights_in_the_same_directory_are_another_model(run, model):
    run("--limit", 1)
    weights = model / "model.safetensors"
    known = weights.stat()
    os.utime(weights, ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="holds the answers of another run: weights is"):
        run("--limit", 1)


def test_chunks_are_merged_when_all_are_there(run, expected, tmp_path, capsys):
    assert run("--num-chunks", 2, "--chunk-idx", 0) is None
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: chunk 0 of 2 is answered. Score with --num-chunks 2.\n"
    with pytest.raises(ValueError, match=r"chunk 1 of 2 has 0 of 3 answers in .*: --num-chunks 2 --chunk-idx 1\."):
        run("--num-chunks", 2)
    assert run("--num-chunks", 2, "--chunk-idx", 1) is None
    assert len(lines_of(tmp_path / "out/part_1_of_2.jsonl")) == 3
    report = run("--num-chunks", 2)
    assert texts_of(tmp_path / "out") == expected
    assert report["score"] == run(out="alone")["score"]


def test_more_chunks_than_questions_leave_the_last_ones_empty(run, expected, tmp_path):
    for index in range(4):
        run("--num-chunks", 4, "--chunk-idx", index)
    run("--num-chunks", 4)
    assert texts_of(tmp_path / "out") == expected
    assert not (tmp_path / "out/part_3_of_4.jsonl").exists()


def test_wrong_chunks_are_refused(run):
    with pytest.raises(ValueError, match="--chunk-idx 2 of --num-chunks 2; it counts from 0"):
        run("--num-chunks", 2, "--chunk-idx", 2)
    with pytest.raises(ValueError, match="has no answers yet; run the chunks first"):
        run("--num-chunks", 2)
    with pytest.raises(ValueError, match="--overwrite would delete the answers of the other chunks"):
        run("--num-chunks", 2, "--chunk-idx", 0, "--overwrite")


def test_answers_go_beside_the_data_by_default(model, data):
    flags = ["pope", "--model", str(model), "--data", str(data), "--device", "cpu", "--limit", "2"]
    evaluate(build_parser().parse_args([*flags, "--max-new-tokens", "2"]))
    assert (data / "pope/answers/llava-v1.5-toy/pope_first_2/results.json").is_file()


def test_missing_images_are_counted_before_the_model_is_opened(run, data):
    (data / "pope/val2014/COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 2 images are not there, the first is .*2\.jpg\. Get the complete"
    ):
        run(model="/nowhere")


def test_a_model_without_a_tower_is_refused(run, toy_llm_dir):
    with pytest.raises(ValueError, match="has no vision tower and the benchmark has images; name a LLaVA model"):
        run(model=toy_llm_dir("llama"))


def test_files_of_another_form_are_named(run, data):
    toy.write_json(data / "textvqa/TextVQA_0.5.1_val.json", {"answers": []})
    toy.write_lines(data / "textvqa/llava_textvqa_val_v051_ocr.jsonl", [])
    (data / "textvqa/train_images").mkdir()
    with pytest.raises(
        ValueError, match=r"files of TextVQA val in .*textvqa are not in the format of .*: KeyError: 'data'"
    ):
        run(benchmark="textvqa")
    toy.write_json(data / "textvqa/TextVQA_0.5.1_val.json", {"data": []})
    with pytest.raises(ValueError, match="has no questions of TextVQA val"):
        run(benchmark="textvqa")


def test_a_benchmark_that_a_server_scores_writes_its_upload(run, data, tmp_path):
    toy.vizwiz(data / "vizwiz")
    report = run("--split", "test", benchmark="vizwiz")
    assert report["score"] is None
    assert len(json.loads((tmp_path / "out/vizwiz_test_upload.json").read_text())) == 2
    assert "| **soft accuracy, %** | **not scored here** |" in (tmp_path / "out/results.md").read_text()
    assert not (tmp_path / "out/results.png").exists()


def test_the_command_lists_benchmarks_and_answers_wrong_names(capsys, model, data):
    assert cli(["eval", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].split() == ["name", "benchmark", "score", "directory", "splits,", "variants"]
    assert any(line.startswith("vqav2 ") and line.endswith("val, test-dev, test") for line in listed)
    assert cli(["eval", "popes", "--model", str(model)]) == 1
    assert capsys.readouterr().err.startswith(
        "llava-lite eval: there is no benchmark 'popes'. Did you mean 'pope'? Known: vqav2"
    )
    with pytest.raises(SystemExit):
        cli(["eval", "pope"])
    assert "--model is missing: a directory or hub id" in capsys.readouterr().err
    assert cli(["eval", "gqa", "--model", str(model), "--data", str(data)]) == 1
    assert "GQA test-dev balanced needs files that are not in" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_give_the_answers_of_one_process(model, data, expected, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["pope", "--model", model, "--data", data, "--device", "cpu", "--out", tmp_path / "out"]
    words += ["--max-new-tokens", TOKENS]
    for flags in ([], ["--overwrite"]):
        done = subprocess.run(
            [*launcher, "-m", "llava_lite.cli", "eval", *map(str, words), *flags],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert texts_of(tmp_path / "out") == expected
        assert [len(lines_of(tmp_path / f"out/part_{rank}_of_2.jsonl")) for rank in (0, 1)] == [3, 3]
        # Only the first rank reports.
        assert done.stdout.count("# POPE") == 1
        assert "is answered" not in done.stdout


@pytest.mark.slow
def test_a_killed_process_leaves_answers_that_are_not_asked_again(run, model, data, tmp_path):
    many = ["--max-new-tokens", 300]
    words = ["pope", "--model", model, "--data", data, "--device", "cpu", "--out", tmp_path / "out", *many]
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_lite.cli", "eval", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    part, start = tmp_path / "out/part_0_of_1.jsonl", time.monotonic()
    while not part.exists() or not part.read_bytes().endswith(b"\n"):
        assert process.poll() is None
        assert time.monotonic() - start < 200
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = part.read_bytes()
    assert 1 <= left.count(b"\n") < 6
    run(*many)
    assert part.read_bytes().startswith(left[: left.rfind(b"\n") + 1])
    run(*many, out="alone")
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "alone")
