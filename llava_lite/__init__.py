"""Open the names that most users need, each loaded when it is first asked for."""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the file it lives in. `import llava_lite` itself reads no other file, so it costs no torch.
_EXPORTS = {
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
