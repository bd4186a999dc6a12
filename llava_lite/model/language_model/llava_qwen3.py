"""LLaVA on Qwen3."""

from transformers import Qwen3ForCausalLM, Qwen3Model

from llava_lite.configuration import LlavaQwen3Config
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwen3Model(LlavaMetaModel, Qwen3Model):
    """The Qwen3 decoder with tower, connector and MoE layers."""

    config_class = LlavaQwen3Config


class LlavaQwen3ForCausalLM(LlavaMetaForCausalLM, Qwen3ForCausalLM):
    """The full model: images and text in, text out."""

    config_class = LlavaQwen3Config
    decoder_class = LlavaQwen3Model
