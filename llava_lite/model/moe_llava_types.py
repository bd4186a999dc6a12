"""MoE-LLaVA's names for the models of this package, and its model types for transformers' Auto classes.

There a model with experts is a class of its own, and one more to open it with; here both are the dense class, whose
config says in `moe` which layers have experts.
"""

from dataclasses import fields

from transformers import AutoConfig

from llava_lite.model.language_model.llava_llama import LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_lite.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava_lite.model.language_model.llava_phi import LlavaPhiConfig, LlavaPhiForCausalLM
from llava_lite.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava_lite.model.language_model.llava_stablelm import LlavaStableLmConfig, LlavaStableLmForCausalLM
from llava_lite.model.moe_config import MoeConfig

MOE_FIELDS = {field.name for field in fields(MoeConfig)} - {"layers"}


def config_of_type(model_type: str, config_class: type, name: str | None = None) -> type:
    """Register and return a config class for another format's model type; what it makes is a `config_class`.

    It may be called as MoE-LLaVA's are: the settings of the experts (num_experts, ...) beside the others.
    """

    def make(cls, *args, **kwargs):
        moe = {key: kwargs.pop(key) for key in MOE_FIELDS & kwargs.keys()}
        if moe:
            kwargs["moe"] = {**(kwargs.get("moe") or {}), **moe}
        return config_class(*args, **kwargs)

    name = name or f"{''.join(word.title() for word in model_type.split('_'))}Config"
    body = {"__new__": make, "model_type": model_type, "__module__": __name__, "__doc__": config_class.__doc__}
    alias = type(name, (config_class,), body)
    AutoConfig.register(model_type, alias, exist_ok=True)
    return alias


MoELLaVALlamaConfig = config_of_type("moe_llava_llama", LlavaLlamaConfig, "MoELLaVALlamaConfig")
MoELLaVALlamaForCausalLM = EvalMoELLaVALlamaForCausalLM = LlavaLlamaForCausalLM

MoELLaVAMistralConfig = config_of_type("moe_llava_mistral", LlavaMistralConfig, "MoELLaVAMistralConfig")
MoELLaVAMistralForCausalLM = EvalMoELLaVAMistralForCausalLM = LlavaMistralForCausalLM

MoELLaVAPhiConfig = config_of_type("moe_llava_phi", LlavaPhiConfig, "MoELLaVAPhiConfig")
MoELLaVAPhiForCausalLM = EvalMoELLaVAPhiForCausalLM = LlavaPhiForCausalLM

MoELLaVAQwen1_5Config = config_of_type("moe_llava_qwen1_5", LlavaQwen2Config, "MoELLaVAQwen1_5Config")
MoELLaVAQwen1_5ForCausalLM = EvalMoELLaVAQwen1_5ForCausalLM = LlavaQwen2ForCausalLM
LlavaQwen1_5Config = config_of_type("llava_qwen1_5", LlavaQwen2Config, "LlavaQwen1_5Config")
LlavaQwen1_5ForCausalLM = LlavaQwen2ForCausalLM

MoELLaVAStablelmConfig = config_of_type("moe_llava_stablelm", LlavaStableLmConfig, "MoELLaVAStablelmConfig")
MoELLaVAStablelmForCausalLM = EvalMoELLaVAStablelmForCausalLM = LlavaStableLmForCausalLM
LlavaStablelmConfig, LlavaStablelmForCausalLM = LlavaStableLmConfig, LlavaStableLmForCausalLM

# Qwen's first generation and MiniCPM have no decoder here: formats/moe_llava.py refuses them with the reason.
# LLaVA-NeXT says llava_qwen too, and means Qwen2.
for _model_type in ("llava_qwen", "moe_llava_qwen", "llava_minicpm", "moe_llava_minicpm"):
    config_of_type(_model_type, LlavaQwen2Config)
