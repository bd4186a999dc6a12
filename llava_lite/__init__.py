"""Open the names that most users need, each loaded when it is first asked for."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the file it lives in. `import llava_lite` itself reads no other file, so it costs no torch.
_EXPORTS = {
    "ImageFeatureCache": "model.fusion.image_cache",
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
    "LlavaLiteProcessor": "processing.processor",
    "conv_templates": "conversation",
    "load": "inference",
    "load_pretrained_model": "model.builder",
    "push_directory": "hub.push",
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


if __name__ != "llava_lite":
    # A link or a copy of the directory: its modules would be second ones, whose classes are not those of llava_lite.
    raise ImportError(
        f"{__file__} is the package llava_lite and was imported as {__name__!r}. Import llava_lite; for programs that "
        "import llava, call llava_lite.alias.install('llava') first, or run: python -m llava_lite.alias SCRIPT"
    )
