"""Turn hidden states into logits over the vocabulary, or straight into their loss, without holding all logits.

Method: the gradients of a linear layer followed by cross-entropy are computed chunk by chunk in the forward pass,
where the logits of the chunk exist (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2).

S supervised positions, C of them in a chunk, V vocabulary, D model width.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from torch.nn import functional as F

from llava_lite.model.matmul import UsesMatmul, share_weights

# Logits of a chunk, as a number of float32: small beside the activations of a step, large enough for a fast product.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}


class VocabularyHead(UsesMatmul, nn.Linear):
    """The last layer of a decoder; called with labels, it returns their cross-entropy instead of logits."""

    @classmethod
    def sharing(cls, layer: nn.Linear, like: nn.Module) -> VocabularyHead:
        """Return a head that holds the very parameters of a linear layer and multiplies as the head `like` does."""
        head = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        head.multiply_like(like)
        return share_weights(head, layer)

    def forward(self, hidden, labels=None, divisor=1):
        """Return logits [..., V] of hidden [..., D]; with labels [S] and hidden [S, D] their summed loss / divisor.

        Labels are token ids; only the plain path also takes IGNORE_INDEX.
        """
        if labels is None:
            return self.scores(hidden)
        if "loss" in self.plain_paths:
            return F.cross_entropy(self.scores(hidden).float(), labels, reduction="sum") / divisor
        return self.cross_entropy(hidden, labels, divisor)

    def scores(self, hidden):
        """Return logits [..., V]."""
        return self.matmul.linear(hidden, self.weight, self.bias)

    def cross_entropy(self, hidden, labels, divisor):
        """Return the summed loss / divisor; on CUDA by Liger's kernel where that is installed."""
        liger = None if "liger" in self.plain_paths else find_liger(hidden)
        if liger is not None and len(labels):
            loss = liger(input=hidden, weight=self.weight, target=labels, bias=self.bias, reduction="sum")
            return loss.float() / divisor
        return linear_cross_entropy(self.matmul, hidden, self.weight, self.bias, labels, divisor)


def linear_cross_entropy(matmul, hidden, weight, bias, labels, divisor=1, rows=None, ids=None) -> torch.Tensor:
    """Return the summed cross-entropy of hidden [S, D] against labels [S], all of them token ids, over divisor.

    matmul: the products to use. weight [V, D], bias [V] or None. rows, ids: as in LinearCrossEntropy. float32.
    """
    needs_gradient = torch.is_grad_enabled()
    return LinearCrossEntropy.apply(hidden, weight, bias, labels, divisor, needs_gradient, rows, ids, matmul)


def find_liger(hidden):
    """Return Liger's fused linear cross-entropy, or None where it is not installed or the tensor is not on CUDA."""
    if hidden.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


class LinearCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one; saves gradients [S, D] and [V, D] for the backward pass, no logits.

    rows [R, D], ids [R]: read in place of the weight's rows of these token ids, and with a gradient of their own.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, divisor, needs_gradient, rows, ids, matmul):
        """Return the loss; compute the gradients that autograd will ask for."""
        needs_hidden, needs_weight, needs_bias = (needs_gradient and needs for needs in ctx.needs_input_grad[:3])
        needs_rows = rows is not None and needs_gradient and ctx.needs_input_grad[6]
        kind, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        # Half precision is divided in the backward pass: float16 needs its loss scale first, which comes there.
        early, ctx.late = (1 / divisor, 1) if dtype == torch.float32 else (1, 1 / divisor)
        num_chunks = max(1, -(-hidden.shape[0] * weight.shape[0] // CHUNK_LOGITS.get(kind, 2**26)))
        # A sum over many chunks loses small terms in half precision.
        sum_dtype = weight.dtype if num_chunks == 1 else torch.float32
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = d_bias = d_rows = None
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            own = None if rows is None else rows.to(dtype)
            vector = None if bias is None else bias.to(dtype)
            for part, targets, out in zip(
                hidden.to(dtype).chunk(num_chunks),
                labels.chunk(num_chunks),
                d_hidden.chunk(num_chunks) if needs_hidden else [None] * num_chunks,
                strict=False,
            ):
                scores = matmul.product(part, matrix)
                if own is not None:
                    scores.index_copy_(1, ids, matmul.product(part, own))
                scores = (scores if vector is None else scores.add_(vector)).float()  # [C, V]
                # In place: from the logits to their exponentials, their probabilities and the gradient of the loss.
                scores.sub_(scores.amax(dim=-1, keepdim=True))
                loss -= scores.gather(1, targets[:, None]).sum()
                total = scores.exp_().sum(dim=-1, keepdim=True)
                loss += total.log().sum()
                if not (needs_hidden or needs_weight or needs_bias or needs_rows):
                    continue
                scores.div_(total).scatter_add_(1, targets[:, None], scores.new_full((len(targets), 1), -1.0))
                d_logits = scores.to(dtype)
                if needs_bias:
                    d_bias = add_to(d_bias, d_logits.sum(0) * early, sum_dtype)
                d_own = None
                if own is not None:
                    d_own = d_logits[:, ids]  # [C, R]
                    d_logits.index_fill_(1, ids, 0)
                if needs_rows:
                    d_rows = add_to(d_rows, d_own.t() @ (part * early), torch.float32)
                if needs_hidden:
                    d_part = matmul.product(d_logits, matrix.t())
                    out.copy_((d_part if own is None else d_part.add_(matmul.product(d_own, own.t()))) * early)
                if needs_weight:
                    # torch's own product: for the few rows of a chunk oneDNN is no faster.
                    if d_weight is not None and sum_dtype == dtype:
                        d_weight.addmm_(d_logits.t(), part * early)
                    else:
                        d_weight = add_to(d_weight, d_logits.t() @ (part * early), sum_dtype)
        found = [None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias)]
        ctx.save_for_backward(d_hidden, *found, None if d_rows is None else d_rows.to(rows.dtype))
        return loss / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        """Return the saved gradients, times the gradient of the loss."""
        scale = d_loss * ctx.late
        # Reading a number on CUDA would wait for the device; on the CPU it saves a pass over [V, D].
        is_one = scale.device.type == "cpu" and scale.item() == 1
        # A float32 tensor without dimensions leaves the other tensor's dtype and multiplies in float32.
        *gradients, for_rows = (d if d is None or is_one else d * scale for d in ctx.saved_tensors)
        return *gradients, None, None, None, for_rows, None, None


def add_to(total, part, dtype):
    """Return total + part in `dtype`; `part` alone where there is no total yet."""
    return part.to(dtype) if total is None else total.add_(part)
