"""LLaVA's methods of a model: what goes into the decoder, and building a model step by step."""

from types import SimpleNamespace

import pytest
import torch

from llava_lite.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_lite.model import LlavaLlamaForCausalLM, LlavaPhiForCausalLM

IMAGE = IMAGE_TOKEN_INDEX
P = 16
MOE = {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}


def random_images(num, seed=0):
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def spliced(model, ids, mask, labels, images, side, max_length):
    """The rule, sequence by sequence: real tokens, features at -200, an image for text alone, truncated, padded."""
    features = list(model.encode_images(images))
    sequences = []
    for row_ids, row_mask, row_labels in zip(ids, mask.bool(), labels, strict=True):
        embeds, targets, tokens = [], [], row_ids[row_mask].tolist()
        for token, label in zip(tokens, row_labels[row_mask].tolist(), strict=True):
            if token == IMAGE:
                embeds += features.pop(0)
                targets += [IGNORE_INDEX] * P
            else:
                embeds.append(model.get_input_embeddings().weight[token])
                targets.append(label)
        if IMAGE not in tokens:
            features.pop(0)
        sequences.append((torch.stack(embeds)[:max_length], torch.tensor(targets)[:max_length]))
    length = max(len(targets) for _, targets in sequences)
    shape = (len(sequences), length)
    out = SimpleNamespace(
        embeds=torch.zeros(*shape, 32),
        labels=torch.full(shape, IGNORE_INDEX),
        mask=torch.zeros(shape, dtype=torch.bool),
        positions=torch.zeros(shape, dtype=torch.long),
    )
    for i, (embeds, targets) in enumerate(sequences):
        where = slice(length - len(targets), length) if side == "left" else slice(0, len(targets))
        out.embeds[i, where], out.labels[i, where], out.mask[i, where] = embeds, targets, True
        out.positions[i, where] = torch.arange(len(targets))
    return out


def llava_batch():
    """Sequences of one image, text alone, two images; padded where the mask is 0."""
    sequences = [[1, IMAGE, 300, 301], [1, 310, 311], [1, 320, IMAGE, 321, IMAGE, 322, 323]]
    ids = torch.zeros(3, 7, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(sequences):
        # The middle sequence is padded on the left: padding counts wherever it stands.
        where = slice(7 - len(row), 7) if i == 1 else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    labels = torch.where((ids > 299) & mask.bool(), ids, IGNORE_INDEX)
    return ids, mask, labels


@pytest.mark.parametrize("max_length", [None, 20, 5])
@pytest.mark.parametrize("side", ["right", "left"])
def test_spliced_batch_follows_llavas_rule(side, max_length, toy_model):
    model = toy_model(tokenizer_padding_side=side, tokenizer_model_max_length=max_length)
    ids, mask, labels = llava_batch()
    positions = torch.arange(7).expand(3, 7)
    images = random_images(4)
    cache = object()
    nothing, new_positions, new_mask, same_cache, embeds, new_labels = model.prepare_inputs_labels_for_multimodal(
        ids, positions, mask, cache, labels, images
    )
    expected = spliced(model, ids, mask, labels, images, side, max_length)
    assert nothing is None
    assert same_cache is cache
    assert torch.allclose(embeds, expected.embeds, atol=1e-5)
    assert torch.equal(new_labels, expected.labels)
    assert torch.equal(new_mask, expected.mask.to(mask.dtype))
    assert torch.equal(new_positions, expected.positions)


def test_what_was_not_given_is_not_returned(toy_model):
    model = toy_model()
    ids = torch.tensor([[1, IMAGE, 300], [1, 301, 302]])
    nothing, positions, mask, cache, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, [random_images(1)[0], random_images(1)[0]], [(40, 30), (30, 40)]
    )
    assert (nothing, positions, mask, cache, labels) == (None, None, None, None, None)
    expected = spliced(model, ids, torch.ones_like(ids), ids, random_images(1).repeat(2, 1, 1, 1), "right", None)
    assert torch.allclose(embeds, expected.embeds, atol=1e-5)


@pytest.mark.parametrize("case", ["step", "no images", "no tower"])
def test_inputs_stay_as_they_are_where_there_is_nothing_to_splice(case, toy_model):
    model = toy_model(tower=None if case == "no tower" else "clip")
    ids = torch.tensor([[7]] if case == "step" else [[1, 300]])
    given = (ids, torch.zeros_like(ids), torch.ones_like(ids), object(), ids.clone())
    images = None if case == "no images" else random_images(1)
    out = model.prepare_inputs_labels_for_multimodal(*given, images)
    assert all(a is b for a, b in zip(out[:4], given[:4], strict=True))
    assert out[4] is None
    assert out[5] is given[4]


