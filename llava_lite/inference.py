"""Turn questions and pictures into answers: the only way from the one to the other.

The command line, the demo, every benchmark and every notebook ask through `reply` or `stream`. B questions, T tokens.
"""

from collections.abc import Iterable, Mapping
from threading import Event, Thread

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava_lite.constants import DEFAULT_IMAGE_TOKEN
from llava_lite.end_marks import EndMark, end_ids, end_mark_of, stop_arguments
from llava_lite.image_inputs import as_list
from llava_lite.processing import LlavaLiteProcessor

# What `reply` and `stream` say to `generate` by arguments that have a default.
OWN_ARGUMENTS = ("max_new_tokens", "num_beams", "do_sample", "temperature")


def load(model_path, device=None, dtype=None, model_base=None, **kwargs):
    """Return (model, processor) of a checkpoint by folder or hub id, ready for `reply`.

    device: None for the GPU where there is one. dtype: None for the checkpoint's own. model_base: for a folder that
    holds only what was trained and does not name its base. Further keywords go to `load_pretrained_model`.
    """
    # Here, since loading is not needed to ask a model that one already has.
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
    **generate_kwargs,
):
    """Return the answer to a question, or the list of answers to a list of questions.

    images: for one question a picture or a list of pictures, for a list of questions one such entry (or None) each; a
    picture is a PIL image, a path or the bytes of a file, and is turned upright. Pictures without an `<image>` mark go
    before the question, as in LLaVA; marks without a picture are refused. history: earlier (question, answer) pairs,
    whose marks take the first pictures. temperature: 0 for the likeliest token. conv_template: None for the one that
    the checkpoint was trained with. image_cache: an ImageFeatureCache, for images that are asked about more than once.
    Further keywords go to `model.generate`. A batch gives the answers that its questions get one by one.
    """
    if isinstance(question, str):
        question, images, history, alone = [question], [images], [history], True
    else:
        question = as_questions(question)
        if images is not None and not isinstance(images, (list, tuple)):
            raise ValueError(
                f"{len(question)} questions but one picture; give a list with an entry (or None) for every question."
            )
        images, history, alone = images or [None] * len(question), history or [None] * len(question), False
    if generate_kwargs.get("return_dict_in_generate") or (generate_kwargs.get("num_return_sequences") or 1) > 1:
        raise ValueError(
            "reply returns the text of one answer a question; return_dict_in_generate and num_return_sequences are "
            "for model.generate, whose inputs `prepare` makes."
        )
    inputs, mark = prepare(processor, question, images, conv_template, history)
    generation = _generation_arguments(model, processor, mark, temperature, num_beams, generate_kwargs)
    tokens = _generate(model, inputs, image_cache, max_new_tokens=max_new_tokens, **generation)
    answers = [_without_mark(text, mark.text) for text in processor.batch_decode(tokens, skip_special_tokens=True)]
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
    **generate_kwargs,
):
    """Yield the answer to one question piece by piece; the pieces together are what `reply` returns.

    Arguments as in `reply`. An error while generating is raised here; a caller that stops listening stops the model.
    """
    inputs, mark = prepare(processor, [question], [images], conv_template, [history])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failures = Event(), []
    criteria = StoppingCriteriaList([*generate_kwargs.pop("stopping_criteria", []), _StopOn(stop)])
    generation = _generation_arguments(model, processor, mark, temperature, 1, generate_kwargs)

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
        yield from _pieces_without_mark(streamer, mark.text)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def prepare(processor, questions, images, conv_template=None, history=None):
    """Return (inputs of the model, EndMark of an answer) for B questions, each with its pictures and its history."""
    questions = as_questions(questions)
    history = [None] * len(questions) if history is None else history
    if not len(questions) == len(images) == len(history):
        raise ValueError(
            f"{len(questions)} questions, {len(images)} entries of pictures and {len(history)} of history; "
            "give one of each for every question (None where there is none)."
        )
    if not questions:
        raise ValueError("no question; give one or more.")
    groups = [as_list(pictures) for pictures in images]
    check_sees(processor, any(groups))
    talks = [
        [*(earlier or []), (place_marks(question, earlier, len(pictures)), None)]
        for question, pictures, earlier in zip(questions, groups, history, strict=True)
    ]
    prompts = [processor.render(turns, conv_template) for turns in talks]
    inputs = processor(images=groups, text=prompts)
    return inputs, _end_mark(processor, conv_template)


def check_sees(processor, has_images):
    """Raise ValueError for images that are shown to a model without a vision tower."""
    if has_images and processor.image_processor is None:
        raise ValueError(
            f"{processor.tokenizer.name_or_path!r} has no vision tower: it reads text alone. Ask it without images, "
            "or open a LLaVA model."
        )


