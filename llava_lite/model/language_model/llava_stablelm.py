"""LLaVA on StableLM."""

from transformers import StableLmConfig, StableLmForCausalLM, StableLmModel

from llava_lite.model.configuration import LlavaConfigMixin
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaStableLmConfig(LlavaConfigMixin, StableLmConfig):
    """A StableLm config with LLaVA's keys."""

    model_type = "llava_stablelm"


class LlavaStableLmModel(LlavaMetaModel, StableLmModel):
    """The StableLm decoder with tower, connector and MoE layers."""

    config_class = LlavaStableLmConfig


class LlavaStableLmForCausalLM(LlavaMetaForCausalLM, StableLmForCausalLM):
    """The whole model: pictures and text in, text out."""

    config_class = LlavaStableLmConfig
    decoder_class = LlavaStableLmModel
