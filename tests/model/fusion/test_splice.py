"""The splice against a plain per-sample loop."""

import pytest
import torch

from llava_lite.constants import IGNORE_INDEX
from llava_lite.model.fusion.splice import Batch, check_counts, cut_rows, expand_placeholders, placeholder_mask, splice

IMAGE = -200


def plain_splice(ids, mask, labels, embed, features, left):
    """Build sequences one by one in a plain loop: text embedded, each placeholder replaced by its features."""
    sequences, sequence_labels, image = [], [], 0
    for row_ids, row_mask, row_label in zip(ids, mask, labels, strict=True):
        vectors, supervised = [], []
        for token, real, label in zip(row_ids.tolist(), row_mask.tolist(), row_label.tolist(), strict=True):
            if not real:
                continue
            if token == IMAGE:
                vectors.extend(features[image])
                supervised.extend([IGNORE_INDEX] * len(features[image]))
                image += 1
            else:
                vectors.append(embed[token])
                supervised.append(label)
        sequences.append(torch.stack(vectors))
        sequence_labels.append(supervised)
    length = max(len(r) for r in sequences)
    out, out_labels, out_mask = [], [], []
    for vectors, supervised in zip(sequences, sequence_labels, strict=True):
        pad = length - len(vectors)
        empty = torch.zeros(pad, vectors.shape[1])
        out.append(torch.cat([empty, vectors] if left else [vectors, empty]))
        out_labels.append([IGNORE_INDEX] * pad + supervised if left else supervised + [IGNORE_INDEX] * pad)
        out_mask.append([0] * pad + [1] * len(vectors) if left else [1] * len(vectors) + [0] * pad)
    return torch.stack(out), torch.tensor(out_labels), torch.tensor(out_mask)


def random_batch(generator, left):
    """Return ids, mask, labels of ragged sequences with 0 to 3 images each."""
    num_rows, length = torch.randint(1, 5, (), generator=generator).item(), 12
    ids = torch.randint(1, 20, (num_rows, length), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(num_rows):
        real = torch.randint(1, length + 1, (), generator=generator).item()
        columns = torch.arange(length - real, length) if left else torch.arange(real)
        mask[row, columns] = 1
        images = columns[torch.randperm(real, generator=generator)[: torch.randint(0, 4, (), generator=generator)]]
        ids[row, images] = IMAGE
    ids[mask == 0] = 0
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, IGNORE_INDEX)
    return ids, mask, labels


@pytest.mark.parametrize("left", [False, True])
def test_splice_equals_a_plain_loop_on_random_batches(left):
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        ids, mask, labels = random_batch(generator, left)
        embed = torch.randn(20, 6, generator=generator)
        lengths = torch.randint(1, 6, (int((ids == IMAGE).sum()),), generator=generator).tolist()
        features = [torch.randn(length, 6, generator=generator) for length in lengths]
        expected, expected_labels, expected_mask = plain_splice(ids, mask, labels, embed, features, left)

        is_image = placeholder_mask(ids, IMAGE)
        batch = expand_placeholders(Batch(ids, mask, None, labels), is_image, lengths, pad_left=left)
        is_image = placeholder_mask(batch.input_ids, IMAGE)
        embeds = splice(
            embed[batch.input_ids.masked_fill(is_image, 0)], is_image, torch.cat([*features, torch.zeros(0, 6)])
        )

        assert torch.equal(batch.attention_mask, expected_mask)
        assert torch.equal(batch.labels.masked_fill(is_image, IGNORE_INDEX), expected_labels)
        real = expected_mask.bool()
        assert torch.equal(embeds[real], expected[real])


def test_positions_count_real_tokens_from_zero():
    ids = torch.tensor([[5, IMAGE, 6], [7, 8, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = expand_placeholders(Batch(ids, mask, torch.arange(3).expand(2, 3)), ids == IMAGE, [2], pad_left=True)
    assert batch.input_ids.tolist() == [[5, IMAGE, IMAGE, 6], [0, 0, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    batch = expand_placeholders(Batch(ids, mask, torch.arange(3).expand(2, 3)), ids == IMAGE, [2])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]


def test_no_mask_is_made_up_when_no_row_needs_padding():
    ids = torch.tensor([[5, IMAGE, 6], [IMAGE, 8, 9]])
    assert expand_placeholders(Batch(ids), ids == IMAGE, [3, 3]).attention_mask is None


def test_features_without_a_placeholder_get_a_gradient_of_zero():
    features = torch.full((4, 6), float("inf"), requires_grad=True)
    embeds = splice(torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.bool), features)
    embeds.sum().backward()
    assert torch.equal(features.grad, torch.zeros(4, 6))


def test_counts_that_fit_neither_convention_are_refused_with_both_numbers():
    assert check_counts(2, [16, 16]) is True
    assert check_counts(32, [16, 16]) is False
    assert check_counts(20, [16, 4]) is False
    with pytest.raises(ValueError, match="3 image placeholders in input_ids but 2 images of 16 features"):
        check_counts(3, [16, 16])
    with pytest.raises(ValueError, match=r"2 images of 4 to 16 features each; expected 2 .* or 20"):
        check_counts(3, [16, 4])


@pytest.mark.parametrize(("left", "kept"), [(False, [[5, 6, 7], [8, 9, 0]]), (True, [[5, 6, 7], [0, 8, 9]])])
def test_sequences_are_truncated_at_their_end_and_padding_keeps_its_side(left, kept):
    ids = torch.tensor([[5, 6, 7, 1, 2], [0, 0, 0, 8, 9] if left else [8, 9, 0, 0, 0]])
    mask = (ids > 0).long()
    batch, embeds = cut_rows(Batch(ids, mask, labels=ids * 10), ids[..., None].float(), 3)
    assert batch.input_ids.tolist() == kept
    assert torch.equal(batch.attention_mask, (batch.input_ids > 0).long())
    assert torch.equal(batch.labels, batch.input_ids * 10)
    assert torch.equal(embeds[..., 0].long(), batch.input_ids)
    full = Batch(ids)
    assert cut_rows(full, embeds, 5) == (full, embeds)
    assert cut_rows(full, embeds, None) == (full, embeds)


@torch.no_grad()
def test_learned_vectors_stand_around_the_features_of_an_image(toy_model):
    model = toy_model("llama", mm_boundary_vectors=True)
    tower, stack = model.get_vision_tower(), model.get_model()
    images = torch.randn(2, 3, tower.image_size, tower.image_size)
    ids = torch.tensor([[1, -200, 5, 6], [1, 7, -200, 8]])
    features = model.encode_images(images)
    around = [torch.cat([stack.image_start[None], one, stack.image_end[None]]) for one in features]
    embed = model.get_input_embeddings()
    rows = [
        torch.cat([embed(ids[0, :1]), around[0], embed(ids[0, 2:])]),
        torch.cat([embed(ids[1, :2]), around[1], embed(ids[1, 3:])]),
    ]
    expected = model(inputs_embeds=torch.stack(rows)).logits
    assert torch.equal(model(ids, images=images).logits, expected)
    assert model.config.image_layout.num_tokens() == features.shape[1] + 2
    new = model.generate(ids, images=images, max_new_tokens=3, do_sample=False)
    assert torch.equal(new[:, 0], expected[:, -1].argmax(-1))


def test_a_batch_of_text_reaches_the_vectors_around_images(toy_model):
    model = toy_model("llama", mm_boundary_vectors=True).train()
    ids = torch.tensor([[1, 5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    assert model.get_model().image_start.grad is not None
    assert not model.get_model().image_start.grad.any()
