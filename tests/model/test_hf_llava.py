"""The same weights in transformers' own LLaVA: one call of `generate` there and here gives the same tokens."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
)

from llava_lite.model import LlavaLlamaConfig, LlavaLlamaForCausalLM

IS_OLD = Version(transformers.__version__) < Version("5.23")
IMAGE, PAD, EOS = 7, 0, 2
NUM_FEATURES = 16
MOE = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}
TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
    "initializer_range": 0.3,
}
OPENINGS = (("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),)
OPENINGS += (("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_model."),)
OPENINGS += (("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),)
OPENINGS += (("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),)
OPENINGS += (("model.", "model.language_model."), ("", ""))


def hf_name(name, known):
    """Return the name that a weight of ours has in transformers' LLaVA, whose names are `known`."""
    renamed = (there + name.removeprefix(here) for here, there in OPENINGS if name.startswith(here))
    return next(candidate for candidate in renamed if candidate in known)


@pytest.fixture(scope="module")
def pair():
    """(ours, transformers' own) with the same weights."""
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model"} | VISION
    ours = LlavaLlamaForCausalLM(
        LlavaLlamaConfig(**TEXT, vision_config=vision, mm_projector_type="mlp2x_gelu", image_token_index=IMAGE)
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        image_seq_length=NUM_FEATURES,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=1,
    )
    hf = LlavaForConditionalGeneration(config)
    known = set(hf.state_dict())
    weights = {hf_name(name, known): weight for name, weight in ours.state_dict().items()}
    assert set(weights) == known
    hf.load_state_dict(weights)
    return ours.eval(), hf.eval()


@pytest.fixture(scope="module")
def inputs():
    """Three sequences padded on the left: one image, two images, none."""
    sequences = [[1, 30, *[IMAGE] * 16, 31, 32, 33], [1, *[IMAGE] * 16, 34, *[IMAGE] * 16, 35], [1, 36, 37, 36, 37]]
    longest = max(map(len, sequences))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in sequences])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences])
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def tokens(model, inputs, seed=0, **arguments):
    torch.manual_seed(seed)
    return model.generate(**inputs, **({"max_new_tokens": 12, "do_sample": False} | arguments))


@torch.no_grad()
def test_logits_loss_and_gradient_are_hf_llavas(pair, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == IMAGE, -100)
    ours, hf = (model(**inputs, labels=labels, output_hidden_states=True) for model in pair)
    real = inputs["attention_mask"].bool()
    assert torch.allclose(ours.logits[real], hf.logits[real], atol=1e-5)
    assert torch.allclose(ours.loss, hf.loss, atol=1e-6)
    assert len(ours.hidden_states) == len(hf.hidden_states)
    with torch.enable_grad():
        grads = []
        for model in pair:
            model.zero_grad()
            model(**inputs, labels=labels).loss.backward()
            grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
            model.zero_grad()
    ours, hf = grads
    assert all(torch.allclose(grad, hf[hf_name(name, set(hf))], atol=1e-5) for name, grad in ours.items())
    assert len(ours) == len(hf)


STRATEGIES = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several sampled": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "beams with a static cache": {"cache_implementation": "static", "num_beams": 2},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "prompt in chunks": {"prefill_chunk_size": 8},
    "total length": {"max_new_tokens": None, "max_length": 44},
    "least length": {"min_new_tokens": 9, "max_new_tokens": 10},
    "penalty on repetition": {"repetition_penalty": 1.8},
    "no pair of tokens twice": {"no_repeat_ngram_size": 2},
    "no word of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "words of the prompt": {"encoder_repetition_penalty": 3.0},
    "words of the prompt by beams": {"encoder_repetition_penalty": 3.0, "num_beams": 2, "num_return_sequences": 2},
    "bad words": {"bad_words_ids": [[31], [36, 37], [90]]},
    "forced end": {"forced_eos_token_id": EOS},
    "several ends": {"eos_token_id": [2, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59]},
    "typical and min p": {"do_sample": True, "typical_p": 0.8, "min_p": 0.02},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generate_gives_hf_llavas_tokens(strategy, pair, inputs):
    arguments = STRATEGIES[strategy]
    if IS_OLD and "num_beams" in arguments:
        # Older ones repeat images one by one for the beams, and so mix up those of sequences that have two.
        inputs = {name: value[:1] for name, value in inputs.items()}
    ours, hf = (tokens(model, inputs, **arguments) for model in pair)
    if IS_OLD and "prefill_chunk_size" in arguments:
        # Older ones give every part of a prompt all images.
        hf = tokens(pair[1], inputs)
    assert torch.equal(ours, hf)


