"""The contrastive pre-training of the vision tower."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the tiny world is drawn from scikit-learn's digits: pip install scikit-learn")

from PIL import Image

from playground.tiny import tower, world
from playground.tiny.make_base import make_tower


@pytest.fixture(scope="module")
def tiles():
    return world.draw_tiles([3], 1, np.random.default_rng(0))


def test_scenes_of_a_group_have_the_same_places_and_differ_in_what_stands_there(tiles):
    scenes = tower.near_duplicates(64, tiles, np.random.default_rng(1))
    for first in range(0, 64, tower.GROUP):
        group = scenes.digit[first : first + tower.GROUP]
        assert len(np.unique(group != world.EMPTY, axis=0)) == 1
        assert len(np.unique(group, axis=0)) > 1
        shown = scenes.tile[first : first + tower.GROUP]
        assert ((shown == world.EMPTY) == (group == world.EMPTY)).all()
    filled = scenes.digit != world.EMPTY
    assert (np.searchsorted(tiles.start, scenes.tile[filled], side="right") - 1 == scenes.digit[filled]).all()


def test_pixels_are_what_the_image_processor_makes(tiles):
    scenes = world.sample_scenes(3, tiles, np.random.default_rng(2))
    images = world.draw(scenes, tiles, np.random.default_rng(3))
    processor = tower.image_processor()
    ours = tower.get_pixels(images, processor)
    theirs = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    # float32 rounding of (x / 255 - mean) / std in another order.
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_contrastive_loss_leaves_equal_captions_out():
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    e = math.exp
    alone = -math.log(e(2) / (e(2) + e(1) + 1)), -math.log(e(2) / (e(2) + 2))
    assert tower.contrastive_loss(logits, ["a", "b", "c"]).item() == pytest.approx((2 * alone[0] + alone[1]) / 3)
    # With a and b equal, 1.0 drops out of the first two rows and columns.
    without = -math.log(e(2) / (e(2) + 1))
    assert tower.contrastive_loss(logits, ["a", "a", "c"]).item() == pytest.approx((2 * without + alone[1]) / 3)


def test_place_features_keep_the_patches_of_a_quadrant_together(tiles):
    class Echo:
        """A tower whose patches return their own number."""

        def __call__(self, pixels, output_hidden_states):
            numbers = torch.arange(-1, 16.0).view(1, 17, 1).repeat(len(pixels), 1, 1)

            class Out:
                hidden_states = (numbers, numbers)

            return Out()

    scenes = world.sample_scenes(2, tiles, np.random.default_rng(4))
    features = tower.place_features(Echo(), tower.image_processor(), scenes, tiles, np.random.default_rng(5))
    # 4 x 4 patches of 14 pixels, row by row; a quadrant is 2 x 2 of them.
    assert features[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_tower_is_saved_as_transformers_opens_it(tmp_path):
    from transformers import AutoModel, CLIPVisionModel

    make_tower(tmp_path, num_steps=2, held_out_fold=4, seed=0)
    model = AutoModel.from_pretrained(tmp_path)
    assert isinstance(model, CLIPVisionModel)
    assert (tmp_path / "preprocessor_config.json").is_file()
