"""Questions to answers: alone, in batches, in a conversation, in pieces."""

import threading

import numpy as np
import pytest
import torch
from conftest import draw_image
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llava_lite import ImageFeatureCache
from llava_lite.conversation import conv_templates
from llava_lite.conversation.images import add_placeholders
from llava_lite.inference import _pieces_before_end_token, end_token, load, prepare, reply, stream
from llava_lite.media.preprocess import load_image_processor
from llava_lite.mm_utils import process_images, tokenizer_image_token
from llava_lite.processing.processor import LlavaLiteProcessor

EXPERTS = {
    "moe_enable": True,
    "moe_mode": "sparse",
    "num_experts": [4],
    "top_k_experts": 2,
    "router_aux_loss_coef": 0.01,
}


def image(seed):
    image = Image.new("RGB", (40 + seed, 36), (seed * 40 % 256, 90, 250 - seed * 30))
    image.paste((255, 0, 0), (seed, 3, seed + 9, 12))
    return image


@pytest.fixture
def toy_pair(toy_model, toy_tokenizer, toy_tower_dir):
    """Return a function: arguments of toy_model -> (model, processor)."""

    def make(model_type="llama", **kwargs):
        model = toy_model(model_type, **({"conv_template": "v1"} | kwargs))
        return model, LlavaLiteProcessor.from_config(
            model.config, toy_tokenizer, load_image_processor(toy_tower_dir("clip"))
        )

    return make


class Dictation(LogitsProcessor):
    """Make the model generate given tokens, sequence by sequence, after a prompt of any length."""

    def __init__(self, sequences):
        self.sequences, self.step = sequences, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(self.sequences):
            forced[row, ids[min(self.step, len(ids) - 1)]] = 0
        self.step += 1
        return forced


def dictate(processor, *texts):
    ids = [processor.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return LogitsProcessorList([Dictation(ids)])


def test_reply_is_what_llavas_own_steps_give(toy_pair):
    model, processor = toy_pair()
    tokenizer = processor.tokenizer
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat colour is the square?")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
    pixels = process_images([image(1)], processor.image_processor, model.config)
    output = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=12)
    expected = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    assert reply(model, processor, "What colour is the square?", image(1), max_new_tokens=12) == expected
    with_placeholder = "<image>\nWhat colour is the square?"
    assert reply(model, processor, with_placeholder, [image(1)], max_new_tokens=12) == expected
    others = [reply(model, processor, with_placeholder, image(i), max_new_tokens=12) for i in range(2, 9)]
    assert set(others) != {expected}


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batch_gives_the_answers_of_its_questions_one_by_one(toy_pair, moe, num_beams):
    model, processor = toy_pair(moe=moe)
    questions = ["How many circles are there?", "Hello!", "Human or assistant, <image> and <image> in the image?"]
    images = [image(1), None, [image(2), image(3)]]
    asked = {"max_new_tokens": 10, "num_beams": num_beams}
    together = reply(model, processor, questions, images, **asked)
    assert together == [reply(model, processor, q, p, **asked) for q, p in zip(questions, images, strict=True)]
    assert len(set(together)) > 1


def test_text_only_questions_need_no_images(toy_pair, toy_llm_dir):
    model, processor = toy_pair()
    answers = reply(model, processor, ["Hello!", "What colour is the square?"], max_new_tokens=6)
    assert answers[0] == reply(model, processor, "Hello!", max_new_tokens=6)
    plain, processor = load(toy_llm_dir("llama"), device="cpu")
    assert processor.image_processor is None
    assert reply(plain, processor, "Hello!", max_new_tokens=6)


def test_stored_format_is_the_one_used(toy_pair):
    model, processor = toy_pair(conv_template="llava_llama_2")
    question = {"question": "What colour is the square?", "images": image(1), "max_new_tokens": 8}
    named = reply(model, processor, conv_template="llava_llama_2", **question)
    assert reply(model, processor, **question) == named
    prompts = [processor.render([("What?", None)], template).text for template in (None, "llava_llama_2", "v1")]
    assert prompts[0] == prompts[1] != prompts[2]


def test_history_is_written_as_training_writes_it(toy_pair):
    model, processor = toy_pair()
    history = [("<image>\nWhat colour?", "red"), ("How many?", "three")]
    prompt = processor.render([*history, ("Hello!", None)]).text
    assert prompt.endswith(
        "USER: <image>\nWhat colour? ASSISTANT: red</s>USER: How many? ASSISTANT: three</s>USER: Hello! ASSISTANT:"
    )
    inputs = processor(text=prompt, images=image(1))
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert reply(model, processor, "Hello!", image(1), history=history, max_new_tokens=8) == expected


@pytest.mark.parametrize(
    ("question", "history", "num_images", "placed"),
    [
        ("what?", None, 1, "<image>\nwhat?"),
        ("what?", [], 2, "<image>\n<image>\nwhat?"),
        ("in <image> what?", None, 1, "in <image> what?"),
        ("what?", [("<image>\nhow many?", "two")], 1, "what?"),
        ("and this?", [("<image>\nhow many?", "two")], 2, "<image>\nand this?"),
        ("what?", None, 0, "what?"),
    ],
)
def test_images_without_a_placeholder_go_before_the_question(question, history, num_images, placed):
    assert add_placeholders(question, history, num_images) == placed


@pytest.mark.parametrize(("question", "num_images"), [("<image>", 0), ("<image> <image>", 1), ("<image>", 2)])
def test_placeholders_that_do_not_fit_the_images_are_refused(toy_pair, question, num_images):
    model, processor = toy_pair()
    words = f"{question.count('<image>')} <image> placeholders in the conversation but {num_images} images"
    with pytest.raises(ValueError, match=words):
        reply(model, processor, question, [image(i) for i in range(num_images)])
    with pytest.raises(ValueError, match="2 questions, 1 entries of images"):
        reply(model, processor, ["a", "b"], [image(1)])


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("v1", "</s>"),
        ("llava_v0", "###"),
        ("llava_llama_2", "</s>"),
        ("mpt", "<|im_end|>"),
        ("chatml_direct", "<|im_end|>"),
        ("plain", "\n"),
        ("openchat", "<|end_of_turn|>"),
        ("qwen", "<|endoftext|>"),
    ],
)
@pytest.mark.parametrize("end_is_a_token", [True, False])
def test_answer_stops_at_the_formats_end_token(toy_pair, toy_tokenizer_for, template, end, end_is_a_token):
    model, processor = toy_pair()
    # In this tokenizer an end that is no token is several, of bytes that are not hidden in the text.
    processor.tokenizer = toy_tokenizer_for("gpt2")
    if end_is_a_token and end != "\n":
        processor.tokenizer.add_tokens([end], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer))
    assert end_token(processor, template) == end
    question = {"question": "What?", "images": image(1), "conv_template": template, "max_new_tokens": 60}
    script = dictate(processor, f"The square is red.{end} Human: How many")
    assert reply(model, processor, logits_processor=script, **question) == "The square is red."
    script = dictate(processor, f"The square is red.{end} Human: How many")
    assert "".join(stream(model, processor, logits_processor=script, **question)) == "The square is red."
    assert script[0].step < 60


def test_sequences_that_end_early_do_not_disturb_the_others(toy_pair):
    model, processor = toy_pair()
    script = dictate(processor, "red.### blue", "There are three blue circles and one green square.###")
    answers = reply(model, processor, ["a", "b"], conv_template="llava_v0", logits_processor=script, max_new_tokens=80)
    assert answers == ["red.", "There are three blue circles and one green square."]


