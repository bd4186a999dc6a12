"""LLaVA on Phi-1.5 and Phi-2."""

from transformers import PhiConfig, PhiForCausalLM, PhiModel

from llava_lite.model.configuration import LlavaConfigMixin
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaPhiConfig(LlavaConfigMixin, PhiConfig):
    """A Phi config with LLaVA's keys."""

    model_type = "llava_phi"


class LlavaPhiModel(LlavaMetaModel, PhiModel):
    """The Phi decoder with tower, connector and MoE layers."""

    config_class = LlavaPhiConfig


class LlavaPhiForCausalLM(LlavaMetaForCausalLM, PhiForCausalLM):
    """The whole model: pictures and text in, text out."""

    config_class = LlavaPhiConfig
    decoder_class = LlavaPhiModel
    lm_head_bias = True
