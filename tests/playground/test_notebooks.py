"""Every notebook runs from top to bottom in a kernel, on a tiny model, and what its cells computed is right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")
pytest.importorskip("nbclient", reason="notebooks need a client to run: pip install 'llava-lite[dev]'")
pytest.importorskip("ipykernel", reason="notebooks need a kernel to run: pip install 'llava-lite[dev]'")

import nbclient
import nbformat
from hub_client import environment

from llava_lite import load, reply
from llava_lite.train.train import train
from playground.tiny import scene_records, text, world

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "playground/tiny"
BOOKS = sorted((ROOT / "playground/notebooks").glob("*.ipynb"))
COLOUR, COUNT = "What colour is the digit top-left?", "How many digits are there?"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a directory of images with one or two digits and conversations about colour and number."""
    directory = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    tiles = world.draw_tiles([0], 1, rng)
    scenes = world.sample_scenes(1200, tiles, rng, counts=(1, 2))
    kinds = {"colour": 3, "count": 1}
    rows = zip(scenes.digit, scenes.colour, strict=True)
    asked = [text.scene_questions(*row, 2, rng, kinds) for row in rows]
    records = [
        {"id": f"{i}", "image": f"{i}.png", "conversations": scene_records.turns_of(questions, "<image>\n")}
        for i, questions in enumerate(asked)
    ]
    images = scene_records.images_of(scenes, tiles, rng)
    scene_records.write_stage(directory / "data.json", directory, records, images, "data")
    return directory


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Return a function: name, tuning, base, steps and more flags -> directory of a finished stage."""

    def make(name, tuning, base, max_steps, *more):
        output = tmp_path_factory.mktemp(name)
        flags = (
            f"--model_name_or_path {base} --data_path {data}/data.json --image_folder {data} --output_dir {output} "
            f"--tuning {tuning} --version v1 --image_aspect_ratio pad --max_steps {max_steps} --model_max_length 512 "
            "--per_device_train_batch_size 16 --save_strategy no --use_cpu True --disable_tqdm True --bf16 False"
        )
        train([*flags.split(), *more])
        return output

    return make


@pytest.fixture(scope="module")
def dense(run):
    """Return the directory of a model that was trained a little on colours and numbers of digits."""
    flags = ["--vision_tower", str(TINY / "tower"), "--mm_projector_type", "mlp2x_gelu", "--learning_rate", "2e-3"]
    return run("dense", "full", TINY / "llm", 100, *flags)


@pytest.fixture(scope="module")
def experts(run, dense):
    """Return the directory of that model with four experts in every other layer."""
    return run("experts", "moe", dense, 5, "--learning_rate", "5e-4", "--moe_mode", "sparse", "--num_experts", "4")


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Return a function: notebook, values of its capital names, names to read -> {name: value} after its last cell."""
    monkeypatch.setenv("LLAVA_LITE_CACHE", str(tmp_path / "index"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run_all(name, wanted, **values):
        (path,) = (book for book in BOOKS if book.stem == name)
        book = nbformat.read(path, as_version=4)
        for key, value in values.items():
            first = book.cells[1]
            first.source, found = re.subn(rf'(?m)^{key} = ".*"', f"{key} = {str(value)!r}", first.source)
            assert found == 1, f"{key} is not in the first code cell of {name}"
        listed = ", ".join(f"{key!r}: {key}" for key in wanted)
        book.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{listed}}}))"))
        nbclient.NotebookClient(
            book, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        ).execute()
        return json.loads("".join(output.text for output in book.cells[-1].outputs if output.name == "stdout"))

    return run_all


def image_of(name, call):
    """Return the image that a notebook's own `digit_image` draws."""
    (path,) = (book for book in BOOKS if book.stem == name)
    cells = nbformat.read(path, as_version=4).cells
    (source,) = (cell.source for cell in cells if "def digit_image" in cell.source)
    scope = {}
    exec(source, scope)
    return eval(call, scope)


