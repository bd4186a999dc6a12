"""A bank holds the embeddings of the images below a directory, in the order of their paths."""

import logging

import pytest
import torch
from conftest import draw_image
from torch.nn import functional as F
from toy_imagebind import randomise, tiny_config

from llava_lite.cli import main
from llava_lite.export.bank import make_bank
from llava_lite.media.image import ImageError
from llava_lite.media.pixels import load_image
from llava_lite.model.encoders.imagebind.model import ImageBindModel
from llava_lite.model.mixing import FeatureBank


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagebind")
    model = randomise(ImageBindModel(tiny_config()))
    model.save_pretrained(path)
    return path, model


@pytest.fixture
def images(tmp_path):
    for index, name in enumerate(("b.png", "a/z.JPG", "a/y.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(index).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_bank_of_a_directory_holds_its_embeddings(encoder, images, tmp_path, capsys):
    path, model = encoder
    out = tmp_path / "banks" / "bank.safetensors"
    arguments = ["bank", str(images), str(out), "--vision_tower", str(path), "--batch-size", "2", "--device", "cpu"]
    assert main(arguments) == 0
    assert f"wrote 3 embeddings of width 20 to {out}" in capsys.readouterr().out
    pixels = torch.stack([load_image(images / name, side=32) for name in ("a/y.png", "a/z.JPG", "b.png")])
    with torch.no_grad():
        expected = F.normalize(model(pixels), dim=-1)
    # Half precision.
    assert torch.allclose(FeatureBank.load(out).features.float(), expected, atol=1e-3)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_answered_with_those_that_are(device, images, tmp_path, capsys):
    words = ["bank", str(images), str(tmp_path / "o.safetensors"), "--vision_tower", "nowhere", "--device", device]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith(f"llava-lite bank: --device {device}: this machine has cpu")


def test_an_image_that_cannot_be_opened_is_named_or_counted(encoder, images, tmp_path, caplog):
    (images / "broken.png").write_bytes(b"no image")
    out, lines = tmp_path / "bank.safetensors", []
    with pytest.raises(ImageError, match=r"cannot use the image '.*broken.png'"):
        make_bank(images, out, encoder[0])
    assert not out.exists()
    with caplog.at_level(logging.WARNING):
        bank = make_bank(images, out, encoder[0], bad_image="skip", batch_size=1, report=lines.append)
    assert len(bank) == 3
    assert lines[0] == "1 of 4 images were left out: they cannot be opened"
    assert "broken.png" in caplog.text


def test_an_index_is_read_by_faiss_where_it_is_installed(tmp_path):
    path, out = tmp_path / "knn.index", tmp_path / "bank.safetensors"
    path.write_bytes(b"no index")
    try:
        import faiss
    except ImportError:
        with pytest.raises(ImportError, match=r"knn.index' is read as a faiss index, which needs faiss: pip install"):
            make_bank(path, out)
        return
    vectors = F.normalize(torch.randn(5, 8), dim=-1)
    index = faiss.IndexFlatIP(8)
    index.add(vectors.numpy())
    faiss.write_index(index, str(path))
    assert torch.equal(make_bank(path, out).features, vectors.half())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{images}", "{images}/b.png"], "exists already; name a new file"),
        (["{images}", "{new}"], "--vision_tower is needed"),
        (["{images}/nowhere", "{new}"], "is neither a directory of images nor the file of an index"),
        (["{empty}", "{new}"], "no images below"),
        (["{images}", "{new}", "--batch_size", "0"], "--batch_size is at least 1"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, reason, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"images": images, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    assert main(["bank", *(argument.format(**places) for argument in arguments)]) == 1
    output = capsys.readouterr().err
    assert output.startswith("llava-lite bank: ")
    assert reason in output
