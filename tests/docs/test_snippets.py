"""What the pages show runs: Python on tiny models, the commands for one's own records, records and mixtures."""

import ast
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, README, ROOT, blocks, commands, name_of
from PIL import Image, ImageDraw

TINY = ROOT / "playground/tiny"
GETTING_STARTED = ROOT / "docs/getting_started.md"
# Pages whose Python runs where a reader stands after the quickstart. The others show files of the package.
RUNNING = [README, ROOT / "docs/checkpoints.md", ROOT / "docs/in_place_of_llava.md"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function: words, text for its input -> what a command wrote, run in one directory of a reader."""
    root = tmp_path_factory.mktemp("reader")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LLAVA_LITE_CACHE": str(root / "index"), "CUDA_VISIBLE_DEVICES": ""}

    def call(words, text=""):
        if words[0] == "llava-lite":
            words = [sys.executable, "-m", "llava_lite.cli", *words[1:]]
        done = subprocess.run(words, cwd=root, env=env, input=text, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    (root / "images").mkdir()
    image = Image.new("RGB", (56, 56), "black")
    ImageDraw.Draw(image).rectangle((14, 14, 42, 42), fill="red")
    image.save(root / "images/image.jpg")
    image.save(root / "image.jpg")
    (root / "mine.json").write_text(blocks(README, "json")[0])
    # Both stages of the quickstart, of a single step: only that they are models counts here.
    data = f"--data_path mine.json --image_folder images --max_steps 1 --save_strategy no --version v1 {DEVICE}"
    tower = f"--vision_tower {TINY}/tower --mm_projector_type mlp2x_gelu"
    call(f"llava-lite train --model_name_or_path {TINY}/llm {tower} {data} --output_dir quickstart/stage2".split())
    experts = f"--tuning moe --model_name_or_path quickstart/stage2 {data} --output_dir checkpoints/llava-moe"
    call(["llava-lite", "train", *experts.split()])
    return call


DEVICE = "--use_cpu True --bf16 False"


def own_commands(page):
    """Return the words of the commands for one's own records."""
    return [command.words for command in commands(page) if "mine" in " ".join(command.words)]


def test_the_commands_for_own_records_check_train_and_answer(run):
    check, train, chat = own_commands(README)
    assert [words[1] for words in (check, train, chat)] == ["check", "train", "chat"]
    assert "ready to train" in run(check)
    run([*train, *DEVICE.split()])
    assert "A red square." in run([*chat, "--device", "cpu", "--temperature", "0"], "What is this?\n")


def test_getting_started_shows_the_record_and_the_commands_of_the_readme():
    assert blocks(GETTING_STARTED, "json") == blocks(README, "json")
    assert own_commands(GETTING_STARTED) == own_commands(README)
    assert blocks(GETTING_STARTED, "python") == blocks(README, "python")


@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_python_blocks_run(run, page):
    found = blocks(page, "python")
    assert found
    for block in found:
        run([sys.executable, "-c", block])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile_and_import_names_that_exist(page):
    for block in blocks(page, "python"):
        if block.startswith('--8<-- "'):
            assert (ROOT / shlex.split(block)[1]).is_file()
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_record_of_the_data_page_is_read_as_it_is(tmp_path):
    from llava_lite.data.records.record import parse_record

    record = parse_record(json.loads(blocks(ROOT / "docs/data.md", "json")[0]), "page[0]")
    assert record.images == ("coco/train2017/000000033471.jpg",)
    assert record.turns[1] == ("gpt", "The bus is white and red.")


def test_mixture_of_the_data_page_names_two_sources(tmp_path, monkeypatch):
    from llava_lite.data.index.sources import open_sources

    monkeypatch.chdir(tmp_path)
    Path("mix.yaml").write_text(blocks(ROOT / "docs/data.md", "yaml")[0])
    for name in ("llava_v1_5_mix665k.json", "mine.jsonl"):
        Path(name).write_text("[]")
    first, second = open_sources("mix.yaml", "images")
    assert (first.sampling, first.image_folder) == ("all", "images")
    assert (second.sampling, second.image_folder) == ("random:10%", "/data/mine")
