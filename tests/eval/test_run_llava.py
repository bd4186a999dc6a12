"""LLaVA's first example: an object of arguments in, a printed answer out."""

import http.server
import os
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from PIL import Image

from llava_lite import load, reply
from llava_lite.eval import run_llava
from llava_lite.media.image import ImageError


def asked(directory, **changes):
    """LLaVA's README makes such an object."""
    given = {
        "model_path": str(directory),
        "model_base": None,
        "model_name": "whatever",
        "query": "What colour is the square?",
        "conv_mode": None,
        "image_file": str(directory.parent / "0.png"),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 8,
    }
    return type("Args", (), given | changes)()


def test_answer_is_that_of_reply(checkpoint, capsys):
    directory = checkpoint(conv_template="v1")
    model, processor = load(str(directory), device="cpu")
    # What libraries print when they are first loaded.
    capsys.readouterr()
    assert run_llava.eval_model(asked(directory)) is None
    expected = reply(model, processor, "What colour is the square?", directory.parent / "0.png", max_new_tokens=8)
    assert capsys.readouterr().out == f"{expected}\n"


def test_images_stand_where_the_query_puts_them(checkpoint, capsys):
    directory = checkpoint(conv_template="v1")
    files = [str(directory.parent / f"{i}.png") for i in (0, 1)]
    model, processor = load(str(directory), device="cpu")
    for query, words in (
        ("Is <image-placeholder> like <image-placeholder>?", "Is <image> like <image>?"),
        ("Which is red?", "<image>\n<image>\nWhich is red?"),
    ):
        run_llava.eval_model(asked(directory, query=query, image_file=" + ".join(files), sep=" + ", num_beams=2))
        expected = reply(model, processor, words, files, max_new_tokens=8, num_beams=2)
        assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("stored", "name", "asked_for", "used"),
    [
        (None, "llava-v1.5-7b", None, "llava_v1"),
        (None, "llava-v1.6-34b", None, "chatml_direct"),
        (None, "llava-llama-2-13b-chat", None, "llava_llama_2"),
        (None, "llava-v1.6-mistral-7b", None, "mistral_instruct"),
        (None, "MoE-LLaVA-openchat-7b", None, "openchat"),
        (None, "my-run", None, "v1"),
        ("llava_v0", "llava-v1.5-7b", None, "llava_v0"),
        ("llava_v0", "llava-v1.5-7b", "v1_mmtag", "v1_mmtag"),
    ],
)
def test_template_is_the_stored_one_then_what_the_name_means(stored, name, asked_for, used, checkpoint, capsys):
    directory = checkpoint(name, conv_template=stored)
    run_llava.eval_model(asked(directory, conv_mode=asked_for, query="Hello!"))
    model, processor = load(str(directory), device="cpu")
    expected = reply(model, processor, "Hello!", directory.parent / "0.png", conv_template=used, max_new_tokens=8)
    assert capsys.readouterr().out == f"{expected}\n"


def test_words_in_names_mean_a_template():
    of_path = partial(run_llava.get_template_for_name, SimpleNamespace(conv_template=None))
    assert of_path("/some/mpt/dolphin-7b") is None
    assert of_path("runs/llava-v1.5-13b/checkpoint-20/") == "llava_v1"


def test_images_come_from_files_and_addresses(tmp_path):
    Image.new("RGBA", (5, 7), (1, 2, 3, 0)).save(tmp_path / "a.png")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/a.png"
        args = SimpleNamespace(image_file=f"{address};{tmp_path / 'a.png'}", sep=";")
        images = run_llava.load_images(run_llava.image_parser(args))
        server.shutdown()
    assert [(image.mode, image.size) for image in images] == [("RGB", (5, 7))] * 2
    assert all(image.getpixel((0, 0)) == (1, 2, 3) for image in images)
    with pytest.raises(ImageError, match="there is no such file"):
        run_llava.load_image(str(tmp_path / "b.png"))


def test_flags_are_llavas_and_the_program_runs(checkpoint):
    directory = checkpoint(conv_template="v1")
    flags = {
        "--model-path": directory,
        "--image-file": directory.parent / "1.png",
        "--query": "What colour?",
        "--conv-mode": "llava_v1",
        "--sep": ";",
        "--temperature": 0,
        "--top_p": 0.9,
        "--num_beams": 1,
        "--max_new_tokens": 5,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "llava_lite.eval.run_llava", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model, processor = load(str(directory), device="cpu")
    image = directory.parent / "1.png"
    expected = reply(model, processor, "What colour?", image, conv_template="llava_v1", max_new_tokens=5)
    assert done.stdout == f"{expected}\n"
    options = run_llava.build_parser().parse_args(["--model-path", "m", "--image-file", "i", "--query", "q"])
    assert (options.temperature, options.num_beams, options.max_new_tokens, options.sep) == (0.2, 1, 512, ",")
