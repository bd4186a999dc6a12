"""Turn LLaVA's talks into token ids and labels, under the names and with the returns of its `train/train.py`.

Prompts and labels are made by `llava_lite.conversation` and `mm_utils`; which template, says
`llava_lite.conversation.default_conversation` when a function is called. Labels come from the places of the answers,
so no talk is masked because two ways of counting its tokens differ, as happens in LLaVA.
"""

import torch

from llava_lite import conversation as conversation_lib
from llava_lite.constants import IGNORE_INDEX
from llava_lite.conversation import Rendered, SeparatorStyle, place_images
from llava_lite.data.turns import ROLES
from llava_lite.mm_utils import tokenize_rendered


def preprocess_multimodal(sources, data_args):
    """Put the pictures of each turn where the model is to read them, in place, and return `sources`.

    sources: talks, each a list of {"from", "value"}. Nothing happens unless data_args.is_multimodal. One picture of a
    turn goes in front; several stay where they stand (LLaVA keeps one mark of them).
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
    """Return {"input_ids", "labels"} of talks by the default template.

    sources: talks, each a list of {"from", "value"}. has_image: `<image>` is a picture; else it is text, and a talk is
    cut at tokenizer.model_max_length. Both values are tensors [N, T], padded on the right, or lists of tensors for the
    templates of `plain` and of `###`, as in LLaVA.
    """
    style = conversation_lib.default_conversation.sep_style
    if style is SeparatorStyle.PLAIN:
        return preprocess_plain(sources, tokenizer)
    if style is SeparatorStyle.SINGLE:
        return preprocess_v0(sources, tokenizer, has_image)
    return _stacked(_encode(sources, tokenizer, has_image), tokenizer)


def preprocess_v1(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of USER and ASSISTANT; answers and their end marks are learned."""
    _expect(SeparatorStyle.TWO)
    return preprocess(sources, tokenizer, has_image)


def preprocess_llama_2(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of [INST]; answers and their end marks are learned."""
    _expect(SeparatorStyle.LLAMA_2)
    return preprocess(sources, tokenizer, has_image)


def preprocess_mpt(sources, tokenizer, has_image=False) -> dict:
    """Return ids and labels [N, T] by a template of <|im_start|>; answers and their end marks are learned.

    Nearly all that LLaVA's own masks here is masked by a wrong count; MoE-LLaVA's rule is this one.
    """
    _expect(SeparatorStyle.MPT)
    return preprocess(sources, tokenizer, has_image)


def preprocess_plain(sources, tokenizer) -> dict:
    """Return lists of ids and labels [T] of captions: of a question its pictures are kept, the caption is learned."""
    _expect(SeparatorStyle.PLAIN)
    return _listed(_encode(sources, tokenizer, has_image=True))


def preprocess_v0(sources, tokenizer, has_image=False) -> dict:
    """Return lists of ids and labels [T] of talks as LLaVA's first version was trained, `### Human: ...` a line.

    Learned are the lines of the assistant and the `###` that ends each. LLaVA's mask drifts by one token a turn.
    The prompts of these templates are written otherwise, with no blank behind `###`.
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
    """Return the lines of a talk, each as `### Role: text`, with the spans that are learned."""
    template = conversation_lib.default_conversation
    roles = dict(zip(ROLES, template.roles, strict=True))
    text, learned = f"{template.system}\n\n", []
    for turn in source:
        line = f"### {roles[turn['from']]}: {turn['value']}\n"
        # The mark of a human line ends the answer before it.
        learned.append((len(text), len(text) + (len("###") if turn["from"] == ROLES[0] else len(line))))
        text += line
    return Rendered(text + "### ", (*learned, (len(text), len(text) + len("### "))))


def _encode(sources, tokenizer, has_image, render=_by_template):
    """Return (ids, labels) of each talk; what has no pictures is cut at the tokenizer's maximum."""
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


def padded(rows, value) -> torch.Tensor:
    if len({len(row) for row in rows}) > 1 and value is None:
        raise ValueError("rows of different lengths need a padding token; set tokenizer.pad_token.")
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value or 0)