def as_questions(questions) -> list[str]:
    """Return questions as a list of texts; ValueError for what is none."""
    if not isinstance(questions, Iterable) or isinstance(questions, (bytes, Mapping)):
        raise ValueError(f"a question is a text, or a list of texts; got {type(questions).__name__}.")
    questions = list(questions)
    for i, question in enumerate(questions):
        if not isinstance(question, str):
            found = "None" if question is None else f"a {type(question).__name__}"
            raise ValueError(f'question {i + 1} is {found}; give a text ("" for an image alone).')
    return questions


def place_marks(question, history, num_pictures):
    """Put an `<image>` line before the question for every picture that has no mark yet, as LLaVA does.

    Raises ValueError if the conversation has more marks than pictures, or only some of the marks it needs.
    """
    mark = DEFAULT_IMAGE_TOKEN
    marked = question.count(mark)
    earlier = sum(turn.count(mark) for turns in history or [] for turn in turns)
    missing = num_pictures - earlier - marked
    if missing < 0 or (missing > 0 and marked > 0):
        raise ValueError(
            f"{earlier + marked} {mark} marks in the conversation but {num_pictures} pictures. "
            f"Give a picture for every mark, or leave the marks out of the question to have them placed."
        )
    return f"{mark}\n" * missing + question


def end_mark(processor, conv_template=None):
    """Return the text that the prompt format puts after an answer, such as `</s>` or `###`; it may be empty."""
    return _end_mark(processor, conv_template).text


def _end_mark(processor, conv_template=None) -> EndMark:
    return end_mark_of(processor.template(conv_template), processor.tokenizer)


def _generation_arguments(model, processor, mark, temperature, num_beams, extra):
    """Return the keywords of `generate` that sampling and stopping ask for; the caller's own win."""
    refuse_unread(extra.get("generation_config"))
    arguments = {"num_beams": num_beams, "pad_token_id": processor.pad_token_id, "do_sample": temperature > 0}
    # A base's generation_config.json may ask for more than the text of one answer.
    arguments |= {"num_return_sequences": 1, "return_dict_in_generate": False}
    # For stop_strings, of the caller or of a base.
    arguments["tokenizer"] = processor.tokenizer
    if temperature > 0:
        arguments["temperature"] = temperature
    ends = end_ids(model.generation_config, processor.tokenizer)
    return arguments | stop_arguments(mark, ends, processor.tokenizer) | extra


def refuse_unread(generation_config):
    """Raise ValueError for a generation config that says what the arguments of `reply` say, and would not be read."""
    fields = {} if generation_config is None else generation_config.to_diff_dict()
    said = [f"{name}={fields[name]!r}" for name in OWN_ARGUMENTS if name in fields]
    if said:
        raise ValueError(
            f"generation_config says {', '.join(said)}, which reply and stream take as arguments of their own "
            "(do_sample by a temperature above 0). Give them by name, and leave them out of generation_config."
        )


def _generate(model, inputs, image_cache=None, **arguments):
    """Return the new tokens [B, T] of a batch from the processor."""
    # Weights that accelerate brings when they are needed have no device, and its hooks move what they are given.
    inputs = inputs.to(*([] if model.device.type == "meta" else [model.device]), dtype=model.dtype)
    if image_cache is not None and "pixel_values" in inputs:
        # An adapter's wrapper hands `generate` to the model inside.
        owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        arguments["image_features"] = image_cache.features(
            owner, inputs.pop("pixel_values"), inputs.get("image_sizes")
        )
    tokens = model.generate(**inputs, **arguments)
    return tokens[:, inputs["input_ids"].shape[1] :]


def _without_mark(text, mark):
    """Return an answer without its end mark and the blanks around it."""
    return (text.partition(mark)[0] if mark else text).strip()


def _pieces_without_mark(pieces, mark):
    """Yield the pieces of an answer up to its end mark, without the blanks around the whole.

    Text is held back while it may turn out to be the beginning of the mark or the blanks before it.
    """
    held, started = "", False
    for piece in pieces:
        held += piece
        if not started:
            held = held.lstrip()
        if mark and mark in held:
            break
        ready = len(held) - _len_of_possible_mark(held, mark)
        ready = len(held[:ready].rstrip())
        if ready:
            started = True
            yield held[:ready]
            held = held[ready:]
    rest = held.partition(mark)[0] if mark else held
    rest = rest.rstrip() if started else rest.strip()
    if rest:
        yield rest


def _len_of_possible_mark(text, mark):
    """Return the length of the longest end of `text` that begins `mark`."""
    return next((size for size in range(min(len(mark), len(text)), 0, -1) if text.endswith(mark[:size])), 0)


class _StopOn(StoppingCriteria):
    """Stop every row once an event is set: nobody listens any more."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
