"""Sampling with a generator of one's own: seeded, by the distribution, and without the process's random state."""

import pytest
import torch
from PIL import Image

from llava_lite.inference import reply
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor
from llava_lite.serve.sampling import sampling

IMAGE = Image.new("RGB", (40, 30), (200, 80, 10))


def draw(scores, **options):
    """Return the token that the processors leave."""
    ids = torch.zeros(len(scores), 1, dtype=torch.long)
    return sampling(**options)(ids, scores).argmax(dim=-1)


def test_tokens_are_drawn_by_their_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    drawn = draw(probabilities.log().expand(20_000, 3), temperature=1.0, seed=0)
    found = torch.bincount(drawn, minlength=3) / 20_000
    # Three standard deviations of a fraction of 20,000 draws are at most 0.0106.
    torch.testing.assert_close(found, probabilities, atol=0.0106, rtol=0)


def test_temperature_and_top_p_change_what_is_drawn():
    scores = torch.tensor([0.5, 0.3, 0.2]).log().expand(2000, 3)
    assert set(draw(scores, temperature=1.0, top_p=0.7, seed=0).tolist()) == {0, 1}
    # At temperature 0.05 the odds of the second are (3/5)^20 = 0.00004.
    assert set(draw(scores, temperature=0.05, seed=0).tolist()) == {0}


def test_one_seed_is_one_answer_and_the_process_has_its_random_state(toy_model, toy_tokenizer, toy_tower_dir):
    model = toy_model(conv_template="v1")
    processor = LlavaLiteProcessor.from_config(
        model.config, toy_tokenizer, load_image_processor(toy_tower_dir("clip"))
    )
    before = torch.get_rng_state()

    def ask(seed):
        processors = sampling(1.5, seed=seed)
        return reply(model, processor, "What?", IMAGE, max_new_tokens=12, logits_processor=processors)

    greedy = reply(model, processor, "What?", IMAGE, max_new_tokens=12)
    assert ask(7) == ask(7)
    assert len({ask(7), ask(8), ask(9), greedy}) == 4
    assert ask(None) != ask(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_zero_is_greedy_decoding():
    assert len(sampling(0.0, 0.5, 3)) == 0


@pytest.mark.parametrize("wrong", [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match="a temperature is 0 or more and top-p above 0 and at most 1; got"):
        sampling(*wrong)
