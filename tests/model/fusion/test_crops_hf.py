"""Any-resolution against transformers' LlavaNext on the same weights: pixels, features, logits, loss, answers.

Transformers orders sizes (height, width) and rounds to 7 digits before it crops the padding, so that it may keep a row
that LLaVA cuts; the sizes here have the same rows in both.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import draw_image, llm_config
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

# From its own file: transformers 5.17 offers it at the top only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from llava_lite.constants import IGNORE_INDEX
from llava_lite.media.preprocess import load_image_processor
from llava_lite.mm_utils import process_images

PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
SIZES = [(40, 40), (20, 90), (90, 20), (1, 60), (60, 1), (64, 33), (300, 100), (500, 333), (1, 1)]
IMAGE = 5


def draw_images(sizes):
    return [draw_image(i, 96).resize(size) for i, size in enumerate(sizes)]


@pytest.fixture
def crops_of(toy_tower_dir):
    """Return a function: images -> what process_images makes of them."""
    processor = load_image_processor(toy_tower_dir("clip"))
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS)
    return lambda images: process_images(images, processor, config)


@pytest.fixture
def both(toy_model, toy_tokenizer):
    """Return our model and transformers' with its weights, copied name by name."""
    ours = toy_model(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    text = llm_config("llama", len(toy_tokenizer))
    config = LlavaNextConfig(
        vision_config=ours.config.vision_config.to_dict(),
        text_config=text.to_dict(),
        image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    hf = LlavaNextForConditionalGeneration(config).eval()
    places = {
        "model.image_newline": ours.model.image_newline,
        "model.multi_modal_projector.linear_1.": ours.model.mm_projector[0],
        "model.multi_modal_projector.linear_2.": ours.model.mm_projector[2],
        "model.language_model.embed_tokens.": ours.model.embed_tokens,
        "model.language_model.layers.": ours.model.layers,
        "model.language_model.norm.": ours.model.norm,
        "lm_head.": ours.lm_head,
    }
    # transformers 5.17 and 5.23 name the tower's inside differently.
    tower = hf.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    tower.load_state_dict(ours.get_vision_tower().encoder.state_dict())
    weights = {name: weight for name, weight in hf.state_dict().items() if "vision_tower" not in name}
    for name, target in weights.items():
        place = next(prefix for prefix in places if name.startswith(prefix))
        source = places[place]
        target.copy_((source if place == name else source.state_dict()[name[len(place) :]]).detach())
    return ours, hf


def stack(crops):
    return torch.nn.utils.rnn.pad_sequence(list(crops), batch_first=True)


def flipped(sizes):
    return torch.tensor([(height, width) for width, height in sizes])


def test_pixels_are_those_of_hf_llava_next(crops_of, toy_tower_dir, tmp_path):
    fields = json.loads((toy_tower_dir("clip") / "preprocessor_config.json").read_text())
    fields |= {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
    fields["image_grid_pinpoints"] = [[height, width] for width, height in PINPOINTS]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    hf = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    images = draw_images(SIZES)
    expected = hf(images, return_tensors="pt")
    crops = crops_of(images)
    assert torch.allclose(stack(crops), expected["pixel_values"], atol=1e-6)
    assert expected["image_sizes"].tolist() == flipped(SIZES).tolist()
    for image, alone in zip(images, crops, strict=True):
        assert torch.equal(crops_of([image])[0], alone)


def test_features_are_those_of_hf_llava_next(both, crops_of):
    ours, hf = both
    crops = crops_of(draw_images(SIZES))
    with torch.no_grad():
        features, lengths = ours.encode_each_image(crops, SIZES)
        expected = hf.get_image_features(stack(crops), flipped(SIZES)).pooler_output
    assert lengths == [len(one) for one in expected] == [ours.config.image_layout.num_tokens(s) for s in SIZES]
    assert torch.allclose(features[:-1], torch.cat(list(expected)), atol=1e-5)


def test_logits_loss_gradients_and_answers_are_those_of_hf_llava_next(both, crops_of):
    ours, hf = both
    sizes = [SIZES[i] for i in (0, 1, 6)]
    crops = crops_of(draw_images(sizes))
    lengths = [ours.config.image_layout.num_tokens(size) for size in sizes]
    ids = torch.tensor(
        [[1, 300, -200, 301, 302, 303, 0], [1, -200, 304, -200, 305, 306, 307], [1, 308, 309, 0, 0, 0, 0]]
    )
    mask = torch.tensor([[1] * 6 + [0], [1] * 7, [1] * 3 + [0] * 4])
    labels = torch.where((mask == 1) & (ids > 300), ids, IGNORE_INDEX)
    # Transformers wants a placeholder a feature.
    rows, places = [], iter(lengths)
    for row, real, supervised in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True):
        new = []
        for token, here, label in zip(row, real, supervised, strict=True):
            if here:
                new += [(IMAGE, IGNORE_INDEX)] * next(places) if token == -200 else [(token, label)]
        rows.append(new)
    longest = max(map(len, rows))
    padded = [row + [(0, IGNORE_INDEX)] * (longest - len(row)) for row in rows]
    long_ids = torch.tensor([[token for token, _ in row] for row in padded])
    long_labels = torch.tensor([[label for _, label in row] for row in padded])
    long_mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    out = ours(ids, attention_mask=mask, labels=labels, images=crops, image_sizes=sizes)
    inputs = {"pixel_values": stack(crops), "image_sizes": flipped(sizes)}
    expected = hf(long_ids, attention_mask=long_mask, labels=long_labels, **inputs)
    assert torch.allclose(out.logits[long_mask == 1], expected.logits[long_mask == 1], atol=1e-5)
    assert torch.allclose(out.loss, expected.loss, atol=1e-5)
    out.loss.backward()
    expected.loss.backward()
    pairs = [
        (ours.model.image_newline, hf.model.image_newline),
        (ours.model.mm_projector[0].weight, hf.model.multi_modal_projector.linear_1.weight),
        (ours.model.layers[0].mlp.up_proj.weight, hf.model.language_model.layers[0].mlp.up_proj.weight),
        (ours.model.embed_tokens.weight, hf.model.language_model.embed_tokens.weight),
    ]
    for mine, other in pairs:
        assert float(other.grad.abs().max()) > 1e-3
        assert torch.allclose(mine.grad, other.grad, atol=1e-5)

    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    answers = ours.generate(ids, attention_mask=mask, images=crops, image_sizes=sizes, **greedy)
    left = torch.tensor([[0] * (longest - len(row)) + [token for token, _ in row] for row in rows])
    output = hf.generate(left, attention_mask=long_mask.flip(1), **inputs, **greedy)[:, longest:]
    assert answers.tolist() == output.tolist()


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_one_crop_alone_is_an_image_with_one_newline(both, kind):
    ours, _ = both
    image = torch.randn(1, 3, 32, 32)
    images = image[None] if kind == "tensor" else [image[0]]
    features, lengths = ours.encode_each_image(images, [(32, 32)])
    expected = torch.cat([ours.encode_images(image)[0], ours.model.image_newline[None]])
    assert lengths == [17]
    assert torch.equal(features[:-1], expected)
    # LLaVA reads a stack of single images as it always did.
    assert ours.encode_each_image(image, None)[1] == [16]


def test_without_sizes_or_with_others_the_error_says_what_is_missing(both, crops_of):
    ours, _ = both
    ids = torch.tensor([[1, 300, -200, 301]])
    crops = crops_of(draw_images([(40, 40)]))
    with pytest.raises(ValueError, match=r"'spatial_unpad' needs image_sizes: \(width, height\) of each image"):
        ours(ids, images=crops)
    with pytest.raises(ValueError, match="an image of 20 x 90 pixels is cut into 1 x 3 tiles"):
        ours(ids, images=[*crops], image_sizes=[(20, 90)])
    with pytest.raises(ValueError, match="1 image placeholders in input_ids but 2 images of 88 features each"):
        ours(ids, images=[*crops, *crops], image_sizes=[(40, 40)] * 2)