def test_pieces_of_a_stream_make_the_reply(toy_pair):
    model, processor = toy_pair()
    question = {"question": "What colour is the square?", "images": image(1), "max_new_tokens": 20}
    pieces = list(stream(model, processor, **question))
    assert "".join(pieces) == reply(model, processor, **question)
    script = dictate(processor, "There are three blue circles and one green square in the image.</s>")
    pieces = list(stream(model, processor, **question | {"logits_processor": script, "max_new_tokens": 99}))
    assert "".join(pieces) == "There are three blue circles and one green square in the image."
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["red", " #", "##", " more"], ["red"]),
        ([" ", "red", " # ", "blue"], ["red", " # blue"]),
        (["#", "#"], ["##"]),
        (["red  "], ["red"]),
        (["re###d", "x"], ["re"]),
        ([], []),
    ],
)
def test_text_is_held_back_while_it_may_begin_the_end_token(pieces, shown):
    assert "".join(_pieces_before_end_token(pieces, "###")) == "".join(shown)
    joined = "".join(pieces).partition("###")[0].strip()
    assert "".join(shown) == joined


def test_error_while_streaming_reaches_the_caller(toy_pair):
    model, processor = toy_pair()

    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("the third token was too much")

    with pytest.raises(RuntimeError, match="the third token"):
        list(stream(model, processor, "Hello!", logits_processor=LogitsProcessorList([Failing()])))


def test_caller_who_stops_listening_stops_the_model(toy_pair):
    model, processor = toy_pair()
    script = dictate(processor, "red " * 500)
    pieces = stream(model, processor, "Hello!", logits_processor=script, max_new_tokens=1000)
    assert next(pieces)
    pieces.close()
    assert "answering" not in [thread.name for thread in threading.enumerate()]
    assert script[0].step < 1000


def test_sampling_follows_the_seed_and_the_temperature(toy_pair):
    model, processor = toy_pair()
    question = {"question": "What colour is the square?", "images": image(1), "max_new_tokens": 20}
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(reply(model, processor, temperature=1.5, **question))
    assert outputs[0] == outputs[1] != outputs[2]
    assert reply(model, processor, **question) == reply(model, processor, **question)


def test_repetition_penalty_sees_a_prompt_with_images(toy_pair):
    model, processor = toy_pair()
    asked = {"question": "What colour is the square?", "images": image(1), "max_new_tokens": 20}
    assert reply(model, processor, repetition_penalty=5.0, **asked) != reply(model, processor, **asked)


def test_load_gives_a_model_and_its_processor(toy_pair, tmp_path):
    model, processor = toy_pair(image_aspect_ratio="pad")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reader = load(tmp_path, device="cpu", dtype=torch.float32)
    assert (reader.conv_template, reader.image_aspect_ratio, reader.num_image_tokens) == ("v1", "pad", 16)
    question = ("What colour is the square?", image(1))
    assert reply(loaded, reader, *question, max_new_tokens=8) == reply(model, processor, *question, max_new_tokens=8)


def test_what_reply_cannot_return_is_refused(toy_pair):
    model, processor = toy_pair()
    with pytest.raises(ValueError, match="one or more"):
        reply(model, processor, [], [])
    for keyword in ({"return_dict_in_generate": True}, {"num_return_sequences": 2, "num_beams": 2}):
        with pytest.raises(ValueError, match="one answer a question"):
            reply(model, processor, "What?", max_new_tokens=2, **keyword)


def test_what_a_base_asks_of_generate_does_not_change_a_reply(toy_pair):
    model, processor = toy_pair()
    asked = {"images": image(1), "max_new_tokens": 4}
    expected = reply(model, processor, "What?", **asked)
    for name, value in (("num_return_sequences", 2), ("return_dict_in_generate", True), ("do_sample", True)):
        setattr(model.generation_config, name, value)
    assert reply(model, processor, "What?", **asked) == expected
    assert "".join(stream(model, processor, "What?", **asked)) == expected


def test_a_generation_config_beside_a_reply_is_read_or_refused(toy_pair):
    model, processor = toy_pair()
    config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.6)
    message = r"max_new_tokens=3, do_sample=True, temperature=0\.6, which reply and stream take as arguments"
    for ask in (reply, lambda *question, **more: list(stream(*question, **more))):
        with pytest.raises(ValueError, match=message):
            ask(model, processor, "What?", generation_config=config)
    asked = {"images": image(1), "max_new_tokens": 12}
    expected = reply(model, processor, "What?", **asked, repetition_penalty=1.9)
    assert reply(model, processor, "What?", **asked) != expected
    config = GenerationConfig(repetition_penalty=1.9)
    assert reply(model, processor, "What?", **asked, generation_config=config) == expected


def test_an_answer_may_end_at_words_of_the_caller(toy_pair):
    model, processor = toy_pair()
    asked = {"images": image(1), "max_new_tokens": 12}
    before, comma, after = reply(model, processor, "What?", **asked).partition(",")
    assert after
    assert reply(model, processor, "What?", **asked, stop_strings=[","]) == before + comma
    assert "".join(stream(model, processor, "What?", **asked, stop_strings=[","])) == before + comma
    model.generation_config.stop_strings = [","]
    assert reply(model, processor, "What?", **asked) == before + comma


def test_questions_are_prepared_without_a_history(toy_pair):
    _, processor = toy_pair()
    inputs, _ = prepare(processor, ["What?"], [None])
    assert inputs["input_ids"].shape[0] == 1


def test_one_image_for_many_questions_is_refused(toy_pair):
    with pytest.raises(ValueError, match="2 questions but one image; give a list"):
        reply(*toy_pair(), ["What is it?", "And this?"], images="image.jpg")


def test_an_array_of_pixels_is_an_image(toy_pair):
    image, pair = draw_image(3), toy_pair()
    expected = reply(*pair, "What is it?", image, max_new_tokens=4)
    assert reply(*pair, "What is it?", np.array(image), max_new_tokens=4) == expected


@pytest.mark.parametrize(
    "layout", [{}, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[32, 64], [64, 64]]}]
)
def test_an_image_is_encoded_once_for_many_questions(layout, toy_pair, tower_calls):
    model, processor = toy_pair(**layout)
    questions = ["What colour is the square?", "Hello!", "How many circles are there?"]
    images = [image(1), image(2), image(1)]
    expected = [reply(model, processor, *one, max_new_tokens=8) for one in zip(questions, images, strict=True)]
    tower_calls.clear()
    more = {"max_new_tokens": 8, "image_cache": ImageFeatureCache()}
    assert reply(model, processor, questions, images, **more) == expected
    first = list(tower_calls)
    assert [reply(model, processor, questions[i], images[i], **more) for i in (2, 1)] == [expected[2], expected[1]]
    assert "".join(stream(model, processor, questions[0], images[0], **more)) == expected[0]
    assert reply(model, processor, "Hello!", max_new_tokens=4, image_cache=more["image_cache"])
    assert len(first) == 1
    assert tower_calls == first
    reply(model, processor, questions[0], images[0], max_new_tokens=1)
    assert len(tower_calls) == 2, "without the cache, nothing is kept"


def test_only_the_last_images_are_kept(toy_pair, tower_calls):
    model, processor = toy_pair()
    cache = ImageFeatureCache(num_images=1)
    for seed in (1, 1, 2, 1):
        reply(model, processor, "Hello!", image(seed), max_new_tokens=1, image_cache=cache)
    assert tower_calls == [1, 1, 1]
    with pytest.raises(ValueError, match="features of one model; make another for this one"):
        reply(toy_pair()[0], processor, "Hello!", image(1), max_new_tokens=1, image_cache=cache)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (None, "a question is a text, or a list of texts; got NoneType"),
        (3, "got int"),
        (b"What?", "got bytes"),
        ({"role": "user"}, "got dict"),
        ([None], "question 1 is None; give a text"),
        (["What?", 3], "question 2 is a int"),
        ([["What?"]], "question 1 is a list"),
        ([], "no question; give one or more"),
    ],
    ids=str,
)
def test_what_is_no_question_is_named(toy_pair, question, message):
    with pytest.raises(ValueError, match=message):
        reply(*toy_pair(), question)


def test_questions_come_in_any_row(toy_pair):
    pair, asked = toy_pair(), ["What is it?", "Hello!"]
    expected = reply(*pair, asked, max_new_tokens=4)
    for questions in (tuple(asked), iter(asked), np.array(asked)):
        assert reply(*pair, questions, max_new_tokens=4) == expected
