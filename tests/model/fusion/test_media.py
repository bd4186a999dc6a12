"""Media in a batch give the features that `media_features` gives of the same files, in either injection."""

import pytest
import torch
from conftest import float_error
from toy_media import KINDS, write_imagebind, write_media

from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator
from llava_lite.media.load import load_media
from llava_lite.media_inputs import media_features
from llava_lite.model.assemble import assemble
from llava_lite.model.fusion.media import features_of, has_mixes

PROMPTS = {"mm_injection": "adaption_prompt", "adaption_prompt_len": 1, "mm_projector_type": "gated_mlp1x"}
TOKENS = {"mm_projector_type": "mlp2x_gelu"}
INJECTIONS = pytest.mark.parametrize("overrides", [TOKENS, PROMPTS], ids=["tokens", "prompts"])


@pytest.fixture
def build(toy_llm_dir, tmp_path):
    """Return a function: config keys -> a model with a tiny ImageBind, gates open."""
    directory = write_imagebind(tmp_path / "imagebind")

    def make(overrides):
        torch.manual_seed(0)
        model = assemble(toy_llm_dir(), directory, config_overrides=overrides, dtype=torch.float32).eval()
        for name, weight in model.named_parameters():
            if name.endswith("adaption_gate"):
                weight.data.normal_(std=2.0)
        return model

    return make


@pytest.fixture
def paths(tmp_path):
    return {kind: str(tmp_path / "files" / name) for kind, name in write_media(tmp_path / "files").items()}


def loaded(model, paths, **weights):
    """Return {kind: (sample, weight)} as a data set makes it."""
    options = model.get_vision_tower().config.media_options
    return {kind: (load_media(kind, paths[kind], **options(kind)), weight) for kind, weight in weights.items()}


def image_batch(model, paths):
    """Return pixels, sounds alone and mixes, and the features of each by `media_features`."""
    plain = load_media("image", paths["image"], side=32)
    weights = [{"audio": 1.0}, {"image": 1.0, "audio": 0.5}, dict.fromkeys(KINDS, 2.0), {"point": 1.0, "image": 0.0}]
    given = [loaded(model, paths, **one) for one in weights]
    expected = [media_features(model, {kind: [paths[kind], w] for kind, w in one.items()}) for one in weights]
    given.insert(1, plain)
    expected.insert(1, model.get_vision_tower()(plain[None]).detach())
    return given, torch.cat(expected)


def close(one, other, num_terms=256):
    """Tell whether results are equal but for the order of sums: samples are encoded together, or one by one."""
    return torch.allclose(one, other, rtol=0, atol=float_error(other, num_terms))


def test_features_of_a_batch_are_those_of_reply_in_their_order(build, paths):
    model = build(PROMPTS)
    given, expected = image_batch(model, paths)
    with torch.no_grad():
        features = features_of(model.get_vision_tower(), given)
    assert features.shape == expected.shape == (5, 1, 20)
    assert close(features, expected)
    # Alone a record gives them bit for bit.
    with torch.no_grad():
        assert torch.equal(features_of(model.get_vision_tower(), given[:1]), expected[:1])
    assert has_mixes(given)
    assert not has_mixes(given[1:2])
    assert not has_mixes(torch.zeros(1, 3, 2, 2))


def test_bytes_of_a_plain_image_are_normalised_beside_media(build, paths):
    model = build(PROMPTS)
    tower = model.get_vision_tower()
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        features = features_of(tower, [pixels, loaded(model, paths, audio=1.0)])
        assert close(features[:1], tower(pixels[None]))


def rows_of(overrides):
    """Return examples: a sound, text alone, a plain image, a mix."""
    place = [] if "mm_injection" in overrides else [-200]
    ids = [[1, *place, 5, 6], [1, 7, 8, 9, 10], [1, *place, 11, 12], [1, *place, 13]]
    rows = [{"id": str(k), "input_ids": torch.tensor(row), "labels": torch.tensor(row)} for k, row in enumerate(ids)]
    for row in rows:
        row["labels"] = row["labels"].masked_fill(row["input_ids"] < 2, -100)
    return rows


