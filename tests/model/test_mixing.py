"""Mixed embeddings are the formula written out for each sample."""

import logging
import math

import pytest
import torch
from safetensors.torch import save_file

from llava_lite.model import mixing
from llava_lite.model.mixing import FeatureBank, mix_embeddings


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(vector):
    length = math.sqrt(sum(float(x) ** 2 for x in vector))
    return [float(x) / length for x in vector]


def mix_by_hand(parts):
    """Return the weighted sum of unit vectors [C] of one sample."""
    total = sum(weight for _, weight in parts) + 1e-6
    return [sum(weight / total * unit(vector)[i] for vector, weight in parts) for i in range(len(parts[0][0]))]


def retrieve_by_hand(f, stored, top_k, temperature, weight):
    scores = [sum(a * b for a, b in zip(f, row, strict=True)) for row in stored]
    best = sorted(range(len(stored)), key=lambda index: -scores[index])[:top_k]
    powers = [math.exp(temperature * scores[index]) for index in best]
    mean = [sum(p * stored[i][c] for p, i in zip(powers, best, strict=True)) / sum(powers) for c in range(len(f))]
    return unit([(1 - weight) * a + weight * b for a, b in zip(f, unit(mean), strict=True)])


def test_one_image_is_its_embedding_of_length_one():
    embeddings = random(2, 6)
    found = mix_embeddings({"image": (embeddings, 1.0)})
    # 1 / (1 + 1e-6) of it, as in the original.
    assert torch.allclose(found, torch.tensor([unit(row) for row in embeddings]), atol=2e-6)


def test_kinds_are_mixed_by_weight_and_not_normalised_again():
    image, audio = random(3, 6), 20 * random(3, 6, seed=1)
    found = mix_embeddings({"image": (image, 1.0), "audio": (audio, 0.5)})
    expected = [mix_by_hand([(i, 1.0), (a, 0.5)]) for i, a in zip(image, audio, strict=True)]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)
    assert (found.norm(dim=-1) < 0.999).all()


@pytest.mark.parametrize(("top_k", "temperature", "weight"), [(10, 20.0, 0.5), (3, 5.0, 0.2), (1, 20.0, 1.0)])
def test_bank_pulls_the_mix_towards_its_nearest_embeddings(top_k, temperature, weight):
    parts = {"image": (random(2, 6), 1.0), "text": (random(2, 6, seed=1), 2.0)}
    bank = FeatureBank(random(40, 6, seed=2))
    found = mix_embeddings(parts, bank, top_k, temperature, weight)
    stored = bank.features.float().tolist()
    mixed = mix_embeddings(parts).tolist()
    expected = [retrieve_by_hand(f, stored, top_k, temperature, weight) for f in mixed]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2))


def test_defaults_are_those_of_the_original():
    parts, bank = {"audio": (random(1, 6), 1.0)}, FeatureBank(random(40, 6, seed=2))
    assert torch.equal(mix_embeddings(parts, bank), mix_embeddings(parts, bank, 10, 20.0, 0.5))


def test_a_large_bank_is_read_in_blocks(monkeypatch):
    parts, bank = {"audio": (random(2, 6), 1.0)}, FeatureBank(random(40, 6, seed=2))
    expected = mix_embeddings(parts, bank)
    monkeypatch.setattr(mixing, "BLOCK_LEN", 7)
    assert torch.allclose(mix_embeddings(parts, bank), expected, atol=1e-6)


def test_a_part_of_one_embedding_goes_with_every_sample():
    one, many = random(1, 6), random(3, 6, seed=1)
    found = mix_embeddings({"image": (many, 1.0), "text": (one, 1.0)})
    assert torch.equal(found, mix_embeddings({"image": (many, 1.0), "text": (one.expand(3, 6), 1.0)}))


def test_a_bank_smaller_than_top_k_is_read_as_a_whole_and_this_is_logged(caplog):
    parts, bank = {"image": (random(1, 6), 1.0)}, FeatureBank(random(4, 6, seed=2))
    with caplog.at_level(logging.WARNING):
        found = mix_embeddings(parts, bank)
    assert "holds 4 embeddings, fewer than top_k 10; all are read" in caplog.text
    assert torch.equal(found, mix_embeddings(parts, bank, top_k=4))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({}, "no media to mix"),
        ({"image": (random(1, 6), 0.0), "audio": (random(1, 6), 0)}, r"not all 0; got \{'image': 0.0, 'audio': 0.0\}"),
        ({"image": (random(1, 6), -1.0), "audio": (random(1, 6), 2)}, "weights of media are 0 or more"),
        ({"image": (random(1, 6), 1), "audio": (random(1, 5), 1)}, r"equal C; got \{'image': \(1, 6\), 'audio'"),
        ({"image": (random(2, 6), 1), "audio": (random(3, 6), 1)}, r"equal B \(or 1\)"),
        ({"image": (random(6), 1)}, r"embeddings of media are \[B, C\]"),
    ],
)
def test_parts_that_cannot_be_mixed_are_refused(parts, reason):
    with pytest.raises(ValueError, match=reason):
        mix_embeddings(parts)


def test_a_bank_of_another_encoder_and_wrong_options_are_refused():
    parts = {"image": (random(1, 6), 1.0)}
    with pytest.raises(ValueError, match=r"embeddings of width 5, the encoder gives 6. Make the bank with"):
        mix_embeddings(parts, FeatureBank(random(4, 5)))
    for options in ({"top_k": 0}, {"weight": 1.5}):
        with pytest.raises(ValueError, match="top_k is at least 1 and the bank's weight from 0 to 1"):
            mix_embeddings(parts, FeatureBank(random(4, 6)), **options)


def test_a_bank_is_saved_and_opened_in_half_precision(tmp_path):
    bank = FeatureBank(3 * random(5, 6))
    assert bank.features.dtype == torch.float16
    assert torch.allclose(bank.features.float().norm(dim=-1), torch.ones(5), atol=1e-3)
    bank.save(tmp_path / "bank.safetensors")
    opened = FeatureBank.load(tmp_path / "bank.safetensors")
    assert (len(opened), opened.width) == (5, 6)
    assert torch.equal(opened.features, bank.features)


def test_a_bank_of_images_holds_their_embeddings():
    batches = [random(2, 3, 4, 4), random(1, 3, 4, 4, seed=1)]
    bank = FeatureBank.from_images(lambda images: images.flatten(1)[:, :7], batches)
    expected = torch.tensor([unit(image.flatten()[:7]) for batch in batches for image in batch])
    assert torch.allclose(bank.features.float(), expected, atol=1e-3)
    with pytest.raises(ValueError, match="a bank needs at least one image"):
        FeatureBank.from_images(lambda images: images, [])


def test_what_is_no_bank_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no feature bank at"):
        FeatureBank.load(tmp_path / "nowhere")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is no feature bank: it holds \['weight'\], not 'features'"):
        FeatureBank.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="is no feature bank"):
        FeatureBank.load(tmp_path / "text")
    for features in (torch.zeros(3), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match=r"a bank holds embeddings \[N, C\]"):
            FeatureBank(features)
    with pytest.raises(ValueError, match="1 of the 2 embeddings of a bank are NaN or infinite"):
        FeatureBank(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
