"""Flags of how images enter the language model, beside LLaVA's own: injection, connector, added biases."""

# ruff: noqa: RUF009 - `knob` and `switch` return a dataclass field.
from dataclasses import dataclass, field, fields
from typing import Literal


def knob(text, default=None, **metadata):
    """Return a dataclass field with its one sentence for `--help`, and its default."""
    return field(default=default, metadata={"help": text, **metadata})


def switch(text):
    """Return the field of a flag that is True, False or not given; without a value it is True."""
    return knob(text, nargs="?", const=True)


@dataclass
class InjectionArguments:
    """How images enter the language model; a flag that is not given leaves the model's own value."""

    mm_injection: Literal["tokens", "adaption_prompt"] | None = knob(
        "How images enter the language model: tokens, in the sequence of embeddings (LLaVA); adaption_prompt, "
        "as gated prompts in the attention of its last layers (LLaMA-Adapter V2, ImageBind-LLM). Default: the "
        "model's, else tokens."
    )
    adaption_prompt_len: int | None = knob(
        "With --mm_injection adaption_prompt: prompts of each layer (LLaMA-Adapter V2: 10; ImageBind-LLM: 1). "
        "Default: the model's, else 10."
    )
    adaption_prompt_layers: int | None = knob(
        "With --mm_injection adaption_prompt: number of layers with prompts, the last of the model (LLaMA- "
        "Adapter V2: 31 of 32). Default: the model's, else all."
    )
    mm_text_only: Literal["bare", "blank"] | None = knob(
        "With --mm_injection adaption_prompt, what a record without an image gets: bare, the prompts alone; "
        "blank, an image of zeros too, as the originals have it. Default: the model's, else bare."
    )
    mm_vision_projection: bool | None = switch(
        "Read CLIP's features after its last norm and its projection (LLaMA-Adapter V2). Default: as the model does."
    )
    mm_boundary_vectors: bool | None = switch(
        "Put a learned vector before and after the features of an image (LLaMA2-Accessory). Default: as the "
        "model does."
    )
    mm_image_position: Literal["placeholder", "front"] | None = knob(
        "Where an image stands: at its placeholder; or in front of all text, after the first token "
        "(LLaMA2-Accessory). Default: the model's, else placeholder."
    )
    mm_query_len: int | None = knob(
        "With --mm_projector_type query_vit: number of queries, the vectors of an image. Default: the "
        "model's, else 10."
    )
    mm_query_hidden: int | None = knob("With query_vit: width of its layers. Default: the model's, else 768.")
    mm_query_depth: int | None = knob("With query_vit: number of its layers. Default: the model's, else 8.")
    mm_query_heads: int | None = knob("With query_vit: attention heads of a layer. Default: the model's, else 16.")
    mm_query_mlp_ratio: float | None = knob(
        "With query_vit: width of its MLPs as a multiple of its own. Default: the model's, else 4."
    )
    mm_gate_expansion: int | None = knob(
        "With gated_mlpNx: width of its MLPs as a multiple of the language model's. Default: the model's, else 4."
    )
    image_channels: Literal["rgb", "bgr"] | None = knob(
        "Order of the colours that the tower sees: bgr for weights of LLaMA-Adapter V2's releases. Default: "
        "the model's, else rgb."
    )
    bias_linears: list[str] | None = knob(
        "With --tuning bias_norm: linear layers of the language model that get a bias, by name; all; none. Default: "
        "q_proj o_proj gate_proj up_proj down_proj (LLaMA-Adapter V2)."
    )
    bias_connector: bool = knob(
        "With --tuning bias_norm: train the biases of the connector too (LLaMA2-Accessory); its other weights stay "
        "frozen.",
        False,
    )


# Those that the model's config has under the same names.
INJECTION_KEYS = tuple(f.name for f in fields(InjectionArguments) if not f.name.startswith("bias_"))
