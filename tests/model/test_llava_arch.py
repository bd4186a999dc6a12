"""What every backbone must do: forward, loss, generate, train, save."""

import pytest
import torch
from conftest import BACKBONE_TYPES
from transformers import AutoModelForCausalLM

from llava_lite.constants import IGNORE_INDEX
from llava_lite.data.collator import DataCollatorForSupervisedDataset
from llava_lite.model.loss import find_supervised

MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
IMAGE = -200


def prompt_batch(generator=None):
    """Return ids [3, 7] with 1, 2 and 0 images, mask and labels, padded right."""
    ids = torch.tensor(
        [[1, 300, IMAGE, 301, 302, 303, 0], [1, IMAGE, 304, IMAGE, 305, 306, 307], [1, 308, 309, 0, 0, 0, 0]]
    )
    mask = torch.tensor([[1] * 6 + [0], [1] * 7, [1] * 3 + [0] * 4])
    labels = torch.where((mask == 1) & (ids > 300), ids, IGNORE_INDEX)
    return ids, mask, labels


def images(num=3):
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_an_image_is_the_decoder_of_transformers_reading_its_features(model_type, toy_model, toy_llm_dir):
    model = toy_model(model_type)
    hf = AutoModelForCausalLM.from_pretrained(toy_llm_dir(model_type), dtype=torch.float32).eval()
    ids = torch.tensor([[1, 300, IMAGE, 301, 302]])
    tower = model.get_vision_tower()
    hidden = tower.encoder(images(1), output_hidden_states=True).hidden_states[-2][:, 1:]
    features = model.model.mm_projector(hidden)
    text = hf.get_input_embeddings()
    embeds = torch.cat([text(ids[:, :2]), features, text(ids[:, 3:])], dim=1)
    expected = hf(inputs_embeds=embeds).logits
    with torch.no_grad():
        got = model(ids, images=images(1)).logits
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_one_placeholder_an_image_equals_one_a_feature(model_type, moe, toy_model):
    model = toy_model(model_type, moe=moe)
    ids = torch.tensor([[1, 300, IMAGE, 301, 302]])
    expanded = torch.tensor([[1, 300] + [IMAGE] * 16 + [301, 302]])
    with torch.no_grad():
        assert torch.equal(model(ids, images=images(1)).logits, model(expanded, pixel_values=images(1)).logits)


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_loss_is_the_mean_cross_entropy_of_supervised_positions(model_type, toy_model):
    model = toy_model(model_type)
    ids, mask, labels = prompt_batch()
    out = model(ids, attention_mask=mask, labels=labels, images=images())
    row = torch.tensor([[1, 300] + [IMAGE] * 16 + [301, 302, 303]])
    single = model(row, images=images()[:1]).logits.log_softmax(-1)
    by_hand = -sum(single[0, 18 + i - 1, token] for i, token in enumerate([301, 302, 303]))
    first_only = model(ids[:1], attention_mask=mask[:1], labels=labels[:1], images=images()[:1])
    assert torch.allclose(first_only.loss, by_hand / 3, atol=1e-5)
    model.train()
    trained = model(ids, attention_mask=mask, labels=labels, images=images())
    assert trained.logits is None
    assert torch.allclose(trained.loss, out.loss, atol=1e-5)
    num_supervised = (labels != IGNORE_INDEX).sum()
    scaled = model(ids, attention_mask=mask, labels=labels, images=images(), num_items_in_batch=4 * num_supervised)
    assert torch.allclose(scaled.loss * 4, out.loss, atol=1e-5)


@pytest.mark.parametrize("max_length", [None, 6], ids=["into the padding", "and are cut"])
def test_positions_of_the_collator_are_not_taken_where_sequences_grow_to_the_same_length(max_length, toy_model):
    model = toy_model(tokenizer_model_max_length=max_length).train()
    long = [1, *range(300, 300 + 24)]
    examples = [
        {"id": str(row), "input_ids": torch.tensor(ids), "labels": torch.tensor([IGNORE_INDEX, *ids[1:]])}
        for row, ids in enumerate([[1, IMAGE, 310, 311, 312], long if max_length is None else long[:6]])
    ]
    examples[0]["labels"][1] = IGNORE_INDEX
    examples[0]["images"] = [images(1)[0]]
    batch = DataCollatorForSupervisedDataset(0)(examples)
    reported = {key: batch[key] for key in ("input_ids", "labels", "attention_mask", "images")}
    loss = model(**reported, supervised_positions=batch["supervised_positions"]).loss
    torch.testing.assert_close(loss, model(**reported).loss, atol=0, rtol=0)