@pytest.mark.parametrize("arguments", [{"images": ...}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_a_prompt_prefilled_in_parts_gives_the_tokens_of_a_complete_one(arguments, pair, inputs):
    if "images" in arguments:
        arguments = {"images": inputs["pixel_values"]}
        inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
    full = tokens(pair[0], inputs, **arguments)
    assert torch.equal(tokens(pair[0], inputs, prefill_chunk_size=8, **arguments), full)
    penalised = tokens(pair[0], inputs, encoder_repetition_penalty=3.0, **arguments)
    assert not torch.equal(penalised, full)


def test_guidance_called_llavas_way_gives_the_new_tokens_of_the_other_way(pair, inputs):
    there = tokens(pair[0], inputs, guidance_scale=1.5)
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    here = tokens(pair[0], rest, images=inputs["pixel_values"], guidance_scale=1.5)
    assert torch.equal(here, there[:, -here.shape[1] :])
    assert here.shape[1] < there.shape[1]


def test_prompt_lookup_gives_the_tokens_of_greedy_search(pair, inputs):
    one = {"input_ids": inputs["input_ids"][:1, -21:], "pixel_values": inputs["pixel_values"][:1]}
    ours, hf = pair
    plain = tokens(ours, one)
    assert torch.equal(tokens(ours, one, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(tokens(hf, one), plain)


@pytest.mark.parametrize("kind", ["llava", "itself", "text"])
def test_assisted_decoding_gives_the_tokens_of_greedy_search(kind, pair, inputs):
    one = {"input_ids": inputs["input_ids"][:1, -21:], "pixel_values": inputs["pixel_values"][:1]}
    ours, _ = pair
    torch.manual_seed(3)
    if kind == "text":
        assistant = LlamaForCausalLM(LlamaConfig(**TEXT | {"num_hidden_layers": 1}))
    elif kind == "llava":
        assistant = LlavaLlamaForCausalLM(
            LlavaLlamaConfig(**ours.config.to_dict() | {"num_hidden_layers": 1, "hidden_size": 16, "head_dim": 4})
        )
    else:
        assistant = ours
    assert torch.equal(tokens(ours, one, assistant_model=assistant.eval()), tokens(ours, one))


def test_what_generate_returns_beside_tokens_has_hf_llavas_shapes(pair, inputs):
    asked = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
    for model in pair:
        model.set_attn_implementation("eager")
    ours, hf = (tokens(model, inputs, return_dict_in_generate=True, max_new_tokens=3, **asked) for model in pair)
    for model in pair:
        model.set_attn_implementation("sdpa")
    assert torch.equal(ours.sequences, hf.sequences)
    for kind in ("scores", "logits"):
        steps = zip(getattr(ours, kind), getattr(hf, kind), strict=True)
        assert all(torch.allclose(mine, theirs, atol=1e-4) for mine, theirs in steps)
    for kind in ("hidden_states", "attentions"):
        shapes = [[[layer.shape for layer in step] for step in getattr(one, kind)] for one in (ours, hf)]
        assert shapes[0] == shapes[1]


def test_embeddings_may_stand_in_for_ids(pair, inputs):
    words = {"input_ids": inputs["input_ids"][2:, -5:], "attention_mask": inputs["attention_mask"][2:, -5:]}
    for model in pair:
        embeds = model.get_input_embeddings()(words["input_ids"])
        with_ids = tokens(model, words)
        for arguments in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            plain = tokens(model, words, **arguments)
            new = tokens(model, {"inputs_embeds": embeds, "attention_mask": words["attention_mask"]}, **arguments)
            assert torch.equal(new, plain[:, 5:])
            both = tokens(model, words | {"inputs_embeds": embeds}, **arguments)
            assert torch.equal(both, plain)
    assert torch.equal(tokens(pair[0], words), with_ids)


def test_images_go_where_the_embedding_of_the_placeholder_stands(pair, inputs):
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    for model in pair:
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with torch.no_grad():
            assert torch.equal(model(inputs_embeds=embeds, **others).logits, model(**inputs).logits)
    ours = pair[0]
    embeds = ours.get_input_embeddings()(inputs["input_ids"])
    new = tokens(ours, {"inputs_embeds": embeds, **others})
    assert torch.equal(new, tokens(ours, inputs)[:, inputs["input_ids"].shape[1] :])
    with pytest.raises(ValueError, match="48 image placeholders in input_ids but 1 images"):
        ours(inputs_embeds=embeds, pixel_values=inputs["pixel_values"][:1])


def test_a_cache_can_be_gone_on_with(pair, inputs):
    one = {"input_ids": inputs["input_ids"][:1, -21:], "pixel_values": inputs["pixel_values"][:1]}
    ours, hf = pair
    full = tokens(ours, one, max_new_tokens=9, eos_token_id=-1)
    for model in (hf, ours):
        begun = tokens(model, one, max_new_tokens=4, eos_token_id=-1, return_dict_in_generate=True)
        rest = {"input_ids": begun.sequences, "past_key_values": begun.past_key_values}
        assert torch.equal(tokens(model, rest, max_new_tokens=5, eos_token_id=-1), full)
    cache = DynamicCache(config=ours.config)
    assert torch.equal(tokens(ours, one | {"past_key_values": cache}, max_new_tokens=9, eos_token_id=-1), full)
    assert cache.get_seq_length() == full.shape[1] - 1


def test_only_asked_for_logits_are_computed(pair, inputs):
    ours, hf = pair
    with torch.no_grad():
        all_of_them = ours(**inputs).logits
        assert torch.equal(ours(**inputs, logits_to_keep=2).logits, all_of_them[:, -2:])
        chosen = torch.tensor([0, 5])
        assert torch.allclose(ours(**inputs, logits_to_keep=chosen).logits, all_of_them[:, chosen], atol=1e-6)
    assert torch.equal(tokens(ours, inputs, logits_to_keep=3), tokens(hf, inputs))


class Seen(LogitsProcessor):
    """Keep the ids that a logits processor is shown."""

    def __call__(self, input_ids, scores):
        self.ids = input_ids
        return scores


def test_logits_processors_and_streamers_see_what_they_see_in_hf_llava(pair, inputs):
    class Kept(TextStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.tolist())

        def end(self):
            self.pieces.append("end")

    one = {"input_ids": inputs["input_ids"][:1, -21:], "pixel_values": inputs["pixel_values"][:1]}
    seen, streams = [], []
    for model in pair:
        seen.append(Seen())
        streams.append(Kept())
        tokens(model, one, logits_processor=LogitsProcessorList([seen[-1]]), streamer=streams[-1])
    assert torch.equal(seen[0].ids, seen[1].ids)
    assert streams[0].pieces == streams[1].pieces


def test_image_features_are_hf_llavas(pair, inputs):
    with torch.no_grad():
        ours, hf = (model.get_image_features(pixel_values=inputs["pixel_values"]) for model in pair)
        assert ours.hidden_states is None
        for mine, theirs in zip(ours.pooler_output, hf.pooler_output, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
        assert torch.allclose(ours.last_hidden_state, hf.last_hidden_state, atol=1e-5)
        every = pair[0].get_image_features(inputs["pixel_values"], output_hidden_states=True)
    assert len(every.hidden_states) == VISION["num_hidden_layers"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "experts"])
def test_forward_is_one_graph_with_the_logits_of_the_plain_one(moe, pair, inputs):
    ours = pair[0]
    if moe is not None:
        torch.manual_seed(0)
        ours = LlavaLlamaForCausalLM(LlavaLlamaConfig(**ours.config.to_dict() | {"moe": moe})).eval()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True)(**inputs).logits
        assert torch.allclose(compiled[real], ours(**inputs).logits[real], atol=1e-4)


@pytest.mark.slow
def test_compiled_decoding_gives_the_tokens_of_the_plain_one(pair, inputs):
    ours = copy.deepcopy(pair[0])
    plain = tokens(ours, inputs, cache_implementation="static")
    ours.forward = torch.compile(ours.forward, fullgraph=True)
    assert torch.equal(tokens(ours, inputs, cache_implementation="static"), plain)
