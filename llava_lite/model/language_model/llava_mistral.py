"""LLaVA on Mistral."""

from transformers import MistralForCausalLM, MistralModel

from llava_lite.configuration import LlavaMistralConfig
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """The Mistral decoder with tower, connector and MoE layers."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    """The full model: images and text in, text out."""

    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel
