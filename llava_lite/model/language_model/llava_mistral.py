"""LLaVA on Mistral."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel

from llava_lite.model.configuration import LlavaConfigMixin
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(LlavaConfigMixin, MistralConfig):
    """A Mistral config with LLaVA's keys."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """The Mistral decoder with tower, connector and MoE layers."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    """The whole model: pictures and text in, text out."""

    config_class = LlavaMistralConfig
    decoder_class = LlavaMistralModel
