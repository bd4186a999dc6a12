"""Turn questions and images into answers.

The command line, the demo, every benchmark and every notebook use `reply` or `stream`. B questions, T tokens.
"""

from collections.abc import Iterable, Mapping
from threading import Event, Thread

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava_lite.conversation.end_tokens import EndToken, end_ids, get_end_token, stop_arguments
from llava_lite.conversation.images import add_placeholders, as_list
from llava_lite.media_inputs import media_features
from llava_lite.processing.processor import LlavaLiteProcessor

# Arguments of `generate` that `reply` and `stream` set themselves.
OWN_ARGUMENTS = ("max_new_tokens", "num_beams", "do_sample", "temperature")


def load(model_path, device=None, dtype=None, model_base=None, **kwargs):
    """Return (model, processor) of a checkpoint by directory or hub id, ready for `reply`.

    device: None for the GPU where there is one. dtype: None for the checkpoint's own. model_base: for a directory that
    holds only what was trained and does not name its base. Further keywords go to `load_pretrained_model`.
    """
    # Imported here: a model that is loaded already is asked without it.
    from llava_lite.model.builder import load_pretrained_model

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model, image_processor, _ = load_pretrained_model(
        model_path, model_base, None, device=device, dtype=dtype, **kwargs
    )
    return model, LlavaLiteProcessor.from_config(model.config, tokenizer, image_processor)


def reply(
    model,
    processor,
    question,
    images=None,
    conv_template=None,
    history=None,
    max_new_tokens=512,
    temperature=0.0,
    num_beams=1,
    image_cache=None,
    media=None,
    feature_bank=None,
    **generate_kwargs,
):
    """Return the answer to a question, or the list of answers to a list of questions.

    images: for one question an image or a list of images, for a list of questions one such entry (or None) each; an
    image is a PIL image, a path or the bytes of a file, and is turned upright. Images without an `<image>` placeholder
    go before the question, as in LLaVA; placeholders without an image are refused. history: earlier (question, answer)
    pairs, whose placeholders take the first images. temperature: 0 for greedy decoding. conv_template: None for the
    checkpoint's own. image_cache: an ImageFeatureCache, for images that several questions are about. media,
    feature_bank: in place of images, with a model whose tower is ImageBind: what one question is about, such as
    {"audio": "bird.wav", "image": ["bird.jpg", 0.5]}; see media_features. Further keywords go to `model.generate`. The
    answers of a batch are those of its questions one by one.
    """
    if isinstance(question, str):
        question, images, history, alone = [question], [images], [history], True
    else:
        question = as_questions(question)
        if images is not None and not isinstance(images, (list, tuple)):
            raise ValueError(
                f"{len(question)} questions but one image; give a list with an entry (or None) for every question."
            )
        images, history, alone = images or [None] * len(question), history or [None] * len(question), False
    if generate_kwargs.get("return_dict_in_generate") or (generate_kwargs.get("num_return_sequences") or 1) > 1:
        raise ValueError(
            "reply returns the text of one answer a question; return_dict_in_generate and num_return_sequences are "
            "for model.generate, whose inputs `prepare` makes."
        )
    images = _with_stand_in(question, images, media, feature_bank)
    inputs, end = prepare(processor, question, images, conv_template, history)
    generate_kwargs |= _encode_media(model, inputs, media, feature_bank)
    generation = _generation_arguments(model, processor, end, temperature, num_beams, generate_kwargs)
    tokens = _generate(model, inputs, image_cache, max_new_tokens=max_new_tokens, **generation)
    answers = [_strip_end_token(text, end.text) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return answers[0] if alone else answers


def stream(
    model,
    processor,
    question,
    images=None,
    conv_template=None,
    history=None,
    max_new_tokens=512,
    temperature=0.0,
    image_cache=None,
    media=None,
    feature_bank=None,
    **generate_kwargs,
):
    """Yield the answer to one question in pieces, which together are the answer of `reply`.

    Arguments as in `reply`. An error during generation is raised here; closing the iterator stops the model.
    """
    images = _with_stand_in([question], [images], media, feature_bank)
    inputs, end = prepare(processor, [question], images, conv_template, [history])
    generate_kwargs |= _encode_media(model, inputs, media, feature_bank)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = Event(), []
    criteria = StoppingCriteriaList([*generate_kwargs.pop("stopping_criteria", []), _StopOn(stop)])
    generation = _generation_arguments(model, processor, end, temperature, 1, generate_kwargs)

    def work():
        try:
            arguments = {"streamer": streamer, "stopping_criteria": criteria, **generation}
            _generate(model, inputs, image_cache, max_new_tokens=max_new_tokens, **arguments)
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=work, name="answering", daemon=True)
    thread.start()
    try:
        yield from _pieces_before_end_token(streamer, end.text)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def prepare(processor, questions, images, conv_template=None, history=None):
    """Return (inputs of the model, EndToken of an answer) for B questions, each with its images and its history."""
    questions = as_questions(questions)
    history = [None] * len(questions) if history is None else history
    if not len(questions) == len(images) == len(history):
        raise ValueError(
            f"{len(questions)} questions, {len(images)} entries of images and {len(history)} of history; "
            "give one of each for every question (None where there is none)."
        )
    if not questions:
        raise ValueError("no question; give one or more.")
    groups = [as_list(group) for group in images]
    check_sees(processor, any(groups))
    conversations = [
        [*(earlier or []), (add_placeholders(question, earlier, len(group)), None)]
        for question, group, earlier in zip(questions, groups, history, strict=True)
    ]
    prompts = [processor.render(turns, conv_template) for turns in conversations]
    return processor.encode(prompts, groups), _end_token(processor, conv_template)


def _with_stand_in(questions, images, media, feature_bank):
    """Return the images; with media an image for the one question, in whose place their features will stand."""
    if media is None and feature_bank is not None:
        raise ValueError("feature_bank is for media=; images alone are not pulled towards a bank.")
    if media is None:
        return images
    if len(questions) != 1 or any(images):
        raise ValueError(
            f"media are for one question without images; got {len(questions)} questions and "
            f"{sum(bool(group) for group in images)} groups of images. Give images among the media."
        )
    return [[Image.new("RGB", (8, 8))]]


def _encode_media(model, inputs, media, feature_bank):
    """Return the keywords of `generate` that media need, and take the stand-in's pixels out of the inputs."""
    if media is None:
        return {}
    inputs.pop("pixel_values")
    return {"image_features": media_features(model, media, feature_bank)}


def check_sees(processor, has_images):
    """Raise ValueError for images given to a model without a vision tower."""
    if has_images and processor.image_processor is None:
        raise ValueError(
            f"{processor.tokenizer.name_or_path!r} has no vision tower: it reads text alone. Ask it without images, "
            "or open a LLaVA model."
        )


def as_questions(questions) -> list[str]:
    """Return questions as a list of texts; ValueError for anything else."""
    if not isinstance(questions, Iterable) or isinstance(questions, (bytes, Mapping)):
        raise ValueError(f"a question is a text, or a list of texts; got {type(questions).__name__}.")
    questions = list(questions)
    for i, question in enumerate(questions):
        if not isinstance(question, str):
            found = "None" if question is None else f"a {type(question).__name__}"
            raise ValueError(f'question {i + 1} is {found}; give a text ("" for an image alone).')
    return questions


def end_token(processor, conv_template=None):
    """Return the text with which the prompt format ends an answer, such as `</s>` or `###`; it may be empty."""
    return _end_token(processor, conv_template).text


def _end_token(processor, conv_template=None) -> EndToken:
    return get_end_token(processor.template(conv_template), processor.tokenizer)


def _generation_arguments(model, processor, end, temperature, num_beams, extra):
    """Return the keywords of `generate` for sampling and stopping; the caller's own replace them."""
    check_no_unread(extra.get("generation_config"))
    arguments = {"num_beams": num_beams, "pad_token_id": processor.pad_token_id, "do_sample": temperature > 0}
    # A base's generation_config.json may ask for more than the text of one answer.
    arguments |= {"num_return_sequences": 1, "return_dict_in_generate": False}
    # For stop_strings, of the caller or of a base.
    arguments["tokenizer"] = processor.tokenizer
    if temperature > 0:
        arguments["temperature"] = temperature
    ends = end_ids(model.generation_config, processor.tokenizer)
    return arguments | stop_arguments(end, ends, processor.tokenizer) | extra


def check_no_unread(generation_config):
    """Raise ValueError for a generation config with fields that `reply` takes as arguments, and would not read."""
    fields = {} if generation_config is None else generation_config.to_diff_dict()
    unread = [f"{name}={fields[name]!r}" for name in OWN_ARGUMENTS if name in fields]
    if unread:
        raise ValueError(
            f"generation_config has {', '.join(unread)}, which reply and stream take as arguments of their own "
            "(do_sample by a temperature above 0). Give them by name, and leave them out of generation_config."
        )


def _generate(model, inputs, image_cache=None, **arguments):
    """Return the new tokens [B, T] of a batch from the processor."""
    # Weights that accelerate loads when they are needed have no device, and its hooks move the inputs.
    inputs = inputs.to(*([] if model.device.type == "meta" else [model.device]), dtype=model.dtype)
    if image_cache is not None and len(inputs.get("pixel_values", ())):
        # PEFT's wrapper calls `generate` of the model inside.
        owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        arguments["image_features"] = image_cache.features(
            owner, inputs.pop("pixel_values"), inputs.get("image_sizes")
        )
    tokens = model.generate(**inputs, **arguments)
    return tokens[:, inputs["input_ids"].shape[1] :]


def _strip_end_token(text, end):
    """Return an answer without its end token and the white space around it."""
    return (text.partition(end)[0] if end else text).strip()


def _pieces_before_end_token(pieces, end):
    """Yield the pieces of an answer up to its end token, without the white space around the answer.

    Text is held back while it may be the beginning of the end token or the white space before it.
    """
    held, started = "", False
    for piece in pieces:
        held += piece
        if not started:
            held = held.lstrip()
        if end and end in held:
            break
        ready = len(held) - _possible_end_len(held, end)
        ready = len(held[:ready].rstrip())
        if ready:
            started = True
            yield held[:ready]
            held = held[ready:]
    rest = held.partition(end)[0] if end else held
    rest = rest.rstrip() if started else rest.strip()
    if rest:
        yield rest


def _possible_end_len(text, end):
    """Return the length of the longest suffix of `text` that is a prefix of `end`."""
    return next((size for size in range(min(len(end), len(text)), 0, -1) if text.endswith(end[:size])), 0)


class _StopOn(StoppingCriteria):
    """Stop all sequences once an event is set: nobody reads the answer any more."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
