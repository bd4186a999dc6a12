"""Continuing from a cache: the tokens and logits of transformers' LLaVA, or an error where the ids fit nothing."""

import copy

import pytest
import torch

from llava_lite.constants import IMAGE_TOKEN_INDEX
from tests.model.test_hf_llava import EOS, IMAGE, MOE, NUM_FEATURES, PAD, pair

__all__ = ["pair"]
FIRST = {
    "text": [[1, 36, 37, 38, 39, 40]],
    "image": [[1, 30, *[IMAGE] * NUM_FEATURES, 31, 32, 33]],
    "batch": [[PAD, PAD, PAD, 1, *[IMAGE] * NUM_FEATURES, 31], [1, 30, 44, *[IMAGE] * NUM_FEATURES, 31, 32]],
}
# What the second turn adds to each sequence; the long one has more ids than the first turn.
SECOND = {
    "short text": [50, 51, 52],
    "long text": [50 + i % 40 for i in range(60)],
    "image": [60, *[IMAGE] * NUM_FEATURES, 61, 62],
    "long text, then an image": [*[50 + i % 40 for i in range(60)], *[IMAGE] * NUM_FEATURES, 63],
}


def get_pixels(ids, seed):
    """Return random images, as many as the ids have placeholders for; None without one."""
    count = int((ids == IMAGE).sum()) // NUM_FEATURES
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) if count else None


def named(pixels):
    return {} if pixels is None else {"pixel_values": pixels}


def joined(first, second):
    """Return the images of each sequence, the first turn's before the second's, in reading order."""
    if first is None or second is None:
        return first if second is None else second
    return torch.stack([first, second], dim=1).flatten(0, 1)


def generate(model, **inputs):
    torch.manual_seed(0)
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, **asked, output_logits=True)


class TwoTurns:
    """Two turns: the cache that the first one left, and the ids of both."""

    def __init__(self, model, first, second):
        ids = torch.tensor(FIRST[first])
        self.mask = (ids != PAD).long()
        self.pixels = get_pixels(ids, seed=1)
        output = generate(model, input_ids=ids, attention_mask=self.mask, **named(self.pixels))
        self.cache, self.num_cached = output.past_key_values, output.past_key_values.get_seq_length()
        added = torch.tensor([SECOND[second]] * len(ids))
        self.ids = torch.cat([output.sequences, added], dim=1)
        self.full_mask = torch.cat([self.mask, torch.ones_like(self.ids[:, self.mask.shape[1] :])], dim=1)
        self.new_pixels = get_pixels(added, seed=2)
        self.all_pixels = joined(self.pixels, self.new_pixels)
        self.new_ids = self.ids[:, self.num_cached :]

    def continue_from(self, model, **inputs):
        return generate(model, **inputs, past_key_values=copy.deepcopy(self.cache))


def assert_same_answer(found, expected, num_new=5):
    assert torch.equal(found.sequences[:, -num_new:], expected.sequences[:, -num_new:])
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_second_turn_is_that_of_transformers_and_of_no_cache(pair, first, second, attention):
    ours, hf = pair
    ours.set_attn_implementation(attention)
    turns, theirs = TwoTurns(ours, first, second), TwoTurns(hf, first, second)
    assert torch.equal(turns.ids, theirs.ids)
    fresh = generate(hf, input_ids=turns.ids, attention_mask=turns.full_mask, **named(turns.all_pixels))
    new = {"input_ids": turns.new_ids, "attention_mask": turns.full_mask, **named(turns.new_pixels)}
    full = {"input_ids": turns.ids, "attention_mask": turns.full_mask}
    assert_same_answer(theirs.continue_from(hf, **new), fresh)
    assert_same_answer(turns.continue_from(ours, **new), fresh)
    # All ids: with the new images, as transformers wants it, and with all of them.
    assert_same_answer(theirs.continue_from(hf, **full, **named(turns.new_pixels)), fresh)
    assert_same_answer(turns.continue_from(ours, **full, **named(turns.new_pixels)), fresh)
    assert_same_answer(turns.continue_from(ours, **full, **named(turns.all_pixels)), fresh)
    # LLaVA's way returns new tokens only.
    answer = turns.continue_from(ours, inputs=turns.ids, attention_mask=turns.full_mask, images=turns.all_pixels)
    assert torch.equal(answer.sequences, fresh.sequences[:, -5:])
    ours.set_attn_implementation("sdpa")