@INJECTIONS
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_with_media_gives_the_loss_of_their_features(build, paths, overrides, packed):
    model = build(overrides)
    given, expected = image_batch(model, paths)
    shown = {0: 0, 2: 1, 3: 3}
    collate = PackedCollator() if packed else DataCollatorForSupervisedDataset(0)
    rows, stored = rows_of(overrides), rows_of(overrides)
    for row, k in shown.items():
        more = {"image_sizes": [(32, 32)]} | ({"in_text": False} if "mm_injection" in overrides else {})
        rows[row] |= {"images": [given[k]], **more}
        stored[row] |= {"image_features": [expected[k]], **more}
    with torch.no_grad():
        losses = [model(**without(collate(batch))).loss for batch in (rows, stored)]
        alone = [model(**without(collate([row]))).loss for row in rows]
    assert torch.allclose(*losses, atol=1e-5)
    counts = torch.tensor([float((row["labels"][1:] != -100).sum()) for row in rows])
    assert torch.allclose(losses[0], (torch.stack(alone) * counts).sum() / counts.sum(), atol=1e-5)
    # The sound is heard: another one gives another loss.
    rows[0]["images"] = [{"audio": (given[0]["audio"][0].flip(-2), 1.0)}]
    with torch.no_grad():
        assert not torch.allclose(model(**without(collate(rows))).loss, losses[0], atol=1e-5)


def without(batch):
    return {name: value for name, value in batch.items() if name not in ("sample_ids",)}


@INJECTIONS
def test_the_connector_learns_from_media_and_a_frozen_tower_gets_no_gradient(build, paths, overrides):
    model = build(overrides).train()
    model.get_vision_tower().requires_grad_(False)
    rows = rows_of(overrides)[:1]
    rows[0] |= {"images": [loaded(model, paths, audio=1.0)], "image_sizes": [(32, 32)]}
    rows[0] |= {"in_text": False} if "mm_injection" in overrides else {}
    model(**without(DataCollatorForSupervisedDataset(0)(rows))).loss.backward()
    grads = [weight.grad for weight in model.model.mm_projector.parameters()]
    assert all(grad is not None for grad in grads)
    assert any(bool(grad.any()) for grad in grads)
    assert all(weight.grad is None for weight in model.get_vision_tower().parameters())


@pytest.mark.parametrize(("kinds", "learns"), [(["audio"], False), (["audio", "image"], True)])
def test_a_branch_of_images_that_trains_has_a_gradient_whatever_the_media_are(build, paths, kinds, learns):
    model = build(TOKENS).train()
    tower = model.get_vision_tower()
    tower.requires_grad_(True)
    for weight in tower.unread():
        weight.requires_grad_(False)
    features = features_of(tower, [loaded(model, paths, **dict.fromkeys(kinds, 1.0))])
    features.square().mul(torch.arange(20)).sum().backward()
    grads = [weight.grad for name, weight in tower.named_parameters() if ".vision." in name]
    assert all(grad is not None for grad in grads)
    assert any(bool(grad.any()) for grad in grads) == learns


def test_in_training_the_other_branches_have_neither_dropout_nor_new_statistics(build, paths):
    model = build(PROMPTS)
    tower = model.get_vision_tower()
    state = {name: value.clone() for name, value in tower.state_dict().items()}
    given = [loaded(model, paths, **dict.fromkeys(KINDS, 1.0))]
    with torch.no_grad():
        expected = features_of(tower, given)
        model.train()
        assert tower.training
        assert torch.equal(features_of(tower, given), expected)
    assert all(torch.equal(value, state[name]) for name, value in tower.state_dict().items())


@INJECTIONS
def test_a_model_generates_from_media_as_from_their_features(build, paths, overrides):
    model = build(overrides)
    given, expected = image_batch(model, paths)
    ids = rows_of(overrides)[3]["input_ids"][None]
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(ids, images=[given[3]], **options)
    assert torch.equal(tokens, model.generate(ids, images=None, image_features=expected[3:4], **options))


def test_media_for_another_tower_and_crops_beside_media_are_refused(build, paths, toy_model):
    model = build(TOKENS)
    sound = loaded(model, paths, audio=1.0)
    ids = torch.tensor([[1, -200, 5]])
    with pytest.raises(ValueError, match="media, which are for a model with ImageBind as its tower"):
        toy_model()(ids, images=[sound])
    with pytest.raises(ValueError, match="an image of several crops stands in a batch with media"):
        model(torch.tensor([[1, -200, 5, -200]]), images=[sound, torch.zeros(2, 3, 32, 32)])
    model.config.image_aspect_ratio = "anyres"
    with pytest.raises(ValueError, match="media, which are one image each; set image_aspect_ratio to square"):
        model(ids, images=[sound])


def test_a_tower_in_half_precision_finds_neighbours_in_the_precision_of_the_file(build):
    tower, seen = build(TOKENS).get_vision_tower().to(torch.bfloat16), []
    tower.encoder.point_trunk.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    # In bfloat16 all of these points are one.
    cloud = 1000 + torch.rand(1, 20, 3)
    with torch.no_grad():
        assert tower.encode("point", cloud).dtype == torch.bfloat16
    assert torch.equal(seen[0], cloud)