def test_sequence_of_text_alone_may_bring_llavas_blank_image(toy_model, caplog):
    """Its loss and its answer are those of the batch without the blank image."""
    model = toy_model()
    ids, mask, labels = llava_batch()
    images = random_images(4)
    images[1] = 0
    kept = images[[0, 2, 3]]
    asked = {"attention_mask": mask, "labels": labels}
    with_blank = model(ids, **asked, images=images, image_sizes=[(32, 32)] * 4)
    without = model(ids, **asked, images=kept)
    assert torch.equal(with_blank.loss, without.loss)
    as_list = model(ids, **asked, images=list(images))
    assert torch.equal(as_list.logits, without.logits)
    answers = [
        model.generate(ids, attention_mask=mask, images=given, max_new_tokens=3, pad_token_id=0)
        for given in (images, kept)
    ]
    assert torch.equal(*answers)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    text = torch.tensor([[1, 300, 301], [1, 302, 303]])
    assert torch.equal(model(text, images=torch.zeros(2, 3, 32, 32)).logits, model(text).logits)


def test_image_of_a_sequence_without_a_placeholder_is_reported(toy_model, caplog):
    model = toy_model()
    ids = torch.tensor([[1, IMAGE, 300], [1, 301, 302]])
    model(ids, images=random_images(2))
    assert "an image was given for a sequence without <image>" in caplog.text


# Building step by step, as LLaVA's own train.py does.


def vision_args(tower, **changes):
    given = {
        "vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "pretrain_mm_mlp_adapter": None,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
    }
    return SimpleNamespace(**(given | changes))


