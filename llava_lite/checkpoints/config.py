"""Turn the fields of a config.json into a config, or into a sentence if no model here can be opened from them."""

from __future__ import annotations

import copy

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from llava_lite.configuration import CONFIGS, config_class_for

# Models that transformers can give a head for text generation, and that were not trained for it.
NO_GENERATORS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def read_config(name, fields: dict, format=None) -> PreTrainedConfig:
    """Return our config of a LLaVA model, transformers' config of a plain one; ValueError for an unknown model.

    name: of the checkpoint. fields: its raw config.json. format: the module of `formats` that reads it, None for names
    of ours. model_type does not tell formats apart: a LLaVA v1 and transformers' LLaVA both have "llava".
    """
    fields = copy.deepcopy(fields)
    if format is not None:
        fields = format.config_from(fields)
        config = config_class_for(fields["model_type"]).from_dict(fields)
        config.name_or_path = str(name)
        return config
    check_model_type(name, fields)
    return get_config_class(fields["model_type"]).from_dict(fields, name_or_path=name)


def read_upstream_config(name, fields: dict) -> PreTrainedConfig:
    """Return the config that transformers itself reads, whatever the format; its Auto classes choose by it."""
    fields, model_type = copy.deepcopy(fields), fields.get("model_type")
    if model_type in CONFIG_MAPPING or is_own_type(model_type):
        try:
            return get_config_class(model_type).from_dict(fields, name_or_path=name)
        except (ValueError, OSError):
            fields = copy.deepcopy(fields)
    return PreTrainedConfig.from_dict(fields, name_or_path=name)


def needs_auto_config(name, fields: dict) -> bool:
    """Tell whether AutoConfig has a rule of its own for a config.json: other files, or another class."""
    check_model_type(name, fields)
    is_ministral = fields.get("model_type") == "mistral" and "layer_types" in fields
    return "configuration_files" in fields or is_ministral


def get_config_class(model_type: str) -> type:
    """Return the config class of a model_type, ours or transformers'."""
    return config_class_for(model_type) if is_own_type(model_type) else CONFIG_MAPPING[model_type]


def is_own_type(model_type: str | None) -> bool:
    """Tell whether a model_type is one of this package's models."""
    return str(model_type).startswith("llava_") and str(model_type).removeprefix("llava_") in CONFIGS


def is_llava(config) -> bool:
    """Tell whether a config is one of this package's models, with or without a vision tower."""
    return hasattr(config, "has_vision_tower")


def check_model_type(name, fields: dict) -> None:
    """Raise ValueError if there is no config class for a config.json, or only one that runs code beside it.

    fields: the raw config.json of `name`, of ours or of transformers.
    """
    model_type = fields.get("model_type")
    if model_type in CONFIG_MAPPING or is_own_type(model_type):
        return
    if str(model_type).startswith(("llava", "moe_llava")):
        # transformers would advise to update it.
        raise ValueError(
            f"{str(name)!r} is a LLaVA on a decoder that is not known here (model_type {model_type!r}); "
            f"known: {', '.join(sorted(CONFIGS))}, and what other systems call these."
        )
    if fields.get("auto_map"):
        raise ValueError(
            f"{str(name)!r} (model_type {model_type!r}) is opened by Python code of its own (auto_map in "
            "its config.json), which is never run here. Take a model that transformers opens by itself."
        )
    if model_type is None:
        raise ValueError(
            f"the config.json of {str(name)!r} names no model_type, so it is no model in the layout of transformers."
        )
    raise ValueError(
        f"{str(name)!r} has the model_type {model_type!r}, which transformers {transformers.__version__} does not "
        "know. Check the spelling in its config.json; a newer model may need a newer transformers."
    )


def check_generates(name, config) -> None:
    """Raise ValueError if a plain model of transformers does not generate text from text alone."""
    trained_for = [kind for kind in config.architectures or () if kind.endswith(NO_GENERATORS)]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or trained_for:
        what = trained_for[0] if trained_for else f"model_type {config.model_type!r}"
        raise ValueError(
            f"{str(name)!r} is no language model that generates text ({what}). Give a decoder such as Llama, "
            "Mistral or Qwen, or a LLaVA model."
        )
