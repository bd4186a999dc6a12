"""LLaVA on Phi-1.5 and Phi-2."""

from transformers import PhiForCausalLM, PhiModel

from llava_lite.configuration import LlavaPhiConfig
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaPhiModel(LlavaMetaModel, PhiModel):
    """The Phi decoder with tower, connector and MoE layers."""

    config_class = LlavaPhiConfig


class LlavaPhiForCausalLM(LlavaMetaForCausalLM, PhiForCausalLM):
    """The full model: images and text in, text out."""

    config_class = LlavaPhiConfig
    decoder_class = LlavaPhiModel
    lm_head_bias = True