def test_positions_of_a_complete_sequence_are_not_taken_for_a_part_of_it(toy_model):
    model, ids = toy_model().train(), torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    full = find_supervised(ids)[0]
    for part in (slice(0, 8), slice(8, 16)):
        reported = {"input_ids": ids[:, part], "labels": ids[:, part], "shift_labels": shifted[:, part]}
        loss = model(**reported, supervised_positions=full, use_cache=False).loss
        torch.testing.assert_close(loss, model(**reported, use_cache=False).loss, atol=0, rtol=0)


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_batched_answers_equal_single_ones_and_cached_equals_uncached(model_type, moe, toy_model):
    model = toy_model(model_type, moe=moe)
    ids, mask, _ = prompt_batch()
    together = model.generate(ids, images=images(), attention_mask=mask, max_new_tokens=6, do_sample=False)
    start = 0
    for row in range(3):
        alone = ids[row : row + 1, mask[row] == 1]
        count = int((alone == IMAGE).sum())
        mine = images()[start : start + count] if count else None
        start += count
        for use_cache in (True, False):
            answer = model.generate(alone, images=mine, max_new_tokens=6, do_sample=False, use_cache=use_cache)
            size = answer.shape[1]
            assert torch.equal(answer[0], together[row, :size])
            assert bool((together[row, size:] == model.config.pad_token_id).all())


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_decoder_stack_reads_images_alone_too(model_type, toy_model):
    model = toy_model(model_type)
    ids, mask, _ = prompt_batch()
    with torch.no_grad():
        full = model(ids, attention_mask=mask, images=images(), output_hidden_states=True).hidden_states[-1]
        alone = model.model(ids, attention_mask=mask, pixel_values=images()).last_hidden_state
    assert torch.equal(alone, full)


def test_both_conventions_of_generate_give_the_same_new_tokens(toy_model):
    model = toy_model()
    ids, mask, _ = prompt_batch()
    new = model.generate(ids, images=images(), attention_mask=mask, max_new_tokens=5, do_sample=False)
    full = model.generate(
        input_ids=ids,
        pixel_values=images(),
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        repetition_penalty=1.0,
    )
    assert torch.equal(full[:, -new.shape[1] :], new)
    assert full.shape[1] == 5 + 32 + new.shape[1]  # 5 words and 2 images of 16 in the longest sequence
    assert int(full.min()) >= 0
    assert model.generate(input_ids=torch.tensor([[1, 300]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)
    assert model.generate(torch.tensor([[1, 300]]), images=None, max_new_tokens=2, min_new_tokens=2).shape == (1, 2)
    model.generate(ids[:1, :6], pixel_values=images(1), max_new_tokens=2, repetition_penalty=1.3)


def test_generating_leaves_every_module_in_the_mode_it_was_in(toy_model):
    model = toy_model().train()
    model.get_vision_tower().eval()
    before = [module.training for module in model.modules()]
    model.generate(torch.tensor([[1, 300, IMAGE, 301]]), images=images(1), max_new_tokens=2)
    assert [module.training for module in model.modules()] == before


def test_vocabulary_placeholder_and_minus_200_are_both_understood(toy_model):
    model = toy_model(image_token_index=7)
    with torch.no_grad():
        own = model(torch.tensor([[1, 300, 7, 301]]), images=images(1)).logits
        llava = model(torch.tensor([[1, 300, IMAGE, 301]]), images=images(1)).logits
    assert torch.equal(own, llava)


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_text_only_batch_gives_tower_and_connector_zero_gradient(model_type, moe, toy_model):
    model = toy_model(model_type, moe=moe).train()
    ids = torch.tensor([[1, 300, 301, 302]])
    model(ids, labels=ids.clone()).loss.backward()
    tower = model.get_vision_tower()
    read = [p for layer in tower.layers[: tower.num_read_layers] for p in layer.parameters()]
    for parameter in [*model.model.mm_projector.parameters(), *read]:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_images_that_are_no_batch_are_refused_with_what_is_expected(toy_model):
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\); expected \[N, 3, H, W\]"):
        toy_model()(torch.tensor([[1, -200, 5]]), images=torch.zeros(3, 32, 32))


def test_images_without_placeholders_and_placeholders_without_images_are_refused(toy_model):
    model = toy_model()
    with pytest.raises(ValueError, match="0 image placeholders in input_ids but 1 images of 16 features"):
        model(torch.tensor([[1, 300]]), images=images(1))
    with pytest.raises(ValueError, match="1 image placeholders in input_ids but no images"):
        model(torch.tensor([[1, IMAGE]]))


@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_checkpointed_gradients_equal_plain_ones_dense_and_moe(model_type, toy_model):
    for moe in (None, MOE):
        grads = []
        for checkpointing in (False, True):
            model = toy_model(model_type, moe=moe).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            ids, mask, labels = prompt_batch()
            model(ids, attention_mask=mask, labels=labels, images=images()).loss.backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for name, gradient in grads[0].items():
            assert torch.allclose(gradient, grads[1][name], atol=1e-6), name
        if moe:
            assert all(g.abs().max() > 0 for n, g in grads[1].items() if n.endswith("mlp.gate.weight"))


def test_moe_loss_is_the_weighted_sum_over_layers_and_part_of_the_loss(toy_model):
    model = toy_model(moe=MOE)
    ids, mask, labels = prompt_batch()
    out = model(ids, attention_mask=mask, labels=labels, images=images())
    assert len(out.moe_loss_list) == 2
    assert torch.allclose(out.moe_loss, 0.01 * sum(out.moe_loss_list))
    assert torch.allclose(out.loss, out.lm_loss + out.moe_loss)
    assert all(float(term.detach()) >= 0.5 for term in out.moe_loss_list)
    dense = toy_model()(ids, attention_mask=mask, labels=labels, images=images())
    assert torch.allclose(out.lm_loss, dense.lm_loss, atol=1e-6)
    assert dense.moe_loss is None


@pytest.mark.parametrize("implementation", ["eager", "varlen"])
@pytest.mark.parametrize("model_type", BACKBONE_TYPES)
def test_attention_implementations_agree_at_real_positions(model_type, implementation, toy_model):
    model = toy_model(model_type)
    ids, mask, labels = prompt_batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, labels=labels, images=images())
        model.set_attn_implementation(implementation)
        got = model(ids, attention_mask=mask, labels=labels, images=images())
        assert torch.allclose(got.loss, expected.loss, atol=1e-5)
        model.set_attn_implementation("sdpa")
        tokens = model.generate(ids, images=images(), attention_mask=mask, max_new_tokens=5, do_sample=False)
        model.set_attn_implementation(implementation)
        again = model.generate(ids, images=images(), attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, again)


