"""LLaVA on StableLM."""

from transformers import StableLmForCausalLM, StableLmModel
from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer

from llava_lite.configuration import LlavaStableLmConfig
from llava_lite.model.adaption_prompt import KeepsKeywords
from llava_lite.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class PromptedStableLmLayer(KeepsKeywords, StableLmDecoderLayer):
    """A layer for mm_injection adaption_prompt: transformers' own calls its attention without keywords."""


class LlavaStableLmModel(LlavaMetaModel, StableLmModel):
    """The StableLm decoder with tower, connector and MoE layers."""

    config_class = LlavaStableLmConfig
    prompted_layer = PromptedStableLmLayer
    _no_split_modules = (StableLmDecoderLayer.__name__, PromptedStableLmLayer.__name__)


class LlavaStableLmForCausalLM(LlavaMetaForCausalLM, StableLmForCausalLM):
    """The full model: images and text in, text out."""

    config_class = LlavaStableLmConfig
    decoder_class = LlavaStableLmModel