@pytest.mark.parametrize("second", SECOND)
def test_one_placeholder_an_image_is_understood_with_all_images(pair, second):
    ours, _ = pair
    turns = TwoTurns(ours, "image", second)
    fresh = generate(ours, input_ids=turns.ids, attention_mask=turns.full_mask, **named(turns.all_pixels))
    row, short = turns.ids[0].tolist(), []
    for i, token in enumerate(row):
        if token != IMAGE:
            short.append(token)
        elif row[i - 1] != IMAGE:
            short.append(IMAGE_TOKEN_INDEX)
    ids = torch.tensor([short])
    for more in ({"attention_mask": torch.ones_like(ids)}, {}):
        answer = turns.continue_from(ours, inputs=ids, images=turns.all_pixels, **more)
        assert torch.equal(answer.sequences, fresh.sequences[:, -5:])
    with pytest.raises(ValueError, match=r"image placeholders, .* of them after the .* cached positions|no id is new"):
        turns.continue_from(ours, inputs=ids, images=turns.new_pixels)


OTHERS = "cached sequences were computed with other images than this call brings for them"


@pytest.mark.parametrize("second", ["short text", "image"])
@pytest.mark.parametrize("first", ["image", "batch"])
def test_other_images_of_cached_positions_are_refused(pair, first, second):
    ours, _ = pair
    turns = TwoTurns(ours, first, second)
    full = {"input_ids": turns.ids, "attention_mask": turns.full_mask}
    num_rows, step = len(turns.ids), 1 + (turns.new_pixels is not None)
    for row in range(num_rows):
        other = turns.all_pixels.clone()
        other[row * step] = other[row * step] * 0.9
        for given in ({"pixel_values": other}, {"image_features": torch.cat(ours.tower_features(other))}):
            with pytest.raises(ValueError, match=f"1 of {num_rows} {OTHERS}, which would not be read"):
                turns.continue_from(ours, **full, **given)
        with pytest.raises(ValueError, match=f"1 of {num_rows} {OTHERS}"):
            turns.continue_from(ours, inputs=turns.ids, attention_mask=turns.full_mask, images=other)
    if step == 2:
        # Other new images are new ones.
        other = turns.all_pixels.clone()
        other[1::2] *= 0.9
        turns.continue_from(ours, **full, pixel_values=other)
    features = torch.cat([torch.cat(ours.tower_features(one[None])) for one in turns.all_pixels])
    turns.continue_from(ours, **full, image_features=features)


def test_images_of_three_turns_are_known_whichever_call_brought_them(pair):
    ours, _ = pair
    turns = TwoTurns(ours, "image", "image")
    brought = ({"input_ids": turns.ids, "pixel_values": turns.all_pixels},)
    brought += ({"input_ids": turns.new_ids, "pixel_values": turns.new_pixels},)
    for given in brought:
        output = turns.continue_from(ours, **given, attention_mask=turns.full_mask)
        ids = torch.cat([turns.ids, output.sequences[:, -5:], torch.tensor([[70, 71]])], dim=1)
        third = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for i in (0, 1):
            other = turns.all_pixels.clone()
            other[i] = -other[i]
            with pytest.raises(ValueError, match=f"1 of 1 {OTHERS}"):
                generate(ours, **third, pixel_values=other, past_key_values=copy.deepcopy(output.past_key_values))
        found = generate(ours, **third, pixel_values=turns.all_pixels, past_key_values=output.past_key_values)
        assert_same_answer(found, generate(ours, **third, pixel_values=turns.all_pixels))


def test_a_cache_that_forward_filled_is_continued_with_the_images_that_are_given(pair):
    ours, _ = pair
    turns = TwoTurns(ours, "image", "short text")
    with torch.no_grad():
        first = turns.ids[:, : turns.num_cached]
        cache = ours(first, pixel_values=turns.pixels, use_cache=True).past_key_values
    full = {"input_ids": turns.ids, "attention_mask": turns.full_mask, "pixel_values": turns.all_pixels}
    assert_same_answer(generate(ours, **full, past_key_values=cache), generate(ours, **full))


@pytest.mark.parametrize("second", ["long text", "image"])
def test_experts_continue_as_without_a_cache(toy_model, second):
    model = toy_model(moe=MOE, image_token_index=IMAGE)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".experts." in name:
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    turns = TwoTurns(model, "batch", second)
    fresh = generate(model, input_ids=turns.ids, attention_mask=turns.full_mask, **named(turns.all_pixels))
    new = {"input_ids": turns.new_ids, "attention_mask": turns.full_mask, **named(turns.new_pixels)}
    assert_same_answer(turns.continue_from(model, **new), fresh)
    assert_same_answer(
        turns.continue_from(model, input_ids=turns.ids, attention_mask=turns.full_mask, **named(turns.all_pixels)),
        fresh,
    )