def test_a_model_builds_from_its_config_alone():
    from llava_lite.model import LlavaConfig, LlavaLlamaForCausalLM

    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = LlavaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vision_config=vision,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=32,
        moe={"moe_enable": True, "moe_mode": "dense", "num_experts": [3], "top_k_experts": 2},
    )
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM(config)
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    out = model(ids, images=images(1), labels=torch.tensor([[-100, -100, 5, 6]]))
    assert out.loss.isfinite()
    assert 3 < float(out.lm_loss) < 7
    assert config.num_image_tokens == 16


def padded_and_alone(model, mask=None):
    """Return new tokens of a ragged batch and of its shortest sequence alone."""
    ids, real, _ = prompt_batch()
    together = model.generate(
        ids, images=images(), attention_mask=real if mask is None else mask, max_new_tokens=6, min_new_tokens=6
    )
    alone = model.generate(ids[2:, :3], images=None, max_new_tokens=6, min_new_tokens=6)
    return together[2], alone[0]


def test_the_mask_is_what_makes_batched_answers_equal_single_ones(toy_model):
    model = toy_model()
    together, alone = padded_and_alone(model)
    assert torch.equal(together, alone)
    together, alone = padded_and_alone(model, mask=torch.ones(3, 7, dtype=torch.long))
    assert not torch.equal(together, alone)


def test_the_mask_is_what_keeps_padding_from_the_router(toy_model):
    model = toy_model(moe=MOE)
    ids, mask, labels = prompt_batch()
    row = {"input_ids": ids[2:, :3], "labels": labels[2:, :3], "attention_mask": mask[2:, :3]}
    padded = {"input_ids": ids[2:], "labels": labels[2:], "attention_mask": mask[2:]}
    assert torch.allclose(model(**row).moe_loss, model(**padded).moe_loss, atol=1e-6)
    padded["attention_mask"] = torch.ones_like(padded["attention_mask"])
    assert not torch.allclose(model(**row).moe_loss, model(**padded).moe_loss, atol=1e-6)


@pytest.mark.parametrize("connector", ["identity", "mlp2x_gelu"])
def test_partitioned_weights_are_gathered_for_text_too_even_outside_training(toy_model, connector):
    model = toy_model(mm_projector_type=connector)
    assert not model.needs_dummy()
    assert model.train().needs_dummy()
    assert not toy_model(tower=None).train().needs_dummy()
    for number, parameter in enumerate(model.eval().parameters()):
        # ZeRO-3's attribute of a weight.
        parameter.ds_id = number
    assert model.needs_dummy()


def test_reentrant_checkpointing_of_experts_is_refused_and_of_a_dense_model_is_not(toy_model):
    model = toy_model(moe={"num_experts": [2], "moe_mode": "dense", "top_k_experts": 1})
    with pytest.raises(ValueError, match="balance loss gets no gradient from reentrant checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    toy_model().gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("none", [0, torch.tensor(0)])
def test_a_step_without_a_supervised_token_has_a_loss_of_zero(toy_model, none):
    model = toy_model().train()
    ids = torch.arange(30, 36)[None]
    output = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=none)
    assert output.loss.item() == 0
