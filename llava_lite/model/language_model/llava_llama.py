"""LLaVA on Llama, Vicuna and their kin."""

from transformers import LlamaForCausalLM, LlamaModel

from llava_lite.configuration import LlavaLlamaConfig
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """The Llama decoder with tower, connector and MoE layers."""

    config_class = LlavaLlamaConfig


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    """The full model: images and text in, text out."""

    config_class = LlavaLlamaConfig
    decoder_class = LlavaLlamaModel


# LLaVA's name; transformers has another class of that name, so ours is registered as LlavaLlamaConfig.
LlavaConfig = LlavaLlamaConfig
