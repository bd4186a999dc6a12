"""Any-resolution images from the processor to an answer: counts, crops, sizes, batches of unequal grids."""

import pytest
import torch
from conftest import draw_image
from PIL import Image

from llava_lite.constants import IMAGE_TOKEN_INDEX
from llava_lite.inference import reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.mm_utils import process_images
from llava_lite.processing.processor import LlavaLiteProcessor

PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SIZES = [(40, 40), (20, 90), (90, 20), (1, 60), (64, 33)]


def image(i):
    return draw_image(i, 96).resize(SIZES[i])


@pytest.fixture(params=["flat", "spatial", "spatial_unpad"])
def parts(request, toy_model, toy_tokenizer, toy_tower_dir):
    """Return a model and its processor."""
    model = toy_model(
        conv_template="v1",
        image_aspect_ratio="anyres",
        mm_patch_merge_type=request.param,
        image_grid_pinpoints=PINPOINTS,
    )
    return model, LlavaLiteProcessor.from_config(
        model.config, toy_tokenizer, load_image_processor(toy_tower_dir("clip"))
    )


def test_each_placeholder_is_as_long_as_the_features_of_its_image(parts):
    model, processor = parts
    for i in range(len(SIZES)):
        inputs = processor(text="USER: <image>\nHello! ASSISTANT:", images=image(i))
        crops = process_images([image(i)], processor.image_processor, model.config)
        features, lengths = model.encode_each_image(crops, [SIZES[i]])
        assert int((inputs["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == lengths[0]
        assert inputs["image_sizes"].tolist() == [list(SIZES[i])]
        assert torch.equal(inputs["pixel_values"], crops)
        assert len(features) == lengths[0] + model.config.has_newline


def test_images_of_unequal_grids_are_filled_up_with_crops_of_zeros(parts):
    _, processor = parts
    texts = ["<image> Hello! <image>", "Hello!", "<image>"]
    inputs = processor(text=texts, images=[[image(0), image(1)], None, [image(2)]])
    assert inputs["pixel_values"].shape == (3, 5, 3, 32, 32)
    assert [int(crop.any(dim=(1, 2, 3)).sum()) for crop in inputs["pixel_values"] != 0] == [5, 4, 4]
    assert inputs["image_sizes"].tolist() == [list(SIZES[i]) for i in range(3)]


def test_llavas_list_and_the_processors_stack_are_the_same_images(parts):
    model, processor = parts
    inputs = processor(text="<image> Hello! <image>", images=[image(0), image(1)])
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 300, IMAGE_TOKEN_INDEX]])
    crops = process_images([image(0), image(1)], processor.image_processor, model.config)
    assert [len(one) for one in crops] == [5, 4]
    stack, sizes = inputs["pixel_values"], inputs["image_sizes"]
    with torch.no_grad():
        llavas = model(ids, images=crops, image_sizes=SIZES[:2]).logits
        assert torch.equal(model(ids, pixel_values=stack, image_sizes=sizes).logits, llavas)
        expanded = inputs["input_ids"]
        assert model(**inputs).logits.shape[1] == expanded.shape[1]


def test_a_batch_of_unequal_images_gives_the_answers_of_each_alone(parts):
    model, processor = parts
    questions = [
        "What colour is the square?",
        "Hello!",
        "How many circles are there?",
        "What is in <image>\n and <image>",
    ]
    groups = [image(0), None, image(3), [image(2), image(4)]]
    together = reply(model, processor, questions, groups, max_new_tokens=8)
    alone = [
        reply(model, processor, question, images, max_new_tokens=8)
        for question, images in zip(questions, groups, strict=True)
    ]
    assert together == alone
    assert len(set(together)) == 4
    without_crops = reply(model, processor, questions[:1], [Image.new("RGB", (40, 40))], max_new_tokens=8)
    assert without_crops != together[:1]


def test_saved_settings_come_back(parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = LlavaLiteProcessor.from_pretrained(tmp_path)
    assert again.image_layout == processor.image_layout == model.config.image_layout
    inputs = [p(text="<image>", images=image(1)) for p in (processor, again)]
    assert all(torch.equal(inputs[0][name], inputs[1][name]) for name in inputs[0])
    assert LlavaLiteProcessor.from_pretrained(tmp_path, image_aspect_ratio="pad").image_layout.num_tokens() == 16