@pytest.mark.parametrize("second", SECOND)
def test_forward_in_two_pieces_is_forward_at_once(pair, second):
    _, hf = pair
    turns = TwoTurns(hf, "batch", second)
    positions = turns.full_mask.cumsum(1) - 1
    positions = positions.masked_fill(turns.full_mask == 0, 0)
    with torch.no_grad():
        full = {"attention_mask": turns.full_mask, "position_ids": positions, **named(turns.all_pixels)}
        expected = hf(turns.ids, **full).logits[:, -1]
        for model in pair:
            cut = turns.num_cached
            first = {"attention_mask": turns.full_mask[:, :cut], "position_ids": positions[:, :cut]}
            cache = model(turns.ids[:, :cut], **first, **named(turns.pixels), use_cache=True).past_key_values
            rest = {"attention_mask": turns.full_mask, "position_ids": positions[:, cut:], **named(turns.new_pixels)}
            found = model(turns.new_ids, **rest, past_key_values=cache, use_cache=True).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "asked", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"guidance_scale": 1.5}], ids=str
)
def test_other_ways_of_generating_continue_too(pair, asked):
    ours, _ = pair
    turns = TwoTurns(ours, "image", "image")
    inputs = {"input_ids": turns.ids, "attention_mask": turns.full_mask, "pixel_values": turns.all_pixels}
    more = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **asked}
    cache = copy.deepcopy(turns.cache)
    if "num_beams" in asked:
        # As transformers wants it of a cache for beams.
        cache.batch_repeat_interleave(3)
    fresh = ours.generate(**inputs, **more)
    assert torch.equal(ours.generate(**inputs, **more, past_key_values=cache)[:, -5:], fresh[:, -5:])


@pytest.mark.parametrize(
    ("ids", "mask_len", "words"),
    [
        (5, None, r"5 ids and a cache of 25 positions: no id is new"),
        (5, 5, r"5 ids and a cache of 25 positions: no id is new"),
        (5, 12, r"5 ids, an attention_mask of 12 and a cache of 25 positions; expected .* new ids and a mask of 30"),
        (5, 31, r"5 ids, an attention_mask of 31 and a cache of 25 positions"),
    ],
)
def test_ids_that_fit_neither_are_answered_with_the_numbers(pair, ids, mask_len, words):
    ours, _ = pair
    turns = TwoTurns(ours, "image", "short text")
    assert turns.num_cached == 25
    mask = None if mask_len is None else torch.ones(1, mask_len, dtype=torch.long)
    with pytest.raises(ValueError, match=words):
        turns.continue_from(ours, input_ids=torch.arange(40, 40 + ids)[None], attention_mask=mask)


def test_ids_without_a_mask_are_taken_for_all_ids_and_that_is_logged(pair, caplog):
    ours, hf = pair
    turns = TwoTurns(ours, "text", "short text")
    found = turns.continue_from(ours, input_ids=turns.ids)
    assert_same_answer(found, generate(hf, input_ids=turns.ids, attention_mask=turns.full_mask))
    assert "14 ids, a cache of 10 positions and no attention_mask: these count as all ids" in caplog.text


def test_drafts_of_assisted_decoding_are_not_reported_as_ids_without_a_mask(pair, caplog):
    ours, _ = pair
    ids = torch.tensor([[1, 36, 37, 38]])
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **asked, assistant_model=ours), ours.generate(ids, **asked))
    assert "no attention_mask" not in caplog.text


def test_ways_that_look_up_the_ids_of_the_prompt_need_all_of_them(pair):
    ours, _ = pair
    turns = TwoTurns(ours, "image", "image")
    new = {"input_ids": turns.new_ids, "attention_mask": turns.full_mask, "pixel_values": turns.new_pixels}
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens .* 20 ids of 45 positions; give all ids"):
        ours.generate(**new, past_key_values=copy.deepcopy(turns.cache), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    "asked", [{"prompt_lookup_num_tokens": 3}, {"guidance_scale": 1.5}, {"prefill_chunk_size": 5}], ids=str
)
def test_ways_that_look_up_the_last_id_refuse_a_prompt_that_ends_with_an_image(pair, asked):
    ours, _ = pair
    ids = torch.tensor([[1, 36, *[IMAGE] * NUM_FEATURES]])
    found = get_pixels(ids, seed=3)
    with pytest.raises(ValueError, match="reads the end of the prompt by its id, and a prompt ends with an image"):
        ours.generate(ids, pixel_values=found, max_new_tokens=2, **asked)
    # Without images the placeholder is a word like others.
    assert ours.generate(ids, max_new_tokens=2, **asked).shape == (1, ids.shape[1] + 2)


