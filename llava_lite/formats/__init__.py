"""Names of foreign checkpoints and ours, one file a format, pure functions.

A format is a module with three functions that take the raw fields of a config.json: claims(config) tells whether the
checkpoint is of that format; config_from(config) returns the fields of our config, with our model_type;
weights_from(state_dict, config) returns the weights under our names, views where possible. Fields and weights under
our names pass unchanged.
"""

from importlib import import_module

# Name -> module. No two claim the same checkpoint, so the order says nothing.
FORMATS = {
    "llava": "llava_lite.formats.llava",
    "moe_llava": "llava_lite.formats.moe_llava",
    "transformers_llava": "llava_lite.formats.transformers_llava",
}


def foreign_format(config: dict):
    """Return the module that reads a checkpoint with this raw config.json, or None if its names are ours already."""
    modules = (import_module(name) for name in FORMATS.values())
    return next((module for module in modules if module.claims(config)), None)
