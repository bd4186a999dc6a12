"""Names of foreign checkpoints and ours, one file a format, pure functions.

A format is a module with three functions that take the raw fields of a config.json: claims(config) tells whether the
checkpoint is of that format; config_from(config) returns the fields of our config, with our model_type;
weights_from(state_dict, config) returns the weights under our names, views where possible. Fields and weights under
our names pass unchanged.

llama_adapter, imagebind_llm and accessory have no config.json: there claims(state) and config_from(params, state) take
the weights, as checkpoints/torch_files.py reads them, weights_to(state, config) is the way back, and
peer_name(name, config) the original's name of one of our weights. They stand on meta_llama and openai_clip.
"""

from importlib import import_module

# Name -> module. No two claim the same checkpoint, so the order is free.
FORMATS = {
    "llava": "llava_lite.formats.llava",
    "moe_llava": "llava_lite.formats.moe_llava",
    "transformers_llava": "llava_lite.formats.hf_llava",
}


def foreign_format(config: dict):
    """Return the module that reads a checkpoint with this raw config.json, or None if its names are ours already."""
    modules = (import_module(name) for name in FORMATS.values())
    return next((module for module in modules if module.claims(config)), None)
