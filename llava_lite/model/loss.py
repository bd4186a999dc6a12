"""Find the supervised positions of a batch and their target tokens, and turn their hidden states into the loss.

B batch, L positions, S of them supervised, D model width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llava_lite.constants import IGNORE_INDEX
from llava_lite.model.lm_head import VocabularyHead


def find_supervised(labels, shift_labels=None, positions=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the flat positions [S] whose next token is supervised, and these tokens [S].

    labels: [B, L], each at its own token; or shift_labels: [B, L], each at the position that predicts it, as sequence
    parallelism cuts them. positions: [S] if the collator has computed them, which avoids waiting for the device; not
    read with shift_labels.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    else:
        positions = None
    targets = shift_labels.flatten()  # [B * L]
    if positions is None:
        positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, targets[positions]


def check_label_shape(shift_labels, hidden) -> None:
    """Raise ValueError if there are shift_labels and not one for each position of the hidden states [B, L, D]."""
    if shift_labels is not None and shift_labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"shift_labels has shape {tuple(shift_labels.shape)}, the decoder reads {tuple(hidden.shape[:2])} "
            "positions; give ids with one placeholder a feature and labels of the same length."
        )


def supervised_loss(head, hidden, targets, positions=None, num_items=None, is_plain=False) -> torch.Tensor:
    """Return the cross-entropy of the logits of hidden states against targets [S], over `num_items` (or S).

    hidden: [S, D], or [B * L, D] of which `positions` [S] are read. is_plain: compute the logits of all positions and
    ignore the others, as other implementations do.
    """
    # Without supervised tokens the loss is 0 and not NaN.
    if num_items is None:
        divisor = max(len(targets), 1)
    else:
        divisor = num_items.clamp(min=1) if isinstance(num_items, torch.Tensor) else max(num_items, 1)
    # A device map may put the end of the model and the labels on different devices.
    targets = targets.to(hidden.device)
    positions = None if positions is None else positions.to(hidden.device)
    if positions is not None and is_plain:
        targets = targets.new_full(hidden.shape[:1], IGNORE_INDEX).index_copy_(0, positions, targets)
    elif positions is not None:
        hidden = hidden[positions]  # [S, D]
    if isinstance(head, VocabularyHead):
        return head(hidden, labels=targets, divisor=divisor)
    # A head that PEFT wraps or that is quantised returns logits and takes no labels.
    scores = head(hidden).float()
    return F.cross_entropy(scores, targets.to(scores.device), reduction="sum") / divisor
