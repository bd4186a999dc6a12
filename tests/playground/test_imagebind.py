"""The contrastive pre-training of the tiny ImageBind."""

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from llava_lite.media.audio import load_audio
from playground.tiny import imagebind, sound, world
from playground.tiny.make_base import make_imagebind


@pytest.fixture(scope="module")
def tiles():
    return world.draw_tiles([3], 1, np.random.default_rng(0))


def test_a_caption_is_a_digit_and_a_colour():
    torch.manual_seed(0)
    captions = imagebind.Captions(8)
    found = captions()
    assert found.shape == (80, 8)
    together = captions.digits.weight[3] + captions.colours.weight[5]
    # float32 rounding.
    assert torch.allclose(found[3 * 8 + 5], together / together.norm(), atol=1e-6)


def test_scenes_hold_one_digit(tiles):
    scenes, digit, colour = imagebind.one_digit_scenes(50, tiles, np.random.default_rng(1))
    filled = scenes.digit != world.EMPTY
    assert (filled.sum(axis=1) == 1).all()
    assert (scenes.digit[filled] == digit).all()
    assert (scenes.colour[filled] == colour).all()


def test_sounds_are_trained_on_as_files_are_read():
    config = imagebind.ImageBindConfig(**imagebind.SIZES)
    trained = imagebind.spectrograms([4], np.random.default_rng(2), config)
    data = sound.wav_bytes(sound.draw_sound(4, np.random.default_rng(2)))
    read = load_audio(data, **config.media_options("audio"))
    # A file has 16 bits a sample, which is heard in silent bands alone.
    assert trained.shape == (1, 1, 64, 96)
    assert (read[0] - trained[0]).abs().mean() < 0.02


def test_sounds_leave_the_images_as_they_are(tiles):
    torch.manual_seed(0)
    model = imagebind.ImageBindModel(imagebind.ImageBindConfig(**imagebind.SIZES)).eval()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(imagebind, "NUM_SOUNDS", 20)
        imagebind.train_sounds(model, tiles, 1, np.random.default_rng(3))
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert all(".audio." in name for name in moved)


def test_it_is_saved_as_a_tower_opens_it(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(imagebind, "NUM_SOUNDS", 20)
    image, heard = make_imagebind(tmp_path, (1, 1), held_out_fold=4, seed=0)
    assert 0 <= min(image, heard) <= max(image, heard) <= 1
    from llava_lite.model.encoders.imagebind.opening import open_imagebind

    assert open_imagebind(tmp_path).modalities == ["image", "audio"]
    assert (tmp_path / "preprocessor_config.json").is_file()
