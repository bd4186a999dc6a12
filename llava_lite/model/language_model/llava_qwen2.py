"""LLaVA on Qwen2 and Qwen2.5."""

from transformers import Qwen2ForCausalLM, Qwen2Model

from llava_lite.configuration import LlavaQwen2Config
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwen2Model(LlavaMetaModel, Qwen2Model):
    """The Qwen2 decoder with tower, connector and MoE layers."""

    config_class = LlavaQwen2Config


class LlavaQwen2ForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    """The full model: images and text in, text out."""

    config_class = LlavaQwen2Config
    decoder_class = LlavaQwen2Model
