"""Turn the generation config of any base into one that transformers reads and saves, and report what is left out.

transformers refuses to save a config that contradicts itself (Vicuna's: a temperature without do_sample), and to read
some. Which fields are at fault is found by asking transformers about one field after another, so that the answer is
that of the installed version.
"""

from __future__ import annotations

import copy
import json
import logging
import re

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import WatermarkingConfig

from llava_lite.hub.errors import CONFIG
from llava_lite.hub.json_files import read_json
from llava_lite.model.new_words import grown_layers, merged_state
from llava_lite.model.quantization import get_bits

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
# Fields on which others depend: a value that enables those, and how it is written in a message.
MODES = {"do_sample": (True, "do_sample=True"), "num_beams": (2, "num_beams > 1")}
MODES |= {name: (True, f"{name}=True") for name in ("return_dict_in_generate", "use_cache")}
# Types of the fields that `generate` computes with; transformers checks few of them before it generates.
FLAGS = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing", "disable_compile")
FLAGS += ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
NUMBERS = ("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha")
NUMBERS += ("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "diversity_penalty", "max_time")
NUMBERS += ("guidance_scale", "assistant_confidence_threshold")
COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_beam_groups", "top_k")
COUNTS += ("num_return_sequences", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "prefill_chunk_size")
COUNTS += ("prompt_lookup_num_tokens", "num_assistant_tokens", "max_matching_ngram_size")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
TOKENS += ("forced_eos_token_id",)
TYPES = dict.fromkeys(FLAGS, (bool,)) | dict.fromkeys(NUMBERS, (int, float)) | dict.fromkeys(COUNTS, (int,))
TYPES |= dict.fromkeys(TOKENS, (int, list))


def read_generation_config(checkpoint, config) -> GenerationConfig | None:
    """Return the generation config of a checkpoint, without fields that cannot be used; None without a checkpoint.

    From config.json where there is no generation_config.json, as transformers does. config: the model's, which is used
    if generation_config.json is broken. One warning lists the fields that are left out or changed.
    """
    if checkpoint.path is None:
        return None
    fields, file = _read_fields(checkpoint)
    if fields is None:
        return GenerationConfig.from_model_config(config)
    kept, notes = _sort_out(fields, strict=False)
    if not notes and file == FILE:
        return GenerationConfig.from_pretrained(checkpoint.path, **checkpoint.keywords)
    if not notes:
        return GenerationConfig.from_model_config(copy.deepcopy(checkpoint.fields))
    logger.warning("%s of %r is read %s.", file, checkpoint.path, _listed(notes))
    # A token id that is no number is known from config.json.
    kept |= {name: getattr(config, name, None) for name in notes if name in TOKENS and name not in kept}
    if file == FILE:
        return GenerationConfig(**kept)
    # So that fields which are not about generation are left out, and transformers knows where the others come from.
    return GenerationConfig.from_model_config(kept)


def load_generation_config(model, checkpoint, config: GenerationConfig | None = None) -> None:
    """Give a model a generation config: `config`, else that of the checkpoint's generation_config.json, if any."""
    if config is None and checkpoint.file(FILE) is not None:
        config = read_generation_config(checkpoint, model.config)
    if config is not None:
        model.generation_config = config


def savable(config: GenerationConfig) -> tuple[GenerationConfig, str]:
    """Return (a config that transformers saves, a sentence about what it lacks); the same one and "" if it does.

    A field goes only if transformers refuses to save it beside the others; all else stays.
    """
    kept, notes = _sort_out(config.to_dict(), strict=True)
    if not notes:
        return config, ""
    mended = copy.deepcopy(config)
    for name in notes:
        if name in vars(GenerationConfig()):
            setattr(mended, name, kept.get(name))
        else:
            delattr(mended, name)
    return mended, f"{FILE} is written {_listed(notes)}."


def write_generation_config(config: GenerationConfig, directory) -> None:
    """Write generation_config.json, with a warning if something had to be left out."""
    config, note = savable(config)
    if note:
        logger.warning(note)
    config.save_pretrained(directory)


def savable_view(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that shares all weights with `model` and can be saved with any generation config.

    Another object, since saving writes into the config, and the model may be generating in another thread.
    """
    view = copy.copy(model)
    view.config = copy.deepcopy(model.config)
    if model.can_generate():
        view.generation_config, note = savable(model.generation_config)
        if note:
            logger.warning(note)
    return view


class SavingMixin:
    """`save_pretrained` of a model class that no generation config stops."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Write the model as transformers does; of its generation config all that transformers saves."""
        if get_bits(getattr(self.config, "quantization_config", None)) is not None:
            # transformers cannot undo how it read weights in few bits, and has renamed none of ours.
            kwargs.setdefault("save_original_format", False)
        if kwargs.get("state_dict") is None and grown_layers(self):
            # The rows of new tokens that train beside their matrices, in their places.
            kwargs["state_dict"] = merged_state(self)
        return super(SavingMixin, savable_view(self)).save_pretrained(save_directory, *args, **kwargs)


def _read_fields(checkpoint) -> tuple[dict | None, str]:
    """Return the fields of generation_config.json, else those of config.json that are about generation; the file.

    None for a generation_config.json without fields, with a warning.
    """
    found = checkpoint.file(FILE)
    if found is None:
        known = vars(GenerationConfig())
        return {name: value for name, value in checkpoint.fields.items() if name in known}, CONFIG
    try:
        fields = read_json(found)
        reason = f"it holds a {type(fields).__name__} and no fields"
    except ValueError as error:
        fields, reason = None, str(error)
    if isinstance(fields, dict):
        return fields, FILE
    logger.warning("%r cannot be read (%s); the generation fields of config.json are used instead.", found, reason)
    return None, FILE


def _sort_out(fields: dict, strict: bool) -> tuple[dict, dict[str, tuple[str, str]]]:
    """Return (the fields that transformers takes together, {name: (what is left out or changed, why it is left out)}).

    strict: take what can be saved; else what can be read.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    typed = {name: _typed(name, value) for name, value in fields.items()}
    if all(map(_is_sound, typed, typed.values())) and not _refusal(typed, strict):
        kept = typed
        refused = {}
    else:
        kept, refused = {}, {}
        for name in sorted(typed, key=lambda name: name not in MODES):
            problem = _problem(name, typed[name], kept, strict)
            if problem:
                refused[name] = (f"{name} {fields[name]!r}", problem)
            else:
                kept[name] = typed[name]
    changed = {
        name: (f"{name} {value!r} in place of {fields[name]!r}", "")
        for name, value in kept.items()
        if value is not fields[name]
    }
    return kept, refused | changed


def _typed(name: str, value):
    """Return a value in its field's type if a text or a number means the same: "0.9" is 0.9 and 512.0 is 512."""
    if _has_type(name, value):
        return value
    meant = value
    if isinstance(value, float) and value.is_integer():
        meant = int(value)
    elif isinstance(value, str):
        try:
            meant = json.loads(value.lower())
        except ValueError:
            return value
    return meant if _has_type(name, meant) else value


def _has_type(name: str, value) -> bool:
    types = TYPES.get(name)
    if types is None:
        return True
    if isinstance(value, list) and list in types:
        return all(_has_type(name, item) for item in value)
    # Python takes True for an int.
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def _is_sound(name: str, value) -> bool:
    return _has_type(name, value) and not hasattr(GenerationConfig, name)


def _problem(name: str, value, kept: dict, strict: bool) -> str:
    """Return why a field cannot stand beside those that are kept, "" if it can."""
    if not _has_type(name, value):
        return f"expected {' or '.join(kind.__name__ for kind in TYPES[name])}"
    if not _is_sound(name, value):
        return "the name of a method"
    error = _refusal(kept | {name: value}, strict)
    if not error:
        return ""
    for mode, (on, words) in MODES.items():
        if name != mode and not _refusal(kept | {mode: on, name: value}, strict):
            return f"needs {words}"
    return error


def _refusal(fields: dict, strict: bool) -> str:
    """Return transformers' reason to refuse fields, in a line; "" if it accepts them."""
    config = GenerationConfig()
    try:
        for name, value in fields.items():
            is_watermark = name == "watermarking_config" and isinstance(value, dict)
            setattr(config, name, WatermarkingConfig.from_dict(value) if is_watermark else value)
        config.validate(strict=strict)
    # Comparing values of another kind raises nearly everything.
    except Exception as error:
        reason = str(error).removeprefix("GenerationConfig is invalid: \n- ")
        # The first sentence; the others advise somebody who writes code.
        return re.split(r"\n|\.(?=\s|$)", reason, maxsplit=1)[0] or type(error).__name__
    return ""


def _listed(notes: dict[str, tuple[str, str]]) -> str:
    """Return what is left out and changed, in a clause; fields of one reason together."""
    by_reason = {}
    for field, why in notes.values():
        by_reason.setdefault(why, []).append(field)
    changed = by_reason.pop("", [])
    clauses = [f"without {', '.join(fields)} ({why})" for why, fields in by_reason.items()]
    return "; ".join([*clauses, *([f"with {', '.join(changed)}"] if changed else [])])
