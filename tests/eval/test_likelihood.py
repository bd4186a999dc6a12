"""The loss of a given answer is that of training, alone and in a batch."""

import pytest
import torch
from conftest import draw_image

from llava_lite.eval.likelihood import answer_losses
from llava_lite.media.preprocess import load_image_processor
from llava_lite.processing.processor import LlavaLiteProcessor

QUESTIONS = ["What colour is the square?", "Hello!", "Is <image> like <image>?"]
ANSWERS = ["The square is red.", "three", "blue circles"]
EXPERTS = {"moe_enable": True, "moe_mode": "sparse", "num_experts": [4], "top_k_experts": 2}
EXPERTS |= {"router_aux_loss_coef": 0.01}


@pytest.fixture
def toy_pair(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: arguments of toy_model -> (model, processor)."""

    def make(**keys):
        model = toy_model(**({"conv_template": "v1"} | keys))
        image_processor = load_image_processor(toy_tower_dir("clip"))
        return model, LlavaLiteProcessor.from_config(model.config, toy_tokenizer, image_processor)

    return make


def images():
    return [draw_image(1), None, [draw_image(2), draw_image(3)]]


def test_loss_is_the_mean_over_the_answer_and_its_end_token(toy_pair):
    model, processor = toy_pair()
    ((loss, _),) = answer_losses(model, processor, QUESTIONS[:1], [draw_image(1)], ANSWERS[:1])
    prompt = processor.render([("<image>\n" + QUESTIONS[0], None)])
    full = processor.render([("<image>\n" + QUESTIONS[0], ANSWERS[0])])
    assert full.text == f"{prompt.text} {ANSWERS[0]}</s>"
    inputs = processor(text=full.text, images=draw_image(1))
    num_before = processor(text=prompt.text, images=draw_image(1))["input_ids"].shape[1]
    with torch.no_grad():
        log_probs = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert len(ids) > num_before + 1
    expected = -sum(log_probs[i - 1, ids[i]] for i in range(num_before, len(ids))) / (len(ids) - num_before)
    # Sums of 12 numbers in another order.
    assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
def test_losses_of_a_batch_are_those_of_its_answers_one_by_one(toy_pair, moe):
    model, processor = toy_pair(moe=moe)
    together = answer_losses(model, processor, QUESTIONS, images(), ANSWERS)
    alone = [
        answer_losses(model, processor, [question], [image], [answer])[0]
        for question, image, answer in zip(QUESTIONS, images(), ANSWERS, strict=True)
    ]
    # Padding changes the order of sums, in float32.
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], rel=1e-4)
    assert [best for _, best in together] == [best for _, best in alone] == [False] * 3


def test_an_answer_is_greedy_if_each_of_its_tokens_is_the_most_probable(toy_pair):
    model, processor = toy_pair()
    red, end = processor.tokenizer.encode("red", add_special_tokens=False), processor.tokenizer.eos_token_id

    def answers(*best):
        """Raise the logits of the last tokens, as of a model that is sure of them, and measure "red" and "blue"."""

        def raise_logits(module, inputs, output):
            for i, token in enumerate(best):
                output[:, i - 1 - len(best), token] = 99

        hook = model.lm_head.register_forward_hook(raise_logits)
        found = [answer_losses(model, processor, ["Hello!"], [None], [answer])[0] for answer in ("red", "blue")]
        hook.remove()
        return found

    assert processor.render([("Hello!", "red")]).text.endswith("ASSISTANT: red</s>")
    red_then_end, blue = answers(*red, end)
    assert red_then_end == (pytest.approx(0, abs=1e-6), True)
    assert blue[1] is False
    assert blue[0] > 1
    assert [best for _, best in answers(*red, red[0])] == [False, False], "it would go on after the answer"


def test_an_earlier_answer_is_read_and_not_measured(toy_pair):
    model, processor = toy_pair()
    history = [[("How many?", "three")]]
    ((loss, _),) = answer_losses(model, processor, ["Hello!"], [None], ["red"], history=history)
    inputs = processor(text=processor.render([("How many?", "three"), ("Hello!", "red")]).text)
    ids = inputs["input_ids"][0]
    num = len(processor.tokenizer.encode("red", add_special_tokens=False)) + 1
    with torch.no_grad():
        log_probs = model(**inputs).logits[0, -num - 1 : -1].log_softmax(-1)
    assert loss == pytest.approx(float(-log_probs[range(num), ids[-num:]].mean()), rel=1e-5)


def test_images_for_a_model_that_reads_text_alone_are_refused(toy_llm_dir):
    from llava_lite import load

    model, processor = load(toy_llm_dir("llama"), device="cpu")
    with pytest.raises(ValueError, match="has no vision tower"):
        answer_losses(model, processor, ["What?"], [draw_image(1)], ["red"])
