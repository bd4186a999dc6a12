"""Turn the fields of a config.json into a sentence if no model here can be opened from them."""

from __future__ import annotations

import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

# Models that are not trained to go on with a text, though transformers can put a head on them that does.
NO_GENERATORS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def check_model_type(name, fields: dict) -> None:
    """Raise ValueError if transformers knows no config class for a config.json, or only by running code of its own.

    fields: the raw config.json of `name`; {} where there is none, about which nothing is said here.
    """
    model_type = fields.get("model_type")
    if not fields or model_type in CONFIG_MAPPING:
        return
    if fields.get("auto_map"):
        raise ValueError(
            f"{str(name)!r} (model_type {model_type!r}) is opened by Python code of its own (auto_map in "
            "its config.json), which is never run here. Take a model that transformers knows by itself."
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
    """Raise ValueError if a plain model of transformers is no language model that answers to a text alone."""
    made_for = [kind for kind in config.architectures or () if kind.endswith(NO_GENERATORS)]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or made_for:
        what = made_for[0] if made_for else f"model_type {config.model_type!r}"
        raise ValueError(
            f"{str(name)!r} is no language model that goes on with a text ({what}). Give a decoder such as Llama, "
            "Mistral or Qwen, or a LLaVA model."
        )
