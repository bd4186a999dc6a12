"""Find the positions of a batch that learn, and what they learn.

B batch, L positions, S of them supervised.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llava_lite.constants import IGNORE_INDEX


def find_supervised(labels, shift_labels=None, positions=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the flat positions [S] whose next token is learned, and those tokens [S].

    labels: [B, L], each at its own token; or shift_labels: [B, L], each at the position that predicts it, as sequence
    parallelism cuts them. positions: [S] if the collator has found them, which saves waiting for the device.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets = shift_labels.flatten()  # [B * L]
    if positions is None:
        positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    return positions, targets[positions]
