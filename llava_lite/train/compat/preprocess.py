"""Turn LLaVA's conversations into token ids and labels, under the names and with the returns of its `train/train.py`.

Prompts and labels are made by `llava_lite.conversation` and `mm_utils`, by the template that is
`llava_lite.conversation.default_conversation` when a function is called. Labels come from the spans of the answers, so
no conversation is masked because two ways of counting its tokens differ, as happens in LLaVA.
"""

import torch

from llava_lite import conversation as conversation_lib
from llava_lite.constants import IGNORE_INDEX
from llava_lite.conversation import Rendered, SeparatorStyle
from llava_lite.conversation.images import place_images
from llava_lite.conversation.layout import SPEAKERS
from llava_lite.conversation.tokenize import tokenize_rendered


def preprocess_multimodal(sources, data_args):
    """Move the image placeholders of each turn to where the model reads them, in place, and return `sources`.

    sources: conversations, each a list of {"from", "value"}. Nothing happens unless data_args.is_multimodal. One image
    of a turn goes in front; several stay where they are (LLaVA keeps one placeholder of them).
    """
    if not data_args.is_multimodal:
        return sources
    for source in sources:
        turns = [(turn["from"], turn["value"]) for turn in source]
        placed = place_images(turns, conversation_lib.default_conversation, data_args.mm_use_im_start_end)
        for turn, (_, text) in zip(source, placed, strict=True):
            turn["value"] = text
    return sources


def preprocess(sources, tokenizer, has_image=False) -> dict:
    """Return {"input_ids", "labels"} of conversations by the default template.

    sources: conversations, each a list of {"from", "value"}. has_image: `<image>` is an image; else it is text, and a
    conversation is cut at tokenizer.model_max_length. Both values are tensors [N, T], padded on the right, or lists of
    tensors for the templates of `plain` and of `###`, as in LLaVA.
    """
    style = conversation_lib.default_conversation.sep_style
    if style is SeparatorStyle.PLAIN:
        return preprocess_plain(sources, tokenizer)
    if style is SeparatorStyle.SINGLE:
        return preprocess_v0(sources, tokenizer, has_image)
    return _stacked(_encode(sources, tokenizer, has_image), tokenizer)


def preprocess_v1(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] of USER and ASSISTANT turns; answers and their end tokens are supervised."""
    _expect(SeparatorStyle.TWO)
    return preprocess(sources, tokenizer, has_image)


def preprocess_llama_2(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of [INST]; answers and their end tokens are supervised."""
    _expect(SeparatorStyle.LLAMA_2)
    return preprocess(sources, tokenizer, has_image)


def preprocess_mpt(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of <|im_start|>; answers and their end tokens are supervised.

    LLaVA's own masks nearly everything here, by a wrong count of tokens; this is MoE-LLaVA's rule.
    """
    _expect(SeparatorStyle.MPT)
    return preprocess(sources, tokenizer, has_image)


def preprocess_plain(sources, tokenizer) -> dict:
    """Return lists of ids and labels [T] of captions: images and the caption, which is supervised."""
    _expect(SeparatorStyle.PLAIN)
    return _listed(_encode(sources, tokenizer, has_image=True))


def preprocess_v0(sources, tokenizer, has_image=False) -> dict:
    """Return lists of ids and labels [T] of conversations in the format of LLaVA v0, lines of `### Human: ...`.

    Supervised are the lines of the assistant and the `###` that ends each. LLaVA's mask drifts by one token a turn.
    The prompts of these templates differ: there is no space after `###`.
    """
    _expect(SeparatorStyle.SINGLE)
    return _listed(_encode(sources, tokenizer, has_image, _as_lines))


def _expect(style) -> None:
    found = conversation_lib.default_conversation.sep_style
    if found is not style:
        raise ValueError(
            f"the default conversation has the style {found.name}, expected {style.name}; call preprocess(), which "
            "goes by the template, or set llava_lite.conversation.default_conversation."
        )


def _by_template(source, tokenizer) -> Rendered:
    turns = [(turn["from"], turn["value"]) for turn in source]
    return conversation_lib.default_conversation.with_turns(turns).render(tokenizer)


def _as_lines(source, tokenizer) -> Rendered:
    """Return the lines of a conversation, each as `### Role: text`, with the supervised spans."""
    template = conversation_lib.default_conversation
    roles = dict(zip(SPEAKERS, template.roles, strict=True))
    text, spans = f"{template.system}\n\n", []
    for turn in source:
        line = f"### {roles[turn['from']]}: {turn['value']}\n"
        # The `###` of a human line ends the answer before it.
        spans.append((len(text), len(text) + (len("###") if turn["from"] == SPEAKERS[0] else len(line))))
        text += line
    return Rendered(text + "### ", (*spans, (len(text), len(text) + len("### "))))


def _encode(sources, tokenizer, has_image, render=_by_template):
    """Return (ids, labels) of each conversation; one without images is truncated at the tokenizer's maximum."""
    examples = []
    for source in sources:
        ids, labels = map(torch.tensor, tokenize_rendered(render(source, tokenizer), tokenizer, has_image))
        end = None if has_image else tokenizer.model_max_length
        examples.append((ids[:end], labels[:end]))
    return examples


def _listed(examples) -> dict:
    return {"input_ids": [ids for ids, _ in examples], "labels": [labels for _, labels in examples]}


def _stacked(examples, tokenizer) -> dict:
    ids, labels = zip(*examples, strict=True)
    return {"input_ids": padded(ids, tokenizer.pad_token_id), "labels": padded(labels, IGNORE_INDEX)}


def padded(sequences, value) -> torch.Tensor:
    if len({len(one) for one in sequences}) > 1 and value is None:
        raise ValueError("sequences of different lengths need a padding token; set tokenizer.pad_token.")
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=value or 0)