def test_the_five_are_there():
    numbers = [int(book.name[0]) for book in BOOKS]
    assert numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_short_and_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert book.cells[0].cell_type == "markdown"
    assert len(book.cells) <= 20
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[0].source.startswith("MODEL = ")
    imports = re.findall(r"(?m)^(?:from|import) (llava_lite[\w.]*)", "\n".join(cell.source for cell in code))
    assert set(imports) <= {"llava_lite", "llava_lite.cli", "llava_lite.eval.expert_routes", "llava_lite.train.train"}


def test_load_and_ask(execute, dense):
    found = execute("1_load_and_ask", ["answer", "more", "same_answer"], MODEL=dense)
    model, processor = load(dense, device="cpu")
    image = image_of("1_load_and_ask", "image")
    assert found["answer"] == found["same_answer"] == reply(model, processor, COLOUR, image) == "red"
    question = f"<image>\n{COLOUR}"
    assert found["more"] == reply(model, processor, COUNT, image, history=[(question, "red")]) == "one"


def test_batch_and_stream(execute, dense):
    names = ["answers", "alone", "pieces", "first_pieces", "varied"]
    found = execute("2_batch_and_stream", names, MODEL=dense)
    model, processor = load(dense, device="cpu")
    red, blue = image_of("2_batch_and_stream", "(red, blue)")
    assert found["answers"] == found["alone"]
    assert found["answers"][0] == reply(model, processor, COLOUR, red) == "red"
    answer = reply(model, processor, "Describe the picture.", blue, max_new_tokens=32)
    assert "".join(found["pieces"]) == answer
    assert found["first_pieces"] == found["pieces"][:2]
    assert len(found["varied"]) == 3


def test_where_experts_send_images_and_words(execute, experts, tmp_path):
    name = "3_where_experts_send_images_and_words"
    plain = "{layer: {kind: vars(load) for kind, load in kinds.items()} for layer, kinds in found.items()}"
    values = execute(name, ["distances", plain], MODEL=experts)
    loads = values[plain]
    assert list(loads) == ["0", "2"]
    for layer, kinds in loads.items():
        # Three images of 16 patches.
        assert kinds["image"]["num_tokens"] == 3 * 16
        assert kinds["text"]["num_tokens"] > 20
        for kind in kinds.values():
            assert sum(kind["first"]) == pytest.approx(1)
            assert sum(kind["all_k"]) == pytest.approx(1)
            assert max(kind["all_k"]) <= 0.5 + 1e-9
        pairs = zip(kinds["image"]["all_k"], kinds["text"]["all_k"], strict=True)
        assert values["distances"][layer] == pytest.approx(sum(max(a - b, 0) for a, b in pairs))
    with Image.open(tmp_path / "routes.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 4


def test_finetune_on_your_own_images(execute, dense, tmp_path):
    names = ["before", "accuracy_before", "after", "accuracy_after", "accuracy_unseen", "losses", "problems"]
    found = execute("4_finetune_on_your_own_images", names, MODEL=dense)
    assert found["problems"] == 0
    assert found["accuracy_before"] == 0
    assert found["after"] == ["circle", "square", "triangle", "cross"] * 5
    assert found["accuracy_after"] == 1
    assert found["accuracy_unseen"] > 0.25
    assert found["losses"][-1] < found["losses"][0] / 5
    model, processor = load(tmp_path / "shapes-model", device="cpu")
    images = [tmp_path / f"shapes/{number:02d}.png" for number in range(4)]
    assert reply(model, processor, ["What shape is this?"] * 4, images, max_new_tokens=16) == found["after"][:4]
    assert len(json.loads((tmp_path / "shapes.json").read_text())) == 20


def test_push_to_the_hub(execute, dense, hub, tmp_path, monkeypatch):
    for key, value in environment(hub, tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    names = ["here", "there", "files", "card.data.to_dict()", "again.config.image_aspect_ratio"]
    found = execute("5_push_to_the_hub", names, MODEL=dense, REPO="tester/tiny-digits")
    assert found["here"] == found["there"] == "red"
    assert {"README.md", "config.json", "model.safetensors", "loss.png", "tokenizer.json"} <= set(found["files"])
    assert not [name for name in found["files"] if "state" in name or "optimizer" in name or "args" in name]
    assert found["card.data.to_dict()"]["pipeline_tag"] == "image-text-to-text"
    assert found["again.config.image_aspect_ratio"] == "pad"
