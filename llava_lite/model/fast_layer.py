"""Give the layers of a stock decoder bodies that touch memory less, and a last layer that computes wanted rows only.

A layer, its attention, its MLP and its norms become subclasses of what they are, of the same names: weights, hooks,
checkpointing, adapters and whatever asks for a class find what they know. Every weight is reached by calling the
module that owns it, as ZeRO-3, adapters and quantised layers want it. The fast bodies run in training; with a cache,
outside training and in a compiled graph transformers' own do.

B batch, L positions, S supervised ones among B * L, D model width, H heads, Dh width of a head.
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.phi import modeling_phi as phi
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.stablelm import modeling_stablelm as stablelm

from .cpu_attention import attends_here
from .fused import rms_norm, rotate, rotate_one, swiglu
from .moe import MoeBlock
from .remade import remade


class FastPart(nn.Module):
    """What has a faster body beside that of transformers; see plain_paths.py."""

    plain_paths: frozenset[str] = frozenset()

    @property
    def is_fast(self) -> bool:
        """Whether the faster body is taken now."""
        return self.training and "layers" not in self.plain_paths and not torch.compiler.is_compiling()


class FastNorm(FastPart):
    """RMSNorm that keeps its input alone."""

    def forward(self, hidden_states):
        """Return hidden states of the same shape, normed over the last dimension."""
        if not self.is_fast:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FastMlp(FastPart):
    """Gated MLP that keeps gate and up alone."""

    def forward(self, x):
        """Return [..., D] of [..., D]."""
        if not self.is_fast or self.config.hidden_act not in ("silu", "swish"):
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = swiglu(gate, up)
        with remade(hidden, swiglu, gate, up):
            return self.down_proj(hidden)


class PhiMlpBody(FastPart):
    """Phi's MLP with its activation in one step, which keeps its input; transformers spells gelu_new out in eight."""

    def forward(self, hidden_states):
        """Return [..., D] of [..., D]."""
        if not self.is_fast or self.config.hidden_act not in ("gelu_new", "gelu_pytorch_tanh"):
            return super().forward(hidden_states)
        inner = self.fc1(hidden_states)
        hidden = gelu_tanh(inner)
        with remade(hidden, gelu_tanh, inner):
            return self.fc2(hidden)


def gelu_tanh(inner):
    """Return transformers' gelu_new of it."""
    return nn.functional.gelu(inner, approximate="tanh")


class FastAttention(FastPart):
    """Attention that turns queries and keys in one go each and projects wanted rows only.

    `eager_attention`: the function of the backbone's own file, which no registry holds.
    """

    eager_attention: staticmethod
    output_name = "o_proj"

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        supervised_rows=None,
        **kwargs,
    ):
        """Return (states [B, L, D] or, of supervised_rows [S] of B * L, [1, S, D]; weights or None)."""
        if past_key_values is not None or (not self.is_fast and supervised_rows is None):
            states, weights = super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            return pick(states, supervised_rows), weights
        heads = (-1, self.head_dim)
        value = self.v_proj(hidden_states).unflatten(-1, heads)  # [B, L, Hkv, Dh]
        asking = supervised_rows if self.asks_by_rows(supervised_rows, value, kwargs) else None
        query = self.norm_heads("q", self.q_proj(pick(hidden_states, asking)).unflatten(-1, heads))
        key = self.norm_heads("k", self.k_proj(hidden_states).unflatten(-1, heads))
        if asking is None:
            query, key = rotate(query, key, *position_embeddings)
        else:
            angles = (one.expand(len(hidden_states), -1, -1) for one in position_embeddings)
            query = rotate_one(query, *(pick(one, asking) for one in angles))
            key = rotate_one(key, *position_embeddings)
            kwargs["query_rows"] = asking
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        states, weights = attend(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.window(),
            **kwargs,
        )
        states = pick(states.flatten(2), supervised_rows if asking is None else None)
        return getattr(self, self.output_name)(states), weights

    def asks_by_rows(self, rows, value, kwargs) -> bool:
        """Return whether queries are made and attention runs at `rows` alone: in packed rows on the CPU.

        Elsewhere the kernels want a query for every key.
        """
        packed = rows is not None and kwargs.get("cu_seq_lens_q") is not None
        varlen = self.config._attn_implementation == "varlen"
        dropout = self.attention_dropout if self.training else 0.0
        return packed and varlen and attends_here(value, dropout=dropout) and bool((rows.diff() > 0).all())

    def norm_heads(self, which, states):
        """Return queries ("q") or keys ("k") [B, L, H, Dh] as the backbone norms them before it turns them."""
        return states

    def window(self) -> dict:
        """Return how the attention function is told of a sliding window, where the backbone has one."""
        return {}


class MistralBody(FastAttention):
    """Mistral's window is the config's."""

    def window(self):
        """Return it."""
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class QwenBody(FastAttention):
    """Qwen's window is the layer's; Qwen3 norms queries and keys."""

    def norm_heads(self, which, states):
        """Return them normed over the width of a head, in Qwen3."""
        return getattr(self, f"{which}_norm")(states) if hasattr(self, "q_norm") else states

    def window(self):
        """Return it."""
        return {"sliding_window": self.sliding_window}


