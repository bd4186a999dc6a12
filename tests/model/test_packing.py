"""A packed sequence equals its samples one by one: losses, gradients, and nothing leaks from one to the next."""

import pytest
import torch
from conftest import BACKBONE_TYPES

from llava_lite.constants import IMAGE_TOKEN_INDEX
from llava_lite.data.collator import DataCollatorForSupervisedDataset, PackedCollator

MOE = {"moe_mode": "dense", "num_experts": [4], "top_k_experts": 2}
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[64, 32], [32, 64]]}
ANYRES |= {"mm_patch_merge_type": "spatial_unpad"}


def draw_examples(model, num_examples=4, seed=0):
    """Return seeded examples of 5 to 40 words; every other one with one or two images in it."""
    torch.manual_seed(seed)
    layout, examples = model.config.image_layout, []
    for number in range(num_examples):
        length = int(torch.randint(5, 40, ()))
        ids = torch.randint(3, model.config.vocab_size, (length,))
        labels = torch.where(torch.rand(length) < 0.4, ids, -100)
        labels[0] = labels[-1] = 7
        example = {"id": f"sample {number}", "input_ids": ids, "labels": labels}
        if number % 2 == 0:
            sizes = [(40, 32), (32, 60)][: 1 + number % 4 // 2]
            shape = (3, 3, 32, 32) if layout.is_anyres else (3, 32, 32)
            example["images"] = [torch.randn(shape) for _ in sizes]
            example["image_sizes"] = sizes
            placeholders = [torch.full((layout.num_tokens(size),), IMAGE_TOKEN_INDEX) for size in sizes]
            example["input_ids"] = torch.cat([ids[:2], *placeholders, ids[2:]])
            example["labels"] = torch.cat([labels[:2], *(torch.full_like(m, -100) for m in placeholders), labels[2:]])
        examples.append(example)
    return examples


def loss_and_gradients(model, batch):
    """Return the losses of a batch in training, and the gradient of every weight."""
    batch = {key: value for key, value in batch.items() if key != "sample_ids"}
    model.train().zero_grad()
    output = model(**batch)
    output.loss.backward()
    losses = output.lm_loss.detach(), output.moe_loss
    return losses, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def assert_packed_equals_padded(model, examples):
    padded, expected = loss_and_gradients(model, DataCollatorForSupervisedDataset(0)(examples))
    packed, found = loss_and_gradients(model, PackedCollator()(examples))
    assert packed[0].item() == pytest.approx(padded[0].item(), abs=1e-6)
    if padded[1] is not None:
        assert packed[1].item() == pytest.approx(padded[1].item(), abs=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().clamp(min=1)
        torch.testing.assert_close(gradient / scale, expected[name] / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("backbone", BACKBONE_TYPES)
def test_packed_sequences_train_as_padded_sequences_do(toy_model, backbone, moe):
    model = toy_model(backbone, moe)
    model.set_attn_implementation("varlen")
    assert_packed_equals_padded(model, draw_examples(model))


@pytest.mark.parametrize("implementation", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("backbone", ["mistral", "qwen2"])
def test_a_sliding_window_slides_within_each_sample(toy_model, backbone, implementation):
    model = toy_model(backbone)
    model.set_attn_implementation(implementation)
    batch = PackedCollator()(draw_examples(model))
    unlimited, _ = loss_and_gradients(model, batch)
    model.config.sliding_window = 6
    model.config.layer_types = ["sliding_attention"] * 4
    model.model.has_sliding_layers = True
    for layer in model.model.layers:
        layer.self_attn.sliding_window, layer.attention_type = 6, "sliding_attention"
    assert_packed_equals_padded(model, draw_examples(model))
    assert loss_and_gradients(model, batch)[0][0] != unlimited[0]


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("implementation", ["varlen", "sdpa", "eager"])
def test_every_attention_keeps_samples_apart_with_images_of_any_resolution(toy_model, implementation, moe):
    model = toy_model(moe=moe, **ANYRES)
    model.set_attn_implementation(implementation)
    assert_packed_equals_padded(model, draw_examples(model))


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_gradient_checkpointing_changes_nothing_in_a_packed_row(toy_model, moe):
    model = toy_model(moe=moe)
    model.set_attn_implementation("varlen")
    batch = PackedCollator()(draw_examples(model))
    plain = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checked = loss_and_gradients(model, batch)
    assert checked[0] == plain[0]
    for name, gradient in checked[1].items():
        torch.testing.assert_close(gradient, plain[1][name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("implementation", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("training", [True, False])
def test_changing_one_sample_changes_nothing_in_the_others(toy_model, implementation, training):
    model = toy_model()
    model.set_attn_implementation(implementation)
    model.train(training)
    examples = draw_examples(model)
    first, second = len(examples[0]["input_ids"]), len(examples[1]["input_ids"])

    def hidden():
        batch = PackedCollator()(examples)
        kept = {key: batch[key] for key in batch if key not in ("labels", "supervised_positions", "sample_ids")}
        return model(**kept).logits[0]

    with torch.no_grad():
        before = hidden()
        examples[1]["input_ids"] = examples[1]["input_ids"].flip(0)
        after = hidden()
    changed = slice(first, first + second)
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[first + second :], after[first + second :])
    assert not torch.allclose(before[changed], after[changed])


@pytest.mark.parametrize("implementation", ["varlen", "sdpa"])
def test_positions_that_restart_are_enough_to_keep_samples_apart(toy_model, implementation):
    model = toy_model()
    model.set_attn_implementation(implementation)
    batch = PackedCollator()(draw_examples(model))
    kept = {key: batch[key] for key in ("input_ids", "position_ids", "images", "image_sizes")}
    reported = {key: batch[key] for key in batch if "_length_" in key or "cu_seq" in key}
    with torch.no_grad():
        # As a caller of transformers packs, whose cache is on by default.
        torch.testing.assert_close(model(**kept).logits, model(**kept, **reported).logits, atol=0, rtol=0)


@pytest.mark.parametrize("implementation", ["varlen", "sdpa"])
def test_positions_of_one_sequence_hold_for_all_sequences(toy_model, implementation):
    model = toy_model()
    model.set_attn_implementation(implementation)
    ids = torch.arange(30, 46).view(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        both = model(input_ids=ids, position_ids=positions).logits
        each = torch.cat([model(input_ids=row[None], position_ids=positions).logits for row in ids])
        alone = model(input_ids=ids[:, 3:]).logits
    torch.testing.assert_close(both, each, atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:, 3:], alone, atol=1e-5, rtol=0)
    model.train()
    losses = [
        model(input_ids=ids, labels=ids, position_ids=rows).loss for rows in (positions, positions.expand(2, -1))
    ]
    torch.testing.assert_close(*losses)


def test_a_packed_row_whose_images_are_not_expanded_is_refused(toy_model):
    model = toy_model()
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 6, 5, IMAGE_TOKEN_INDEX, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed rows need one placeholder a feature"):
        model(input_ids=ids, position_ids=positions, images=torch.randn(2, 3, 32, 32))


def test_evaluating_a_packed_row_gives_the_same_loss(toy_model):
    model = toy_model()
    model.set_attn_implementation("varlen")
    examples = draw_examples(model)
    losses = []
    for collator in (PackedCollator(), DataCollatorForSupervisedDataset(0)):
        batch = collator(examples)
        batch.pop("sample_ids")
        with torch.no_grad():
            losses.append(model(**batch, logits_to_keep=1).lm_loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
