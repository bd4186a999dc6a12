"""MoE-LLaVA's names for the models of this package, and its model types for transformers' Auto classes.

In MoE-LLaVA a model with experts has a class of its own, and a second class to open it with; here both are the dense
class, whose config says in `moe` which layers have experts.
"""

from dataclasses import fields

from transformers import AutoConfig

from llava_lite.model.language_model.llava_llama import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_lite.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava_lite.model.language_model.llava_phi import LlavaPhiConfig, LlavaPhiForCausalLM
from llava_lite.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava_lite.model.language_model.llava_stablelm import LlavaStableLmConfig, LlavaStableLmForCausalLM
from llava_lite.model.moe.config import MoeConfig

MOE_FIELDS = {field.name for field in fields(MoeConfig)} - {"layers"}


class OtherModelType:
    """A config class for another model type; calling it returns a config of `own_class`.

    It takes MoE-LLaVA's arguments: the settings of the experts (num_experts, ...) beside the others.
    """

    own_class: type

    def __new__(cls, *args, **kwargs):
        """Return a config of the own class, the settings of the experts gathered in `moe`."""
        moe = {key: kwargs.pop(key) for key in MOE_FIELDS & kwargs.keys()}
        if moe:
            kwargs["moe"] = {**(kwargs.get("moe") or {}), **moe}
        return cls.own_class(*args, **kwargs)


class MoELLaVALlamaConfig(OtherModelType, LlavaLlamaConfig):
    """MoE-LLaVA on Llama."""

    model_type, own_class = "moe_llava_llama", LlavaLlamaConfig


class MoELLaVAMistralConfig(OtherModelType, LlavaMistralConfig):
    """MoE-LLaVA on Mistral."""

    model_type, own_class = "moe_llava_mistral", LlavaMistralConfig


class MoELLaVAPhiConfig(OtherModelType, LlavaPhiConfig):
    """MoE-LLaVA on Phi."""

    model_type, own_class = "moe_llava_phi", LlavaPhiConfig


class MoELLaVAQwen1_5Config(OtherModelType, LlavaQwen2Config):
    """MoE-LLaVA on Qwen1.5, whose decoder is Qwen2's."""

    model_type, own_class = "moe_llava_qwen1_5", LlavaQwen2Config


class MoELLaVAStablelmConfig(OtherModelType, LlavaStableLmConfig):
    """MoE-LLaVA on StableLM."""

    model_type, own_class = "moe_llava_stablelm", LlavaStableLmConfig


class LlavaQwen1_5Config(OtherModelType, LlavaQwen2Config):
    """MoE-LLaVA's dense model on Qwen1.5."""

    model_type, own_class = "llava_qwen1_5", LlavaQwen2Config


# Qwen's first generation and MiniCPM have no decoder here: formats/moe_llava.py raises with the reason. LLaVA-NeXT
# uses llava_qwen too, for Qwen2.
class LlavaQwenConfig(OtherModelType, LlavaQwen2Config):
    """LLaVA-NeXT on Qwen2."""

    model_type, own_class = "llava_qwen", LlavaQwen2Config


class MoELLaVAQwenConfig(OtherModelType, LlavaQwen2Config):
    """MoE-LLaVA on Qwen's first generation, which is not supported."""

    model_type, own_class = "moe_llava_qwen", LlavaQwen2Config


class LlavaMinicpmConfig(OtherModelType, LlavaQwen2Config):
    """MoE-LLaVA's dense model on MiniCPM, which is not supported."""

    model_type, own_class = "llava_minicpm", LlavaQwen2Config


class MoELLaVAMinicpmConfig(OtherModelType, LlavaQwen2Config):
    """MoE-LLaVA on MiniCPM, which is not supported."""

    model_type, own_class = "moe_llava_minicpm", LlavaQwen2Config


MoELLaVALlamaForCausalLM = EvalMoELLaVALlamaForCausalLM = LlavaLlamaForCausalLM
MoELLaVAMistralForCausalLM = EvalMoELLaVAMistralForCausalLM = LlavaMistralForCausalLM
MoELLaVAPhiForCausalLM = EvalMoELLaVAPhiForCausalLM = LlavaPhiForCausalLM
MoELLaVAQwen1_5ForCausalLM = EvalMoELLaVAQwen1_5ForCausalLM = LlavaQwen1_5ForCausalLM = LlavaQwen2ForCausalLM
MoELLaVAStablelmForCausalLM = EvalMoELLaVAStablelmForCausalLM = LlavaStableLmForCausalLM
LlavaStablelmConfig, LlavaStablelmForCausalLM = LlavaStableLmConfig, LlavaStableLmForCausalLM

for _config in OtherModelType.__subclasses__():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
