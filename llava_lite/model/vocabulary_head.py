"""Turn hidden states into logits over the vocabulary, or straight into their loss, without holding all logits.

Method: the gradients of a linear layer followed by cross-entropy are made chunk by chunk in the forward pass, where
the logits of the chunk are at hand (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2).

S supervised positions, C of them in a chunk, V vocabulary, D model width.
"""

import importlib.util

import torch
from torch.nn import functional as F

from llava_lite.model.products import Linear, product

# Logits of a chunk, as a number of float32: small beside the activations of a step, large enough for a full product.
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}


class VocabularyHead(Linear):
    """The last layer of a decoder; called with labels, it returns their cross-entropy instead of logits."""

    plain_paths: frozenset[str] = frozenset()

    @classmethod
    def of(cls, linear: torch.nn.Linear, plain_paths: frozenset[str] = frozenset()) -> "VocabularyHead":
        """Return a head with the very weights of a linear layer."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        # With what others have noted on it: transformers, that its weights are not to be drawn again.
        vars(head).update(vars(linear))
        head.plain_paths = plain_paths
        return head

    def forward(self, hidden, labels=None, divisor=1):
        """Return logits [..., V] of hidden [..., D]; with labels [S] and hidden [S, D] their summed loss / divisor.

        Labels are words; only the plain path also takes IGNORE_INDEX.
        """
        if labels is None:
            return self.scores(hidden)
        if "loss" in self.plain_paths:
            return F.cross_entropy(self.scores(hidden).float(), labels, reduction="sum") / divisor
        return self.cross_entropy(hidden, labels, divisor)

    def scores(self, hidden):
        """Return logits [..., V]."""
        return super().forward(hidden)

    def cross_entropy(self, hidden, labels, divisor):
        """Return the summed loss / divisor."""
        return linear_cross_entropy(hidden, self.weight, self.bias, labels, divisor)


def linear_cross_entropy(hidden, weight, bias, labels, divisor=1) -> torch.Tensor:
    """Return the summed cross-entropy of hidden [S, D] against labels [S], all of them words, over divisor.

    weight [V, D], bias [V] or None. float32. On CUDA by Liger's kernel where that is installed.
    """
    liger = find_liger(hidden)
    if liger is not None and len(labels):
        return liger(input=hidden, weight=weight, target=labels, bias=bias, reduction="sum").float() / divisor
    return LinearCrossEntropy.apply(hidden, weight, bias, labels, divisor, torch.is_grad_enabled())


def find_liger(hidden):
    """Return Liger's fused linear cross-entropy, or None where it is not installed or the tensor is not on CUDA."""
    if hidden.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


class LinearCrossEntropy(torch.autograd.Function):
    """Linear layer and cross-entropy in one; keeps gradients [S, D] and [V, D] for the backward pass, no logits.

    rows [R, D], ids [R]: read in place of the weight's rows of these words, and with a gradient of their own.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, divisor, wants_gradient, rows=None, ids=None):
        """Return the loss, having made the gradients that somebody wants."""
        wanted = ctx.needs_input_grad
        needs_hidden, needs_weight, needs_bias = (wants_gradient and needs for needs in wanted[:3])
        needs_rows = rows is not None and wants_gradient and wanted[6]
        kind, dtype = hidden.device.type, weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        # Half precision is divided late: float16 needs its loss scale first, which comes with the backward pass.
        early, ctx.late = (1 / divisor, 1) if dtype == torch.float32 else (1, 1 / divisor)
        num_chunks = max(1, -(-hidden.shape[0] * weight.shape[0] // CHUNK_LOGITS.get(kind, 2**26)))
        # A sum of many chunks loses the small ones in half precision.
        sum_dtype = weight.dtype if num_chunks == 1 else torch.float32
        loss = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = d_bias = d_rows = None
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            own = None if rows is None else rows.to(dtype)
            vector = None if bias is None else bias.to(dtype)
            for part, words, out in zip(
                hidden.to(dtype).chunk(num_chunks),
                labels.chunk(num_chunks),
                d_hidden.chunk(num_chunks) if needs_hidden else [None] * num_chunks,
                strict=False,
            ):
                scores = product(part, matrix)
                if own is not None:
                    scores.index_copy_(1, ids, product(part, own))
                scores = (scores if vector is None else scores.add_(vector)).float()  # [C, V]
                # In place: from the logits to their exponentials, their probabilities and the gradient of the loss.
                scores.sub_(scores.amax(dim=-1, keepdim=True))
                loss -= scores.gather(1, words[:, None]).sum()
                total = scores.exp_().sum(dim=-1, keepdim=True)
                loss += total.log().sum()
                if not (needs_hidden or needs_weight or needs_bias or needs_rows):
                    continue
                scores.div_(total).scatter_add_(1, words[:, None], scores.new_full((len(words), 1), -1.0))
                d_logits = scores.to(dtype)
                if needs_bias:
                    d_bias = added(d_bias, d_logits.sum(0) * early, sum_dtype)
                d_own = None
                if own is not None:
                    d_own = d_logits[:, ids]  # [C, R]
                    d_logits.index_fill_(1, ids, 0)
                if needs_rows:
                    d_rows = added(d_rows, d_own.t() @ (part * early), torch.float32)
                if needs_hidden:
                    d_part = product(d_logits, matrix.t())
                    out.copy_((d_part if own is None else d_part.add_(product(d_own, own.t()))) * early)
                if needs_weight:
                    # Of a chunk's few rows oneDNN is no faster.
                    if d_weight is not None and sum_dtype == dtype:
                        d_weight.addmm_(d_logits.t(), part * early)
                    else:
                        d_weight = added(d_weight, d_logits.t() @ (part * early), sum_dtype)
        found = [None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias)]
        ctx.save_for_backward(d_hidden, *found, None if d_rows is None else d_rows.to(rows.dtype))
        return loss / divisor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        """Return the gradients times that of the loss."""
        scale = d_loss * ctx.late
        # Looking at a number on CUDA would wait for the device; on the CPU it saves a pass over [V, D].
        is_one = scale.device.type == "cpu" and scale.item() == 1
        # A float32 number without dimensions leaves a tensor's dtype and multiplies in float32.
        *gradients, for_rows = (d if d is None or is_one else d * scale for d in ctx.saved_tensors)
        return *gradients, None, None, None, for_rows, None


def added(total, part, dtype):
    """Return total + part in `dtype`; `part` alone where there is no total yet."""
    return part.to(dtype) if total is None else total.add_(part)
