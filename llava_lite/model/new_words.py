"""Train the vocabulary rows of new tokens while the vocabulary matrices stay frozen.

The rows are a parameter `new_rows` of the embedding and of the head, read in place of the matrix's rows. A few tokens
cost a few rows of gradient and optimizer state, and every other row keeps its bits. `config.new_words` lists the ids.
B batch, T tokens, R new tokens, S supervised positions, V vocabulary, D model width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from llava_lite.checkpoints.copying import gathered
from llava_lite.checkpoints.vocabulary import is_row_name
from llava_lite.model.lm_head import VocabularyHead, linear_cross_entropy
from llava_lite.model.matmul import share_weights


class GrownEmbedding(nn.Embedding):
    """Input embeddings that read the rows of some ids from a parameter beside the matrix."""

    def __init__(self, embedding: nn.Embedding, ids: torch.Tensor, rows: nn.Parameter):
        """embedding: whose parameter becomes the matrix. ids: [R], ascending. rows: [R, D]."""
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        share_weights(self, embedding)
        self.new_rows = rows
        self.register_buffer("new_ids", ids, persistent=False)

    def forward(self, ids):
        """Return the embeddings [..., D] of ids [...]."""
        known = super().forward(ids)
        slots = torch.searchsorted(self.new_ids, ids.contiguous()).clamp(max=len(self.new_ids) - 1)
        is_new = self.new_ids[slots] == ids
        # Looked up for all ids, so that every rank has a gradient in every step.
        rows = F.embedding(slots, self.new_rows).to(known.dtype)
        return torch.where(is_new[..., None], rows, known)


class GrownHead(VocabularyHead):
    """A vocabulary head that reads the rows of some ids from a parameter beside the matrix."""

    def __init__(self, head: VocabularyHead, ids: torch.Tensor, rows: nn.Parameter):
        """head: whose parameters become the matrix and the bias. ids: [R], ascending. rows: [R, D]."""
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.multiply_like(head)
        share_weights(self, head)
        self.new_rows = rows
        self.register_buffer("new_ids", ids, persistent=False)

    def scores(self, hidden):
        """Return logits [..., V]."""
        known = super().scores(hidden)
        bias = None if self.bias is None else self.bias[self.new_ids]
        rows = F.linear(hidden, self.new_rows.to(self.weight.dtype), bias)
        return known.index_copy(-1, self.new_ids, rows.to(known.dtype))

    def cross_entropy(self, hidden, labels, divisor):
        """Return the summed loss / divisor; not by Liger's kernel, which takes one matrix."""
        matrix = (self.weight, self.bias)
        return linear_cross_entropy(self.matmul, hidden, *matrix, labels, divisor, self.new_rows, self.new_ids)


GROWN = {nn.Embedding: GrownEmbedding, VocabularyHead: GrownHead}


def grow(model) -> None:
    """Let the rows of config.new_words train where the matrix that holds them is frozen.

    The embedding and the head are replaced by layers with the same parameters and `new_rows`. Tied layers share the
    rows, as they share the matrix. Raises ValueError for a layer of another class, such as a quantised one.
    """
    ids, shared = sorted(model.config.new_words or []), {}
    for what, layer, put in (
        ("input embeddings", model.get_input_embeddings(), model.set_input_embeddings),
        ("head", model.get_output_embeddings(), model.set_output_embeddings),
    ):
        if not ids or layer.weight.requires_grad or isinstance(layer, tuple(GROWN.values())):
            continue
        if type(layer) not in GROWN:
            raise ValueError(
                f"the rows of {len(ids)} new words cannot train beside a {what} layer of type {type(layer).__name__}. "
                "Start from weights in full precision, or leave the new words out."
            )
        if layer.weight not in shared:
            with torch.no_grad(), gathered([layer.weight]):
                shared[layer.weight] = nn.Parameter(layer.weight[ids].clone())
        put(GROWN[type(layer)](layer, torch.tensor(ids, device=layer.weight.device), shared[layer.weight]))


def grown_layers(model) -> dict[str, nn.Module]:
    """Return the layers with rows of their own, by the names of their matrices."""
    grown = tuple(GROWN.values())
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, grown)}


def with_new_rows(weight, layer) -> torch.Tensor:
    """Return a copy of a layer's matrix with the rows written in; both must be gathered."""
    full = weight.detach().clone()
    full[layer.new_ids] = layer.new_rows.detach().to(full.dtype)
    return full


def merged_state(model) -> dict[str, torch.Tensor]:
    """Return a model's weights by name, with the rows written into their matrices."""
    layers, copies, state = grown_layers(model), {}, {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if is_row_name(name):
            continue
        if name in layers:
            copies.setdefault(weight, with_new_rows(weight, layers[name]))
        state[name] = copies.get(weight, weight).detach()
    return state
