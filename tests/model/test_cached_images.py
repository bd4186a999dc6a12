"""A cache under mm_injection adaption_prompt, which holds no image: continued with the images, and without them."""

import copy
import logging

import pytest
import torch
from transformers import DynamicCache, StaticCache

from llava_lite.model.cached_images import image_mask, row_indices
from tests.model.test_adaption_prompt import BACKBONES, ONE, PROMPTS, build, inputs

OPTIONS = {"do_sample": False, "eos_token_id": None}
NEW = 4


def first_turn(model, ids, **given):
    """Return (ids of the first turn and its answer, the cache) of `generate`."""
    output = model.generate(input_ids=ids, max_new_tokens=NEW, return_dict_in_generate=True, **given, **OPTIONS)
    return output.sequences, output.past_key_values


def second_turn(seen):
    """Return the ids of both turns and their mask."""
    ids = torch.cat([seen, torch.tensor([[9, 8, 7]]).expand(len(seen), -1)], dim=1)
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize("fields", [PROMPTS, ONE], ids=["ten prompts", "one prompt"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_logits_with_the_images_given_again_are_those_of_the_whole(kind, fields):
    model, (ids, images) = build(kind, **fields), inputs()
    with torch.no_grad():
        whole = model(ids, images=images).logits
        cache = model(ids[:, :4], images=images, use_cache=True).past_key_values
        rest = model(ids[:, 4:], images=images, past_key_values=cache).logits
        assert torch.allclose(rest, whole[:, 4:], atol=1e-5)
        cache = model(ids[:, :4], images=images, use_cache=True).past_key_values
        visual = model.visual_prompts(2, images)
        rest = model(ids[:, 4:], visual_prompts=visual, past_key_values=cache).logits
        assert torch.allclose(rest, whole[:, 4:], atol=1e-5)


@pytest.mark.parametrize("text_only", ["bare", "blank"])
def test_answers_with_the_images_given_again_are_those_without_a_cache(text_only):
    model, (ids, images) = build(mm_text_only=text_only), inputs()
    for given in ({"pixel_values": images}, {"pixel_values": images[:1], "image_rows": torch.tensor([1])}, {}):
        seen, cache = first_turn(model, ids, **given)
        both, mask = second_turn(seen)
        expected = model.generate(input_ids=both, attention_mask=mask, max_new_tokens=NEW, **given, **OPTIONS)
        found = model.generate(
            input_ids=both,
            attention_mask=mask,
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=NEW,
            **given,
            **OPTIONS,
        )
        assert torch.equal(found, expected)
    visual = model.visual_prompts(2, images)
    assert torch.equal(
        model.generate(input_ids=ids, visual_prompts=visual, max_new_tokens=NEW, **OPTIONS),
        model.generate(input_ids=ids, pixel_values=images, max_new_tokens=NEW, **OPTIONS),
    )


def test_a_cache_with_images_is_not_continued_without_them():
    model, (ids, images) = build(), inputs()
    seen, cache = first_turn(model, ids, pixel_values=images)
    both, mask = second_turn(seen)
    again = {"input_ids": both, "attention_mask": mask, "max_new_tokens": 1}
    message = r"2 of 2 cached sequences \(10 positions\) were computed with an image that this call does not bring"
    with pytest.raises(ValueError, match=message):
        model.generate(**again, past_key_values=cache)
    # A copy knows it too, and LLaVA's call, and a call with some of the images.
    with pytest.raises(ValueError, match=message):
        model.generate(both, images=None, attention_mask=mask, past_key_values=copy.deepcopy(cache), max_new_tokens=1)
    one = {"pixel_values": images[:1], "image_rows": torch.tensor([0])}
    with pytest.raises(ValueError, match="1 of 2 cached sequences"):
        model.generate(**again, **one, past_key_values=copy.deepcopy(cache))
    with pytest.raises(ValueError, match="give the same images again, or their visual_prompts"), torch.no_grad():
        model(both[:, 10:], past_key_values=cache)
    assert cache.get_seq_length() == 10


def test_a_cache_with_images_is_not_continued_with_others():
    model, (ids, images) = build(), inputs()
    seen, cache = first_turn(model, ids, pixel_values=images)
    both, mask = second_turn(seen)
    again = {"input_ids": both, "attention_mask": mask, "max_new_tokens": 1}
    message = "of 2 cached sequences were computed with another image than this call brings"
    for other, num_other in ((images.flip(0), 2), (torch.stack([images[0], -images[1]]), 1), (images * 0.9, 2)):
        visual, features = model.visual_prompts(2, other), torch.stack(model.tower_features(other)).flatten(0, 1)
        for given in ({"pixel_values": other}, {"visual_prompts": visual}, {"image_features": features}):
            with pytest.raises(ValueError, match=f"{num_other} {message}"):
                model.generate(**again, **given, past_key_values=copy.deepcopy(cache))
        for given in ({"images": other}, {"visual_prompts": visual}):
            with pytest.raises(ValueError, match=f"{num_other} {message}"), torch.no_grad():
                model(both[:, 10:], **given, past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            model.generate(both, images=other, attention_mask=mask, past_key_values=cache, max_new_tokens=1)
    assert cache.get_seq_length() == 10
    # Encoded one by one they are the same images, up to rounding.
    alone = torch.cat([model.visual_prompts(1, one[None]) for one in images])
    model.generate(**again, visual_prompts=alone, past_key_values=cache)


def test_a_given_cache_remembers_the_call_that_filled_it():
    model, (ids, images) = build(), inputs()
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        model.generate(ids, images=images, past_key_values=cache, max_new_tokens=2, **OPTIONS)
        with pytest.raises(ValueError, match="2 of 2 cached sequences"), torch.no_grad():
            model(ids[:, :1], past_key_values=cache)
    # Emptied, it holds nothing.
    cache.reset()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("text_only", ["bare", "blank"])
def test_a_text_is_continued_without_a_word(text_only, caplog):
    model, (ids, _) = build(mm_text_only=text_only), inputs()
    seen, cache = first_turn(model, ids)
    both, mask = second_turn(seen)
    with caplog.at_level(logging.WARNING):
        found = model.generate(
            input_ids=both, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, **OPTIONS
        )
        with torch.no_grad():
            model(both[:, :1], past_key_values=cache)
    assert torch.equal(found, model.generate(input_ids=both, attention_mask=mask, max_new_tokens=NEW, **OPTIONS))
    assert not caplog.records


def test_an_image_that_comes_after_cached_text_is_reported(caplog):
    model, (ids, images) = build(), inputs()
    seen, cache = first_turn(model, ids)
    both, mask = second_turn(seen)
    with caplog.at_level(logging.WARNING):
        model.generate(
            input_ids=both,
            attention_mask=mask,
            pixel_values=images,
            past_key_values=cache,
            max_new_tokens=3,
            **OPTIONS,
        )
    (record,) = caplog.records
    assert (
        "2 of 2 cached sequences have an image now that their 10 positions were computed without"
        in record.getMessage()
    )


def test_a_cache_of_another_batch_is_compared_as_a_whole():
    model, (ids, images) = build(), inputs()
    _, cache = first_turn(model, ids[:1], pixel_values=images[:1])
    cache.batch_repeat_interleave(2)
    more = ids[:, :1]
    with torch.no_grad():
        model(more, images=images[:1].expand(2, -1, -1, -1), past_key_values=copy.deepcopy(cache))
        with pytest.raises(ValueError, match="2 of 2 cached sequences"):
            model(more, past_key_values=cache)
        with pytest.raises(ValueError, match="1 of 2 cached sequences were computed with another image"):
            model(more, images=images, past_key_values=cache)


def test_sequences_with_an_image_are_told_by_number_or_mask():
    assert row_indices(None) is None
    assert row_indices([2, 0]).tolist() == [2, 0]
    assert row_indices([False, True, True]).tolist() == [1, 2]
    images = torch.zeros(2, 3, 1, 1)
    assert image_mask(2, images) == (True, True)
    assert image_mask(3, images, torch.tensor([2, 0])) == (True, False, True)
    assert image_mask(3, None) == image_mask(3, images[:0]) == (False, False, False)
