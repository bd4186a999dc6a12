"""For the same weights, transformers' own LLaVA gives the same logits, loss, gradients and answers.

There the connector is two linear layers with an activation between them. Without one, and with a unit matrix for the
second or for both, it is LLaVA's `linear` or `identity`.
"""

import re

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration
from transformers import LlavaConfig as HFConfig

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.model import LlavaConfig, LlavaLlamaForCausalLM

WIDTH, NUM_PATCHES, PLACEHOLDER, PAD, END = 32, 4, 59, 0, 2
TEXT = {
    "vocab_size": 60,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": END,
}
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
# Connector, layer of the tower that is read, which of its tokens.
VARIANTS = {
    "mlp2x_gelu": ("mlp2x_gelu", -2, "patch"),
    "linear": ("linear", -2, "patch"),
    "identity": ("identity", -2, "patch"),
    "class token": ("mlp2x_gelu", -2, "cls_patch"),
    "last layer": ("linear", -1, "patch"),
    "first layer": ("linear", 1, "patch"),
}
P = IMAGE_TOKEN_INDEX
BATCHES = {
    "one image": [[1, 7, P, 8, 9, 10]],
    "unequal lengths": [[1, 7, P, 8, 9, 10, 11, 12], [1, P, 13], [1, 14, 15, P, 16]],
    "two images and none": [[1, P, 7, P, 8], [1, 9, 10, 11, 12, 13, 14], [1, 15, P, 16]],
    "an image at either end": [[P, 7, 8], [1, 9, P]],
    "no image": [[1, 7, 8], [1, 9, 10, 11]],
}


def neutral(name):
    """Return what a parameter is called in both models."""
    name = re.sub(r"^model\.vision_tower\.(vision_tower\.)?(vision_model\.)?", "tower.", name)
    name = name.replace("model.language_model.", "model.").replace("model.multi_modal_projector.", "connector.")
    name = re.sub(r"^model\.mm_projector\.(0\.)?(?=weight|bias)", "connector.linear_1.", name)
    return name.replace("model.mm_projector.2.", "connector.linear_2.")


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """Our model, Hugging Face's with the same random weights, and the features of an image; the towers are frozen."""
    connector, layer, feature = VARIANTS[request.param]
    fields = {"mm_projector_type": connector, "mm_vision_select_layer": layer, "mm_vision_select_feature": feature}
    ours = LlavaLlamaForCausalLM(LlavaConfig(**TEXT, vision_config=CLIPVisionConfig(**TOWER), **fields)).eval()
    hf = LlavaForConditionalGeneration(
        HFConfig(
            text_config=LlamaConfig(**TEXT),
            vision_config=CLIPVisionConfig(**TOWER),
            image_token_index=PLACEHOLDER,
            projector_hidden_act="gelu" if connector == "mlp2x_gelu" else "linear",
            vision_feature_layer=layer,
            vision_feature_select_strategy="full" if feature == "cls_patch" else "default",
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    projector = hf.model.multi_modal_projector
    units = {"linear": [projector.linear_2], "identity": [projector.linear_1, projector.linear_2]}.get(connector, [])
    with torch.no_grad():
        for name, param in hf.named_parameters():
            param.normal_(std=0.3, generator=generator).add_(float("norm" in name and name.endswith("weight")))
        for linear in units:
            linear.weight.copy_(torch.eye(WIDTH))
            linear.bias.zero_()
        theirs = {neutral(name): param for name, param in hf.named_parameters()}
        for name, param in ours.named_parameters():
            param.copy_(theirs[neutral(name)])
    for tower in (ours.get_vision_tower(), hf.model.vision_tower):
        tower.requires_grad_(False)
    return ours, hf, NUM_PATCHES + (feature == "cls_patch")


def batch_of(sequences, image, side="right"):
    """Return ids, mask, labels [B, T]; the ids `image` stand for an image. Text after its start is supervised."""
    ids = [[out for token in row for out in (image if token == P else [token])] for row in sequences]
    labels = [
        [out for i, token in enumerate(row) for out in (nothing if token == P else [token if i > 1 else IGNORE_INDEX])]
        for row in sequences
        for nothing in [[IGNORE_INDEX] * len(image)]
    ]

    def padded(values, pad):
        tensors = [torch.tensor(row) for row in values]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)

    return padded(ids, PAD), padded([[1] * len(row) for row in ids], 0), padded(labels, IGNORE_INDEX)


def images(sequences):
    """Return as many images [N, 3, H, W] as the sequences have placeholders, None without one."""
    count = sum(row.count(P) for row in sequences)
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) if count else None