class LayerNormedHeads(FastAttention):
    """StableLM's and Phi's attention, which may norm queries and keys head by head."""

    def norm_heads(self, which, states):
        """Return them normed where the config says so."""
        if not self.qk_layernorm:
            return states
        # StableLM has a norm for each head and looks for heads in the second place.
        return getattr(self, f"{which}_layernorm")(states.transpose(1, 2)).transpose(1, 2)


class PhiBody(LayerNormedHeads):
    """Phi's output projection has a name of its own."""

    output_name = "dense"


class FastLayer(FastPart):
    """A decoder layer whose last one in the stack returns wanted rows only, if it is given `supervised_rows`."""

    @property
    def selects_rows(self) -> bool:
        """Whether this layer is the last and has no experts, whose balance loss is over all positions."""
        attention = self.self_attn
        is_last = attention.layer_idx == attention.config.num_hidden_layers - 1
        return is_last and not isinstance(self.mlp, MoeBlock) and not {"rows", "layers", "loss"} & self.plain_paths

    def forward(self, hidden_states, *args, supervised_rows=None, **kwargs):
        """Return [B, L, D], or [1, S, D] of the last layer: the rows `supervised_rows` [S] of B * L."""
        rows = supervised_rows if self.selects_rows else None
        if rows is None and not self.is_fast and not self.drops_kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        return self.body(hidden_states, rows, *args, **kwargs)

    # Stock StableLM does not hand on to its attention where the samples of a packed row end.
    drops_kwargs = False

    def body(self, hidden_states, rows, attention_mask=None, **kwargs):
        """Norm, attention, norm, MLP, each half added to what came in."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, attention_mask=attention_mask, supervised_rows=rows, **kwargs)
        hidden_states = pick(hidden_states, rows) + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class StableLmBody(FastLayer):
    """StableLM's layer: MLP behind attention, or beside it on the same norm."""

    drops_kwargs = True

    def body(self, hidden_states, rows, attention_mask=None, **kwargs):
        """Return residual, attention and MLP, summed in stock's order."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, attention_mask=attention_mask, supervised_rows=rows, **kwargs)
        hidden_states = pick(hidden_states, rows) + attended
        inner = pick(normed, rows) if self.use_parallel_residual else self.post_attention_layernorm(hidden_states)
        return hidden_states + self.dropout(self.mlp(inner))


class PhiLayerBody(FastLayer):
    """Phi's layer: attention and MLP side by side on one norm."""

    def body(self, hidden_states, rows, attention_mask=None, **kwargs):
        """Return attention, MLP and residual, summed in stock's order."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, attention_mask=attention_mask, supervised_rows=rows, **kwargs)
        inner = self.resid_dropout(self.mlp(pick(normed, rows)))
        return self.resid_dropout(attended) + inner + pick(hidden_states, rows)


def pick(states, rows):
    """Return states [B, L, D], or the rows [S] of B * L of them as [1, S, D]."""
    return states if rows is None else states.flatten(0, 1).index_select(0, rows)[None]


def stand_in(stock: type, body: type) -> type:
    """Return the subclass of a transformers class that has its name and a body of ours."""
    fields = {"__module__": __name__, "__doc__": stock.__doc__}
    if issubclass(body, FastAttention):
        fields["eager_attention"] = staticmethod(sys.modules[stock.__module__].eager_attention_forward)
    return type(stock.__name__, (body, stock), fields)


STAND_INS = {
    stock: stand_in(stock, body)
    for stock, body in (
        (llama.LlamaDecoderLayer, FastLayer),
        (llama.LlamaAttention, FastAttention),
        (llama.LlamaMLP, FastMlp),
        (llama.LlamaRMSNorm, FastNorm),
        (mistral.MistralDecoderLayer, FastLayer),
        (mistral.MistralAttention, MistralBody),
        (mistral.MistralMLP, FastMlp),
        (mistral.MistralRMSNorm, FastNorm),
        (qwen2.Qwen2DecoderLayer, FastLayer),
        (qwen2.Qwen2Attention, QwenBody),
        (qwen2.Qwen2MLP, FastMlp),
        (qwen2.Qwen2RMSNorm, FastNorm),
        (qwen3.Qwen3DecoderLayer, FastLayer),
        (qwen3.Qwen3Attention, QwenBody),
        (qwen3.Qwen3MLP, FastMlp),
        (qwen3.Qwen3RMSNorm, FastNorm),
        (phi.PhiDecoderLayer, PhiLayerBody),
        (phi.PhiAttention, PhiBody),
        (phi.PhiMLP, PhiMlpBody),
        (stablelm.StableLmDecoderLayer, StableLmBody),
        (stablelm.StableLmAttention, LayerNormedHeads),
        (stablelm.StableLmMLP, FastMlp),
    )
}


def __getattr__(name):
    """Open a stand-in by its name, where pickle looks for it (PEP 562)."""
    for stand in STAND_INS.values():
        if stand.__name__ == name:
            return stand
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")


def take_fast_layers(stack) -> None:
    """Give the layers and norms of a decoder stack their faster bodies; what is not known here stays what it is."""
    for part in (*stack.layers.modules(), *stack.children()):
        if type(part) in STAND_INS:
            part.__class__ = STAND_INS[type(part)]
