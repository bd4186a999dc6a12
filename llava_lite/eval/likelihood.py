"""Turn questions with a given answer each into the loss of that answer, for benchmarks that compare answers.

Shapes: `B` questions, `T` tokens, `A` tokens of one answer, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from llava_lite.conversation.images import add_placeholders, as_list
from llava_lite.inference import check_sees


@torch.no_grad()
def answer_losses(
    model,
    processor,
    questions: Sequence[str],
    images: Sequence[Any],
    answers: Sequence[str],
    conv_template: str | None = None,
    history: Sequence[Any] | None = None,
) -> list[tuple[float, bool]]:
    """Return (loss, is greedy) of the given answer to each of B questions.

    loss: the mean cross-entropy of the tokens that training supervises, which are the answer and its end token. is
    greedy: whether each of them is the model's most probable one. images, conv_template, history: as in `reply`.
    """
    history = [None] * len(questions) if history is None else history
    groups = [as_list(group) for group in images]
    check_sees(processor, any(groups))
    prompts = [
        processor.render([*(earlier or []), (add_placeholders(question, earlier, len(group)), answer)], conv_template)
        for question, group, earlier, answer in zip(questions, groups, history, answers, strict=True)
    ]
    # Earlier answers are supervised in training, and not asked about here.
    prompts = [prompt._replace(answers=prompt.answers[-1:]) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        if not prompt.answers:
            raise ValueError(f"the prompt format does not show where the answer {answer!r} stands in its prompt.")
    inputs = processor(text=prompts, images=groups, return_assistant_tokens_mask=True)
    is_answer = inputs.pop("assistant_masks")[:, 1:].bool()  # [B, T - 1]
    targets = inputs["input_ids"][:, 1:][is_answer]  # [A of all questions]
    # Weights that accelerate loads when they are needed have no device, and its hooks move the inputs.
    inputs = inputs.to(*([] if model.device.type == "meta" else [model.device]), dtype=model.dtype)
    logits = model(**inputs).logits[:, :-1]
    logits = logits[is_answer.to(logits.device)].float().cpu()  # [A of all questions, V]
    losses = F.cross_entropy(logits, targets, reduction="none")
    is_best = logits.argmax(dim=-1) == targets
    lengths = is_answer.sum(dim=1).tolist()
    return [
        (float(loss.mean()), bool(best.all()))
        for loss, best in zip(losses.split(lengths), is_best.split(lengths), strict=True)
    ]