def test_plain_decoder_becomes_a_model_that_sees_and_opens_again(toy_llm_dir, toy_tower_dir, toy_model, tmp_path):
    full = toy_model()
    weights = {f"model.mm_projector.{k}": v for k, v in full.get_model().mm_projector.state_dict().items()}
    torch.save(weights, tmp_path / "mm_projector.bin")
    model = LlavaLlamaForCausalLM.from_pretrained(str(toy_llm_dir("llama")))
    assert model.get_vision_tower() is None
    asked = vision_args(toy_tower_dir(), pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"))
    model.get_model().initialize_vision_modules(model_args=asked, fsdp=[])
    ids = torch.tensor([[1, 310, IMAGE, 300]])
    expected = full(ids, images=random_images(1)).logits
    assert torch.allclose(model(ids, images=random_images(1)).logits, expected, atol=1e-6)
    trained = {name for name, p in model.get_model().vision_tower.named_parameters() if p.requires_grad}
    assert not trained
    assert all(p.requires_grad for p in model.get_model().mm_projector.parameters())
    config = model.config
    assert (config.mm_vision_tower, config.mm_hidden_size) == (str(toy_tower_dir()), 32)
    assert (config.mm_projector_type, config.use_mm_proj) == ("mlp2x_gelu", True)
    model.save_pretrained(tmp_path / "saved")
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(again(ids, images=random_images(1)).logits, expected, atol=1e-6)


def test_connector_that_was_frozen_trains_again_and_the_layer_read_is_the_one_asked_for(toy_model, toy_tower_dir):
    model = toy_model().requires_grad_(False)
    before = model.encode_images(random_images(1))
    model.initialize_vision_modules(vision_args(toy_tower_dir(), mm_vision_select_layer=-3))
    assert all(p.requires_grad for p in model.get_model().mm_projector.parameters())
    tower = model.get_vision_tower()
    assert (tower.select_layer, tower.num_read_layers) == (-3, 1)
    assert not torch.allclose(model.encode_images(random_images(1)), before)


def test_names_of_moe_llava_are_as_good_and_videos_are_refused(toy_llm_dir, toy_tower_dir):
    model = LlavaLlamaForCausalLM.from_pretrained(str(toy_llm_dir("llama")))
    theirs = SimpleNamespace(image_tower=str(toy_tower_dir()), image_projector_type="mlp2x_gelu", video_tower=None)
    model.get_model().initialize_vision_modules(theirs)
    assert model.get_image_tower() is model.get_vision_tower() is not None
    assert (model.config.mm_projector_type, model.config.mm_vision_select_layer) == ("mlp2x_gelu", -2)
    with pytest.raises(ValueError, match="there are no video towers here"):
        model.initialize_vision_modules(SimpleNamespace(image_tower="a", video_tower="LanguageBind/x"))
    with pytest.raises(ValueError, match="vision_tower is None; name one"):
        model.initialize_vision_modules(SimpleNamespace(vision_tower=None))


def test_newline_is_drawn_where_rows_of_patches_are_closed(toy_llm_dir, toy_tower_dir):
    model = LlavaLlamaForCausalLM.from_pretrained(str(toy_llm_dir("llama")))
    model.get_model().initialize_vision_modules(vision_args(toy_tower_dir(), mm_patch_merge_type="spatial_unpad"))
    newline = model.get_model().image_newline
    assert newline.shape == (32,)
    assert newline.requires_grad
    assert 0.3 < float(newline.detach().std()) * 32**0.5 < 3


def test_tower_answers_to_llavas_names(toy_model):
    tower = toy_model().get_vision_tower()
    assert tower.is_loaded is True
    assert tower.load_model(device_map="auto") is None
    assert (tower.select_layer, tower.select_feature) == (-2, "patch")
    assert (tower.hidden_size, tower.num_patches_per_side, tower.num_patches) == (32, 4, 16)
    assert torch.equal(tower.dummy_feature, torch.zeros(1, 32))
    assert tower.image_processor.crop_size == {"height": 32, "width": 32}
    full = tower.vision_tower(random_images(2), output_hidden_states=True)
    assert torch.allclose(tower.feature_select(full), tower(random_images(2)), atol=1e-5)
    one_by_one = tower(list(random_images(2)))
    assert torch.allclose(torch.cat(one_by_one), tower(random_images(2)), atol=1e-6)


def test_image_tokens_get_vocabulary_rows_that_are_the_mean_of_the_old_ones(toy_model, toy_tokenizer, toy_tower_dir):
    model = toy_model()
    num_old = len(toy_tokenizer)
    old = [layer.weight.clone() for layer in (model.get_input_embeddings(), model.lm_head)]
    asked = vision_args(
        toy_tower_dir(), mm_use_im_patch_token=True, mm_use_im_start_end=True, tune_mm_mlp_adapter=True
    )
    model.requires_grad_(False).initialize_vision_tokenizer(asked, tokenizer=toy_tokenizer)
    ids = toy_tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"])
    assert ids == [num_old, num_old + 1, num_old + 2]
    for layer, before in zip((model.get_input_embeddings(), model.lm_head), old, strict=True):
        assert torch.equal(layer.weight[:num_old], before)
        assert torch.allclose(layer.weight[ids], before.mean(0).expand(3, -1), atol=1e-6)
    assert model.get_input_embeddings().weight.requires_grad
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("rows", ["all", "new"])
def test_rows_of_image_tokens_come_from_the_adapter_file(rows, toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    model = toy_model()
    num_old = len(toy_tokenizer)
    table = torch.randn(num_old + 2, 32)
    torch.save({"model.embed_tokens.weight": table if rows == "all" else table[-2:]}, tmp_path / "adapter.bin")
    asked = vision_args(
        toy_tower_dir(), mm_use_im_start_end=True, pretrain_mm_mlp_adapter=str(tmp_path / "adapter.bin")
    )
    model.initialize_vision_tokenizer(asked, toy_tokenizer)
    assert torch.equal(model.get_input_embeddings().weight[-2:], table[-2:])
    torch.save({"model.embed_tokens.weight": table[:7]}, tmp_path / "adapter.bin")
    with pytest.raises(ValueError, match=r"embeddings of shape \(7, 32\); expected"):
        model.initialize_vision_tokenizer(asked, toy_tokenizer)


def moe_args(**changes):
    """MoE-LLaVA's flags of stage 3, in an object of its own."""
    given = {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": None,
        "ep_size": 1,
        "num_experts": [4],
        "top_k_experts": 2,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.0,
        "min_capacity": 0,
        "use_residual": False,
        "router_aux_loss_coef": 0.01,
        "train_modules": ["gate_proj", "up_proj", "down_proj", "wg"],
        "only_lora_ffn": True,
    }
    return SimpleNamespace(**(given | changes))


def test_experts_answer_as_the_dense_model_and_train_as_asked(toy_model):
    model = toy_model()
    ids = torch.tensor([[1, 310, IMAGE, 300]])
    before = model(ids, images=random_images(1)).logits
    model.initialize_moe_modules(model_args=moe_args())
    assert list(model.moe_layers()) == [0, 2]
    assert torch.allclose(model(ids, images=random_images(1)).logits, before, atol=1e-5)
    assert model.config.moe["capacity_factor"] == 1.5
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for layer in (0, 2):
        assert {n for n in trained if f"layers.{layer}." in n} == {
            f"model.layers.{layer}.mlp.{part}" for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        }
    for layer in (1, 3):
        assert {n for n in trained if f"layers.{layer}." in n} == {
            f"model.layers.{layer}.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")
        }
    assert not {n for n in trained if "layers" not in n}


def test_experts_stay_frozen_where_only_the_routers_are_named(toy_model):
    model = toy_model("phi")
    assert isinstance(model, LlavaPhiForCausalLM)
    model.initialize_moe_modules(moe_args(train_modules=["wg"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2)}


def test_own_arguments_make_experts_too(toy_model):
    from llava_lite.train.arguments.fields import ModelArguments

    model = toy_model()
    model.initialize_moe_modules(ModelArguments(model_name_or_path="x", moe_enable=True, moe_layers_idx=[1]))
    assert list(model.moe_layers()) == [1]
    assert all(p.requires_grad for p in model.parameters())
