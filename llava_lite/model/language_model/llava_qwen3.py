"""LLaVA on Qwen3."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from llava_lite.model.configuration import LlavaConfigMixin
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwen3Config(LlavaConfigMixin, Qwen3Config):
    """A Qwen3 config with LLaVA's keys."""

    model_type = "llava_qwen3"


class LlavaQwen3Model(LlavaMetaModel, Qwen3Model):
    """The Qwen3 decoder with tower, connector and MoE layers."""

    config_class = LlavaQwen3Config


class LlavaQwen3ForCausalLM(LlavaMetaForCausalLM, Qwen3ForCausalLM):
    """The whole model: pictures and text in, text out."""

    config_class = LlavaQwen3Config
    decoder_class = LlavaQwen3Model
