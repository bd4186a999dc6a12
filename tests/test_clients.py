"""Programs written for LLaVA and MoE-LLaVA: what they import under those names, how they call it, what they get.

Clients of our own make the calls of LLaVA's evaluators and terminal chat, of lmms-eval's and VLMEvalKit's wrappers and
of MoE-LLaVA's notebook, with the arguments that those pass. What they get is what `reply` answers to the same prompt.
"""

import sys
from abc import abstractproperty

import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import TextStreamer

import llava_lite
from llava_lite import load, reply
from llava_lite.alias import NAMES
from llava_lite.media.preprocess import load_image_processor

MOE = {"num_experts": [4], "top_k_experts": 2, "moe_mode": "sparse"}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": PINPOINTS,
}
KINDS = {"pad": {"image_aspect_ratio": "pad"}, "anyres": ANYRES}
QUESTIONS = ("What colour is the square?", "How many circles are there?", "Hello!")
NUM_TOKENS = 9


@pytest.fixture
def names():
    """`llava` and `moellava` as other names of the package, for one test."""
    llava_lite.alias.install()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


@pytest.fixture
def checkpoint(toy_model, toy_tokenizer, toy_tower_dir, tmp_path):
    """Return a function: moe dict, config keys -> directory of a model with LLaVA's name and three images."""

    def make(moe=None, **keys):
        directory = tmp_path / "llava-v1.5-toy"
        toy_model(moe=moe, conv_template="v1", **keys).save_pretrained(directory)
        toy_tokenizer.save_pretrained(directory)
        load_image_processor(toy_tower_dir("clip")).save_pretrained(directory)
        for i, size in enumerate(((40, 30), (30, 70), (90, 33))):
            Image.new("RGB", size, (200 - 60 * i, 80, 10 + 90 * i)).save(tmp_path / f"{i}.png")
        return directory

    return make


def answers_of_reply(directory, conv_template, images=(0, 1, 2), **changes):
    """Return what `reply` answers to the questions, one by one."""
    model, processor = load(str(directory), device="cpu")
    for name, value in changes.items():
        setattr(processor, name, value)
    return [
        reply(
            model,
            processor,
            question,
            None if image is None else Image.open(directory.parent / f"{image}.png"),
            conv_template=conv_template,
            max_new_tokens=NUM_TOKENS,
        )
        for question, image in zip(QUESTIONS, images, strict=True)
    ]


def half(images):
    """Return images as clients hand them over: a tensor or a list, in float16."""
    return [image.half() for image in images] if isinstance(images, list) else images.half()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluator_of_llava_gets_the_answers_of_reply(kind, checkpoint, names):
    """As run_llava.py and model_vqa_loader.py call: sizes along, no mask, the full output decoded."""
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import SeparatorStyle, conv_templates
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model
    from llava.utils import disable_torch_init

    directory = checkpoint(**KINDS[kind])
    disable_torch_init()
    name = get_model_name_from_path(str(directory))
    tokenizer, model, image_processor, context_len = load_pretrained_model(str(directory), None, name)
    assert context_len == 2048
    assert model.config.mm_use_im_start_end is False
    answers = []
    for i, question in enumerate(QUESTIONS):
        conv = conv_templates["llava_v1"].copy()
        assert conv.sep_style == SeparatorStyle.TWO
        conv.append_message(conv.roles[0], DEFAULT_IMAGE_TOKEN + "\n" + question)
        conv.append_message(conv.roles[1], None)
        image = Image.open(directory.parent / f"{i}.png").convert("RGB")
        image_tensor = process_images([image], image_processor, model.config)[0]
        input_ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        with torch.inference_mode():
            output_ids = model.generate(
                input_ids.unsqueeze(0),
                images=image_tensor.unsqueeze(0).half(),
                image_sizes=[image.size],
                do_sample=False,
                temperature=0,
                top_p=None,
                num_beams=1,
                max_new_tokens=NUM_TOKENS,
                use_cache=True,
            )
        assert output_ids.shape[1] <= NUM_TOKENS
        answers.append(tokenizer.batch_decode(output_ids, skip_special_tokens=True)[0].strip())
    assert answers == answers_of_reply(directory, "llava_v1")


def test_terminal_chat_of_llava_streams_the_answer_of_reply(checkpoint, names, capsys):
    """As serve/cli.py calls: a streamer that skips the prompt, a keyword that stops."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import KeywordsStoppingCriteria, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    directory = checkpoint()
    tokenizer, model, image_processor, _ = load_pretrained_model(str(directory), None, "x", False, False, device="cpu")
    conv = conv_templates["llava_v1"].copy()
    conv.append_message(conv.roles[0], "<image>\n" + QUESTIONS[0])
    conv.append_message(conv.roles[1], None)
    image = Image.open(directory.parent / "0.png").convert("RGB")
    input_ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    capsys.readouterr()
    with torch.inference_mode():
        output_ids = model.generate(
            input_ids,
            images=process_images([image], image_processor, model.config).to(model.device, dtype=torch.float16),
            image_sizes=[image.size],
            do_sample=False,
            temperature=0,
            max_new_tokens=NUM_TOKENS,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            use_cache=True,
            stopping_criteria=[KeywordsStoppingCriteria([conv.sep2], tokenizer, input_ids)],
        )
    expected = answers_of_reply(directory, "llava_v1")[0]
    assert capsys.readouterr().out.strip() == expected
    assert tokenizer.decode(output_ids[0], skip_special_tokens=True).strip() == expected


class LmmsClient:
    """Loads and asks as lmms-eval's `llava` does."""

    def __init__(self, directory, **more):
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        arguments = {"multimodal": True, "attn_implementation": "sdpa", **more}
        self.tokenizer, self.model, self.image_processor, self.max_length = load_pretrained_model(
            str(directory), None, get_model_name_from_path(str(directory)), device_map="cpu", **arguments
        )
        self.config = self.model.config
        self.model.eval()
        self.model.tie_weights()

    def prompt(self, question, num_images, answer=None):
        from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
        from llava.conversation import conv_templates
        from llava.mm_utils import tokenizer_image_token

        conv = conv_templates["vicuna_v1"].copy()
        placeholders = " ".join([DEFAULT_IMAGE_TOKEN] * num_images) + "\n" if num_images else ""
        conv.append_message(conv.roles[0], placeholders + question)
        conv.append_message(conv.roles[1], answer)
        return tokenizer_image_token(conv.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")

    def images(self, images):
        from llava.mm_utils import process_images

        return half(process_images(images, self.image_processor, self.config)) if images else None

    def generate(self, questions, images):
        """Ask a batch, padded on the tokenizer's side as lmms-eval pads it."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        prompts = [self.prompt(question, int(bool(images))) for question in questions]
        left = self.tokenizer.padding_side == "left"
        prompts = [row.flip(0) for row in prompts] if left else prompts
        input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad)
        input_ids = input_ids.flip(1) if left else input_ids
        output = self.model.generate(
            input_ids,
            attention_mask=input_ids.ne(pad),
            pad_token_id=pad,
            images=self.images(images),
            image_sizes=[image.size for image in images],
            do_sample=False,
            temperature=0,
            top_p=None,
            num_beams=1,
            max_new_tokens=NUM_TOKENS,
            use_cache=True,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(output, skip_special_tokens=True)]

    def loglikelihood(self, question, answer, image):
        """Return (loss, logits, ids) of an answer, supervised after the open prompt."""
        prompt = self.prompt(question, 1)
        input_ids = self.prompt(question, 1, answer).unsqueeze(0)
        labels = input_ids.clone()
        labels[0, : len(prompt)] = -100
        sizes = [[image.size[0], image.size[1]]]
        with torch.inference_mode():
            outputs = self.model(
                input_ids=input_ids,
                labels=labels,
                images=self.images([image]),
                use_cache=True,
                image_sizes=sizes,
            )
        return outputs["loss"], outputs["logits"], input_ids[0, len(prompt) :]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_lmms_eval_gets_the_answers_of_reply_in_batches_too(kind, side, checkpoint, names):
    directory = checkpoint(**KINDS[kind])
    client = LmmsClient(directory)
    client.tokenizer.padding_side = side
    images = [Image.open(directory.parent / f"{i}.png").convert("RGB") for i in range(3)]
    expected = answers_of_reply(directory, "vicuna_v1")
    assert client.generate(QUESTIONS, images) == expected
    assert [client.generate([q], [p])[0] for q, p in zip(QUESTIONS, images, strict=True)] == expected
    assert client.generate(QUESTIONS, []) == answers_of_reply(directory, "vicuna_v1", (None,) * 3)


def test_lmms_eval_gets_the_loss_of_an_answer(checkpoint, names):
    """The mean over the logits before each of its tokens; images make the sequence longer in front of them."""
    directory = checkpoint()
    client = LmmsClient(directory)
    loss, logits, answer = client.loglikelihood(
        QUESTIONS[0], "The square is red.", Image.open(directory.parent / "0.png")
    )
    log_probs = logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    assert torch.allclose(loss, -log_probs[range(len(answer)), answer].mean(), atol=1e-5)


def test_lmms_eval_may_bring_a_config_and_name_a_kernel(checkpoint, names):
    directory = checkpoint()
    client = LmmsClient(directory, customized_config=str(directory), use_flash_attn=False)
    assert client.config._attn_implementation == "sdpa"
    assert client.max_length == 2048
    changed = LmmsClient(
        directory, customized_config={"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS}
    )
    assert changed.config.image_aspect_ratio == "anyres"
    assert changed.images([Image.new("RGB", (64, 64))]).shape == (1, 5, 3, 32, 32)


def test_vlmevalkit_gets_the_same_as_the_processor(checkpoint, names):
    """It writes the prompt by hand, asks for `pad` by an object of one attribute and gives no sizes and no mask."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import (
        KeywordsStoppingCriteria,
        get_model_name_from_path,
        process_images,
        tokenizer_image_token,
    )
    from llava.model.builder import load_pretrained_model

    directory = checkpoint()
    tokenizer, model, image_processor, _ = load_pretrained_model(
        model_path=str(directory),
        model_base=None,
        model_name=get_model_name_from_path(str(directory)),
        device="cpu",
        device_map="cpu",
    )
    args = abstractproperty()
    args.image_aspect_ratio = "pad"
    own_model, processor = load(str(directory), device="cpu")
    processor.image_aspect_ratio = "pad"
    for numbers in ((0,), (0, 2), ()):
        images = [Image.open(directory.parent / f"{i}.png").convert("RGB") for i in numbers]
        prompt = "A chat. USER: " + " <image> " * len(images) + QUESTIONS[1] + " ASSISTANT: "
        input_ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
        output_ids = model.generate(
            input_ids,
            images=half(process_images(images, image_processor, args)) if images else None,
            stopping_criteria=[KeywordsStoppingCriteria(["</s>"], tokenizer, input_ids)],
            do_sample=False,
            temperature=0,
            max_new_tokens=NUM_TOKENS,
            top_p=None,
            num_beams=1,
            use_cache=True,
        )
        inputs = processor(text=[prompt], images=[images])
        expected = own_model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS)
        assert output_ids.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("moe", [None, MOE])
def test_notebook_of_moe_llava_slices_the_prompt_off(moe, checkpoint, names):
    from llava.model.builder import load_pretrained_model as load_as_llava
    from moellava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from moellava.conversation import SeparatorStyle, conv_templates
    from moellava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, tokenizer_image_token
    from moellava.model.builder import load_pretrained_model
    from moellava.utils import disable_torch_init

    directory = checkpoint(moe)
    disable_torch_init()
    tokenizer, model, processor, _ = load_pretrained_model(
        str(directory), None, get_model_name_from_path(str(directory)), False, False, device="cpu"
    )
    assert processor["video"] is None
    conv = conv_templates["phi"].copy()
    stop = conv.sep if conv.sep_style != SeparatorStyle.TWO else conv.sep2
    conv.append_message(conv.roles[0], DEFAULT_IMAGE_TOKEN + "\n" + QUESTIONS[0])
    conv.append_message(conv.roles[1], None)
    image = Image.open(directory.parent / "0.png").convert("RGB")
    pixels = processor["image"].preprocess(image, return_tensors="pt")["pixel_values"]
    input_ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    asked = {
        "images": pixels.to(model.device, dtype=torch.float16),
        "do_sample": False,
        "max_new_tokens": NUM_TOKENS,
        "use_cache": True,
        "stopping_criteria": [KeywordsStoppingCriteria([stop], tokenizer, input_ids)],
    }
    with torch.inference_mode():
        output_ids = model.generate(input_ids, **asked)
    assert torch.equal(output_ids[:, : input_ids.shape[1]], input_ids), "the prompt as it was given, -200 and all"
    answer = tokenizer.decode(output_ids[0, input_ids.shape[1] :], skip_special_tokens=True).strip()
    assert answer == answers_of_reply(directory, "phi", image_aspect_ratio="square")[0]
    # In the same process LLaVA's name keeps LLaVA's word.
    _, as_llava, image_processor, _ = load_as_llava(str(directory), None, "x", device="cpu")
    assert image_processor.crop_size == processor["image"].crop_size
    assert torch.equal(as_llava.generate(input_ids, **asked), output_ids[:, input_ids.shape[1] :])


def test_model_that_repeats_the_prompt_does_so_for_every_answer(checkpoint, names):
    """Several answers a question, and an output object; the way of transformers stays as it is."""
    from moellava.model.builder import load_pretrained_model

    directory = checkpoint()
    tokenizer, model, _, _ = load_pretrained_model(str(directory), None, "x", device="cpu", padding_side="left")
    assert tokenizer.padding_side == "left"
    input_ids = torch.tensor([[1, -200, 300], [1, 301, -200]])
    pixels = torch.randn(2, 3, 32, 32)
    output = model.generate(
        input_ids,
        images=pixels,
        num_beams=2,
        num_return_sequences=2,
        max_new_tokens=4,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[:, :3], input_ids[[0, 0, 1, 1]])
    text = {"input_ids": torch.tensor([[1, 300, 301]]), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**text), type(model).generate(model, **text))


def test_moellava_is_the_package_but_for_its_builder(names):
    import moellava.mm_utils
    import moellava.model.llava_arch

    import llava_lite.model.builder
    import llava_lite.model.compat.moellava_builder

    assert moellava.mm_utils is llava_lite.mm_utils
    assert moellava.model.llava_arch is llava_lite.model.llava_arch
    assert sys.modules["moellava.model.builder"] is llava_lite.model.compat.moellava_builder
    assert llava_lite.model.builder.__name__ == "llava_lite.model.builder", "LLaVA's is not overwritten"
    from llava_lite.model import builder

    assert builder is sys.modules["llava_lite.model.builder"]