@pytest.mark.parametrize("name", BATCHES)
def test_logits_loss_and_gradients_are_those_of_transformers_own_llava(pair, name):
    ours, hf, num_features = pair
    sequences = BATCHES[name]
    ids, mask, labels = batch_of(sequences, [P])
    mine = ours(ids, attention_mask=mask, labels=labels, images=images(sequences))
    ids, mask, labels = batch_of(sequences, [PLACEHOLDER] * num_features)
    theirs = hf(ids, attention_mask=mask, labels=labels, pixel_values=images(sequences))
    real = mask.bool()
    torch.testing.assert_close(mine.logits[real], theirs.logits[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=0, atol=1e-5)
    for model, loss in ((ours, mine.loss), (hf, theirs.loss)):
        model.zero_grad()
        loss.backward()
    expected = {neutral(name): param.grad for name, param in hf.named_parameters()}
    for parameter, param in ours.named_parameters():
        grad = expected[neutral(parameter)]
        assert (param.grad is None) == (grad is None), parameter
        if grad is not None:
            torch.testing.assert_close(param.grad, grad, rtol=0, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", ["two images and none", "no image"])
def test_blank_images_of_sequences_without_one_change_nothing(pair, name):
    """LLaVA's collator gives every sequence an image, one of zeros where there is none."""
    ours, _, _ = pair
    sequences = BATCHES[name]
    ids, mask, labels = batch_of(sequences, [P])
    with torch.no_grad():
        expected = ours(ids, attention_mask=mask, labels=labels, images=images(sequences))
        seen, filled = iter([] if images(sequences) is None else images(sequences)), []
        for row in sequences:
            filled += [next(seen) for _ in range(row.count(P))] or [torch.zeros(3, 16, 16)]
        output = ours(ids, attention_mask=mask, labels=labels, images=torch.stack(filled))
        listed = ours(ids, attention_mask=mask, labels=labels, images=filled)
    for other in (output, listed):
        torch.testing.assert_close(other.loss, expected.loss)
        torch.testing.assert_close(other.logits, expected.logits)


@pytest.mark.parametrize("name", ["unequal lengths", "two images and none"])
def test_greedy_answers_are_those_of_transformers_own_llava(pair, name):
    ours, hf, num_features = pair
    sequences = BATCHES[name]
    ids, mask, _ = batch_of(sequences, [P])
    greedy = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD, "eos_token_id": END}
    mine = ours.generate(ids, images=images(sequences), attention_mask=mask, **greedy)
    ids, mask, _ = batch_of(sequences, [PLACEHOLDER] * num_features, side="left")
    theirs = hf.generate(input_ids=ids, attention_mask=mask, pixel_values=images(sequences), **greedy)
    assert mine.tolist() == theirs[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("side", ["right", "left"])
def test_spliced_embeddings_are_words_and_features_in_their_order(pair, side):
    ours, hf, num_features = pair
    sequences = BATCHES["two images and none"]
    ids, mask, labels = batch_of(sequences, [P])
    ours.config.tokenizer_padding_side = side
    try:
        with torch.no_grad():
            _, positions, new_mask, _, embeds, new_labels = ours.prepare_inputs_labels_for_multimodal(
                ids, torch.arange(ids.shape[1]).expand_as(ids), mask, None, labels, images(sequences)
            )
            features = hf.model.get_image_features(pixel_values=images(sequences)).pooler_output
            words = hf.get_input_embeddings()
            expected_ids, expected_mask, expected_labels = batch_of(sequences, [PLACEHOLDER] * num_features, side)
            expected, seen = words(expected_ids), iter(torch.cat(list(features)))
            for place in (expected_ids == PLACEHOLDER).nonzero():
                expected[tuple(place)] = next(seen)
    finally:
        ours.config.tokenizer_padding_side = "right"
    torch.testing.assert_close(embeds, expected * expected_mask[..., None], rtol=0, atol=1e-5)
    assert torch.equal(new_mask, expected_mask)
    assert torch.equal(new_labels, expected_labels)
    for row, real in zip(positions, expected_mask.bool(), strict=True):
        assert row[real].tolist() == list(range(int(real.sum())))
        assert not row[~real].any()


@pytest.mark.parametrize("max_length", [6, 9])
def test_sequences_with_labels_are_truncated_at_the_maximum_of_the_config(pair, max_length):
    """What stands after the cut cannot change what stands before it, so the loss is that of the first logits."""
    ours, _, num_features = pair
    sequences = BATCHES["unequal lengths"]
    ids, mask, labels = batch_of(sequences, [P])
    with torch.no_grad():
        logits = ours(ids, attention_mask=mask, labels=labels, images=images(sequences)).logits
    ours.config.tokenizer_model_max_length = max_length
    try:
        with torch.no_grad():
            scored = ours(ids, attention_mask=mask, labels=labels, images=images(sequences))
            loss = ours.train()(ids, attention_mask=mask, labels=labels, images=images(sequences)).loss
    finally:
        ours.eval()
        ours.config.tokenizer_model_max_length = None
    _, _, labels = batch_of(sequences, [PLACEHOLDER] * num_features)
    assert logits.shape[:2] == labels.shape
    expected = torch.nn.functional.cross_entropy(
        logits[:, : max_length - 1].flatten(0, 1), labels[:, 1:max_length].flatten(), ignore_index=IGNORE_INDEX
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored.loss, expected, rtol=0, atol=1e-5)
    assert scored.logits.shape[1] == max_length
