"""Give the words that a base model never saw rows of their own, which train while its vocabulary matrices do not.

The rows stand beside the frozen matrices, as `new_rows` of the two layers, and are read in their place: a few words
cost a few rows of gradient and optimizer state, and every other row keeps its bits. `config.new_words` lists the ids.
B batch, T tokens, R new words, S supervised positions, V vocabulary, D model width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from llava_lite.model.vocabulary import fill_rows
from llava_lite.model.vocabulary_head import LinearCrossEntropy, VocabularyHead
from llava_lite.model.weights import gathered

ROWS = "new_rows"


class GrownEmbedding(nn.Embedding):
    """Input embeddings that read the rows of some words from a weight beside the matrix."""

    def forward(self, ids):
        """Return the embeddings [..., D] of ids [...]."""
        known = super().forward(ids)
        slots = torch.searchsorted(self.new_ids, ids.contiguous()).clamp(max=len(self.new_ids) - 1)
        is_new = self.new_ids[slots] == ids
        # Looked up for all, so that every rank has a gradient in every step.
        rows = F.embedding(slots, self.new_rows).to(known.dtype)
        return torch.where(is_new[..., None], rows, known)


class GrownHead(VocabularyHead):
    """A vocabulary head that reads the rows of some words from a weight beside the matrix."""

    def scores(self, hidden):
        """Return logits [..., V]."""
        known = super().scores(hidden)
        bias = None if self.bias is None else self.bias[self.new_ids]
        rows = F.linear(hidden, self.new_rows.to(self.weight.dtype), bias)
        return known.index_copy(-1, self.new_ids, rows.to(known.dtype))

    def cross_entropy(self, hidden, labels, divisor):
        """Return the summed loss / divisor; not by Liger's kernel, which knows one matrix."""
        wants = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(
            hidden, self.weight, self.bias, labels, divisor, wants, self.new_rows, self.new_ids
        )


GROWN = {nn.Embedding: GrownEmbedding, VocabularyHead: GrownHead}


def grow(model) -> None:
    """Let the rows of config.new_words train where the matrix that holds them does not.

    Under tied embeddings both layers share the rows, as they share the matrix. Raises ValueError for a layer that
    reads its matrix in another way, such as one in few bits.
    """
    ids, shared = sorted(model.config.new_words or []), {}
    for what, layer in (("input embeddings", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
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
        layer.__class__ = GROWN[type(layer)]
        layer.register_parameter(ROWS, shared[layer.weight])
        layer.register_buffer("new_ids", torch.tensor(ids, device=layer.weight.device), persistent=False)


def grown_layers(model) -> dict[str, nn.Module]:
    """Return the layers with rows of their own, by the names of their matrices."""
    grown = tuple(GROWN.values())
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, grown)}


def is_row_name(name: str) -> bool:
    """Tell whether a weight of this name is rows beside a matrix."""
    return name.rpartition(".")[2] == ROWS


def with_new_rows(weight, layer) -> torch.Tensor:
    """Return a copy of the matrix of a layer in which the rows are in their places; both whole."""
    whole = weight.detach().clone()
    whole[layer.new_ids] = layer.new_rows.detach().to(whole.dtype)
    return whole


def folded_state(model) -> dict[str, torch.Tensor]:
    """Return a model's weights by name, with the rows in their places."""
    layers, copies, state = grown_layers(model), {}, {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if is_row_name(name):
            continue
        if name in layers:
            copies.setdefault(weight, with_new_rows(weight, layers[name]))
        state[name] = copies.get(weight, weight).detach()
    return state


def take_saved_rows(model, weights: dict, ids: list[int] | None, where: str) -> dict:
    """Put the rows among a directory's own weights into the model's matrices; return the other weights.

    ids: config.new_words of the directory. What LLaVA reads, the rows under the names of the matrices, is left out.
    Raises ValueError if rows and ids do not fit.
    """
    saved = {name: rows for name, rows in weights.items() if is_row_name(name)}
    tables = dict(model.named_parameters(remove_duplicate=False))
    for name, rows in saved.items():
        table = tables.get(name.removesuffix(ROWS) + "weight")
        shape = (len(ids or []), model.config.hidden_size)
        if table is None or tuple(rows.shape) != shape:
            raise ValueError(
                f"{where} hold {name} of shape {tuple(rows.shape)}; expected {shape}, a row for each of the new_words "
                "in config.json. Copy both files again."
            )
        fill_rows(table, sorted(ids), rows)
    twice = {f"{name.removesuffix(ROWS)}weight" for name in saved}
    return {name: weight for name, weight in weights.items() if name not in saved and name not in twice}
