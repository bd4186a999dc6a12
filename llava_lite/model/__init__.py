"""The models; importing this registers them with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from llava_lite.model.compat.moe_llava import (
    EvalMoELLaVALlamaForCausalLM,
    EvalMoELLaVAMistralForCausalLM,
    EvalMoELLaVAPhiForCausalLM,
    EvalMoELLaVAQwen1_5ForCausalLM,
    EvalMoELLaVAStablelmForCausalLM,
    LlavaQwen1_5Config,
    LlavaQwen1_5ForCausalLM,
    LlavaStablelmConfig,
    LlavaStablelmForCausalLM,
    MoELLaVALlamaConfig,
    MoELLaVALlamaForCausalLM,
    MoELLaVAMistralConfig,
    MoELLaVAMistralForCausalLM,
    MoELLaVAPhiConfig,
    MoELLaVAPhiForCausalLM,
    MoELLaVAQwen1_5Config,
    MoELLaVAQwen1_5ForCausalLM,
    MoELLaVAStablelmConfig,
    MoELLaVAStablelmForCausalLM,
)
from llava_lite.model.language_model.llava_llama import LlavaConfig, LlavaLlamaConfig, LlavaLlamaForCausalLM
from llava_lite.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava_lite.model.language_model.llava_phi import LlavaPhiConfig, LlavaPhiForCausalLM
from llava_lite.model.language_model.llava_qwen2 import LlavaQwen2Config, LlavaQwen2ForCausalLM
from llava_lite.model.language_model.llava_qwen3 import LlavaQwen3Config, LlavaQwen3ForCausalLM
from llava_lite.model.language_model.llava_stablelm import LlavaStableLmConfig, LlavaStableLmForCausalLM
from llava_lite.processing.processor import LlavaLiteProcessor

BACKBONES = {
    "llama": LlavaLlamaForCausalLM,
    "mistral": LlavaMistralForCausalLM,
    "phi": LlavaPhiForCausalLM,
    "qwen2": LlavaQwen2ForCausalLM,
    "qwen3": LlavaQwen3ForCausalLM,
    "stablelm": LlavaStableLmForCausalLM,
}


def model_class_for(model_type: str) -> type:
    """Return the model class for the model_type of a text decoder ("llama") or of a model here ("llava_llama").

    Raises ValueError with the known types.
    """
    name = model_type.removeprefix("llava_")
    if name not in BACKBONES:
        raise ValueError(
            f"unknown language model of model_type {model_type!r}; known: {', '.join(sorted(BACKBONES))}."
        )
    return BACKBONES[name]


for _model in BACKBONES.values():
    _config = _model.config_class
    # exist_ok: a test or a notebook may remove the package from sys.modules and import it again.
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model.decoder_class, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _model, exist_ok=True)
    AutoModelForMultimodalLM.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, LlavaLiteProcessor, exist_ok=True)

__all__ = [
    "BACKBONES",
    "EvalMoELLaVALlamaForCausalLM",
    "EvalMoELLaVAMistralForCausalLM",
    "EvalMoELLaVAPhiForCausalLM",
    "EvalMoELLaVAQwen1_5ForCausalLM",
    "EvalMoELLaVAStablelmForCausalLM",
    "LlavaConfig",
    "LlavaLlamaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaPhiConfig",
    "LlavaPhiForCausalLM",
    "LlavaQwen1_5Config",
    "LlavaQwen1_5ForCausalLM",
    "LlavaQwen2Config",
    "LlavaQwen2ForCausalLM",
    "LlavaQwen3Config",
    "LlavaQwen3ForCausalLM",
    "LlavaStableLmConfig",
    "LlavaStableLmForCausalLM",
    "LlavaStablelmConfig",
    "LlavaStablelmForCausalLM",
    "MoELLaVALlamaConfig",
    "MoELLaVALlamaForCausalLM",
    "MoELLaVAMistralConfig",
    "MoELLaVAMistralForCausalLM",
    "MoELLaVAPhiConfig",
    "MoELLaVAPhiForCausalLM",
    "MoELLaVAQwen1_5Config",
    "MoELLaVAQwen1_5ForCausalLM",
    "MoELLaVAStablelmConfig",
    "MoELLaVAStablelmForCausalLM",
    "model_class_for",
]
