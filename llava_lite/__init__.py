"""Open the names that most users need, each loaded when it is first asked for."""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from os.path import dirname, realpath

__version__ = "0.1.0"

# Public name -> the file it lives in. `import llava_lite` itself reads no other file, so it costs no torch.
_EXPORTS = {
    "ImageFeatureCache": "model.image_cache",
    "LlavaConfig": "model",
    "LlavaLlamaForCausalLM": "model",
    "LlavaMistralConfig": "model",
    "LlavaMistralForCausalLM": "model",
    "LlavaQwen2Config": "model",
    "LlavaQwen2ForCausalLM": "model",
    "LlavaQwen3Config": "model",
    "LlavaQwen3ForCausalLM": "model",
    "LlavaPhiConfig": "model",
    "LlavaPhiForCausalLM": "model",
    "LlavaStableLmConfig": "model",
    "LlavaStableLmForCausalLM": "model",
    "LlavaLiteProcessor": "processing",
    "conv_templates": "conversation",
    "load": "inference",
    "load_pretrained_model": "model.builder",
    "push_folder": "share",
    "reply": "inference",
    "stream": "inference",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    """Load the file of a public name the first time that someone asks for it (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llava_lite' has no attribute '{name}'; known: {', '.join(sorted(_EXPORTS))}.")
    value = getattr(import_module(f"llava_lite.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    """List the public names along with the module's own."""
    return sorted({*globals(), *_EXPORTS})


def _hand_over(name):
    """Put llava_lite in the place of `name`, under which this file was found: the folder has a link, `llava` say."""
    if find_spec("llava_lite") is None:
        # Only the link is on the path.
        file = realpath(__file__)
        spec = spec_from_file_location("llava_lite", file, submodule_search_locations=[dirname(file)])
        sys.modules["llava_lite"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["llava_lite"])
    sys.modules[name] = import_module("llava_lite")


if __name__ == "llava_lite":
    # Lets `sys.modules["llava"] = llava_lite` open these same files, and no second copies of them.
    import_module("llava_lite.alias").register()
else:
    _hand_over(__name__)