@pytest.mark.parametrize("asked", [{}, {"num_beams": 2}, {"encoder_repetition_penalty": 1.3}], ids=str)
def test_positions_of_the_caller_are_those_of_transformers(pair, asked):
    ours, hf = pair
    image = [IMAGE] * NUM_FEATURES
    ids = torch.tensor([[1, *image, 31, 32, 33], [*[PAD] * NUM_FEATURES, PAD, 1, 36, 37]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": get_pixels(ids, seed=1)} | asked
    usual = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = generate(hf, **inputs, position_ids=2 * usual)
    assert_same_answer(generate(ours, **inputs, position_ids=2 * usual), expected)
    plain = generate(ours, **inputs)
    assert not torch.allclose(torch.stack(plain.logits), torch.stack(expected.logits), atol=1e-2)
    assert_same_answer(generate(ours, **inputs, position_ids=usual), plain)
    # Sequences that move or grow are counted again, so that other positions fit nothing.
    short = torch.tensor([[1, IMAGE, 31, 32, 33], [1, 36, 37, PAD, PAD]])
    more = inputs | {"input_ids": short, "attention_mask": (short != PAD).long()}
    assert_same_answer(generate(ours, **more, position_ids=torch.arange(5)[None].expand(2, -1)), plain)
    with pytest.raises(ValueError, match=r"position_ids of 5 positions that do not count .* a prompt of 20"):
        generate(ours, **more, position_ids=2 * torch.arange(5)[None].expand(2, -1))


# Padding without a mask.


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_ids_without_a_mask_are_read_as_transformers_reads_them(pair, side):
    rows = [[1, 30, *[IMAGE] * NUM_FEATURES, 31, 32, 33], [1, 36, 37, *[IMAGE] * NUM_FEATURES, 35], [1, 36, 37, 38]]
    longest = max(map(len, rows))
    rows = [
        [PAD] * (longest - len(row)) + row if side == "left" else row + [PAD] * (longest - len(row)) for row in rows
    ]
    ids = torch.tensor(rows)
    ours, hf = pair
    inputs = {"input_ids": ids, "pixel_values": get_pixels(ids, seed=3)}
    found = generate(ours, **inputs)
    with_mask = generate(ours, **inputs, attention_mask=(ids != PAD).long())
    assert torch.equal(found.sequences, with_mask.sequences)
    if side == "left":
        assert torch.equal(found.sequences, generate(hf, **inputs).sequences)


@pytest.mark.parametrize("num_placeholders", [NUM_FEATURES, 1])
def test_sequences_that_are_padded_again_show_the_padding_id(pair, num_placeholders):
    ours, hf = pair
    pad, image = 110, [IMAGE] * NUM_FEATURES
    left = torch.tensor([[1, *image, 31, 32, 33], [*[pad] * (NUM_FEATURES + 1), 1, 36, 37]])
    right = torch.tensor([[1, *[IMAGE] * num_placeholders, 31, 32, 33], [1, 36, 37, *[pad] * (num_placeholders + 1)]])
    pixels = get_pixels(left, seed=1)
    asked = {"pixel_values": pixels, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": pad}
    # A penalty reads the ids of the prompt, padding included.
    asked["repetition_penalty"] = 1.5
    expected = hf.generate(left, attention_mask=(left != pad).long(), **asked)
    assert torch.equal(ours.generate(right, attention_mask=(right != pad).long(), **asked), expected)


def test_padding_that_may_end_an_answer_is_text_and_that_is_logged(pair, caplog):
    ours, hf = pair
    ids = torch.tensor([[EOS, EOS, 1, 36, 37], [1, 38, 39, 40, 41]])
    more = {"pad_token_id": EOS, "eos_token_id": EOS}
    found = ours.generate(ids, max_new_tokens=4, do_sample=False, **more)
    assert torch.equal(found, hf.generate(ids, max_new_tokens=4, do_sample=False, **more))
    assert "2 sequences and no attention_mask, and the ids do not show what is padding" in caplog.text


# Gradients to the pixels.


@pytest.mark.parametrize("frozen", ["", "vision_tower", "model.", "lm_head"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_pixels_get_the_gradient_of_transformers_whatever_is_frozen(pair, frozen, mode):
    ids = torch.tensor([[1, 30, *[IMAGE] * NUM_FEATURES, 31, 32, 33]])
    labels = ids.masked_fill((ids == IMAGE) | (torch.arange(ids.shape[1]) < 19), -100)
    found = []
    for model in (copy.deepcopy(one) for one in pair):
        for name, param in model.named_parameters():
            known = name.replace("vision_model", "vision_tower")
            param.requires_grad_(bool(frozen) and frozen not in known if frozen != "model." else False)
        pixels = get_pixels(ids, seed=4).requires_grad_()
        getattr(model, mode)()(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
        found.append(pixels.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert found[0].abs().sum() > 0
