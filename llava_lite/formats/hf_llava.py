"""Turn the layout of transformers' own LLaVA (LlavaForConditionalGeneration, LlavaNext...) into ours and back.

There the text model, the tower and the connector have a config and a prefix each, an image is an id of the
vocabulary, and the connector is always two linear layers with an activation between them. What this package knows
beyond that (the prompt format, LLaVA's keys) travels in config.json under RECORD, as "config".
"""

import re
from collections.abc import Mapping

import torch
from transformers import CONFIG_MAPPING

from llava_lite.formats import hf_qwen3_moe as qwen3_moe
from llava_lite.formats.hf_connector import connector_from, connector_to

RECORD = "llava_lite"
ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
# Text model_type -> the class that readers such as vLLM look for inside text_config.
DECODERS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "stablelm": "StableLmForCausalLM",
}
# Tower -> features beside the patches, num_additional_image_tokens of the processor.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
# What an absent vision_config means: CLIP-L/14 at 336 pixels.
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
# LlavaNext's where its config names none, as (height, width).
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Keys of ours that the layout has no place for.
KEPT = (
    "conv_template",
    "enable_thinking",
    "chat_end_token",
    "special_tokens_in_text",
    "image_aspect_ratio",
    "mm_projector_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "new_words",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
)
NOT_TEXT = {"architectures", "model_type", "transformers_version", "_name_or_path", "torch_dtype", "dtype"}

_THEIRS = (
    (re.compile(r"(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"(model\.)?language_model\.(model\.)?"), "model."),
    # transformers 5 leaves "vision_model" out when it saves, 4 and the released checkpoints have it.
    (re.compile(r"(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower.vision_tower.vision_model."),
    (re.compile(r"(model\.)?image_newline$"), "model.image_newline"),
)
_PROJECTOR = re.compile(r"(model\.)?multi_modal_projector\.(linear_[12])\.(weight|bias)")
# What bitsandbytes keeps beside a weight of a few bits.
_PROJECTOR_TABLE = re.compile(r"(model\.)?multi_modal_projector\.linear_([12])\.(weight\..+|SCB|weight_format)")
_OURS = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def claims(config: Mapping) -> bool:
    """Tell whether a config.json is of this layout; LLaVA's first releases are `llava` too, without a text_config."""
    return config.get("model_type") in ARCHITECTURES and config.get("text_config") is not None


def config_from(config: Mapping) -> dict:
    """Return the fields of our config; ValueError where the model does what ours cannot."""
    text = dict(config["text_config"])
    decoder = text.get("model_type", "llama")
    recorded = dict((config.get(RECORD) or {}).get("config", {}))
    moe = recorded.pop("moe", None)
    if decoder == qwen3_moe.DECODER:
        text, decoder = qwen3_moe.fields_from(text, moe), "qwen3"
    vision = dict(config.get("vision_config") or CLIP_L_336)
    vision.setdefault("model_type", "clip_vision_model")
    fields = {key: value for key, value in text.items() if key not in NOT_TEXT}
    fields |= {
        "model_type": f"llava_{decoder}",
        "vision_config": vision,
        "mm_vision_tower": None,
        "mm_hidden_size": _tower_width(vision),
        "mm_projector_type": _connector_from(config),
        "mm_vision_select_layer": _layer_from(config),
        "mm_vision_select_feature": _feature_from(config, vision),
        "image_token_index": config.get("image_token_index", config.get("image_token_id", 32000)),
        # The head is tied if either config has the key.
        "tie_word_embeddings": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }
    asked = config["text_config"]
    dtype = config.get("dtype") or config.get("torch_dtype") or asked.get("dtype") or asked.get("torch_dtype")
    if dtype is not None:
        fields["dtype"] = dtype
    if config["model_type"] == "llava_next":
        # Ours are (width, height), as LLaVA's.
        pinpoints = config.get("image_grid_pinpoints") or PINPOINTS
        fields |= {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [[width, height] for height, width in pinpoints],
        }
    return fields | recorded


def weights_from(state_dict: Mapping[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
    """Return the weights under our names, those of any transformers version; a name nobody knows passes unchanged."""
    renamed, projector = {}, {}
    for name, tensor in state_dict.items():
        match, table = _PROJECTOR.fullmatch(name), _PROJECTOR_TABLE.fullmatch(name)
        if match:
            projector[match[2], match[3]] = tensor
        elif table:
            renamed[f"model.mm_projector.{2 * (int(table[2]) - 1)}.{table[3]}"] = tensor
        else:
            renamed[_first_match(name)] = tensor
    if config["text_config"].get("model_type") == qwen3_moe.DECODER:
        renamed = qwen3_moe.join_experts(renamed)
    return renamed | connector_from(projector, config_from(config)["mm_projector_type"])


def config_to(config: Mapping, image_token_index: int) -> dict:
    """Return the config.json of this layout for the fields of our config; ValueError with what it cannot express.

    image_token_index: the vocabulary's id of `<image>`.
    """
    reason = refusal(config)
    if reason is not None:
        raise ValueError(reason)
    vision = {key: value for key, value in config["vision_config"].items() if key not in NOT_TEXT - {"model_type"}}
    fields = {
        "architectures": [ARCHITECTURES["llava"]],
        "model_type": "llava",
        "text_config": _text_config(config),
        "vision_config": vision,
        "image_token_index": image_token_index,
        "image_seq_length": num_features(config),
        "projector_hidden_act": "gelu" if config["mm_projector_type"] == "mlp2x_gelu" else "linear",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config["mm_vision_select_layer"],
        "vision_feature_select_strategy": strategy(config),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        RECORD: {"config": _kept(config)},
    }
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        fields[key] = config.get(key)
    if config.get("dtype") is not None:
        # The second name is what versions before 5 read.
        dtype = str(config["dtype"]).removeprefix("torch.")
        fields |= {"dtype": dtype, "torch_dtype": dtype}
    if is_anyres(config):
        fields |= {
            "architectures": [ARCHITECTURES["llava_next"]],
            "model_type": "llava_next",
            "image_grid_pinpoints": [[height, width] for width, height in config["image_grid_pinpoints"]],
        }
    return fields


def weights_to(state_dict: Mapping[str, torch.Tensor], config: Mapping) -> dict[str, torch.Tensor]:
    """Return our weights under the names of the released llava-hf checkpoints, which every version and vLLM read."""
    renamed, projector = {}, {}
    for name, tensor in qwen3_moe.split_experts(state_dict).items():
        if name.startswith("model.mm_projector."):
            projector[name.removeprefix("model.mm_projector.")] = tensor
            continue
        ours, theirs = next((pair for pair in _OURS if name.startswith(pair[0])), ("", ""))
        renamed[theirs + name.removeprefix(ours)] = tensor
    embed = state_dict["model.embed_tokens.weight"]
    for name, tensor in connector_to(projector, config, embed).items():
        renamed[f"multi_modal_projector.{name}"] = tensor
    return renamed


def refusal(config: Mapping) -> str | None:
    """Return why a model of ours has no place in this layout, None if it has one."""
    decoder = config["model_type"].removeprefix("llava_")
    kept = "The model stays loadable here."
    if config.get("mm_injection", "tokens") != "tokens":
        return f"transformers' LLaVA has no prompts in its attention, and this model has some (mm_injection). {kept}"
    for key in ("decoder_bias", "mm_boundary_vectors", "mm_vision_projection"):
        if config.get(key):
            return f"transformers' LLaVA has no place for {key} {config[key]!r}. {kept}"
    if config.get("mm_image_position", "placeholder") != "placeholder" or config.get("image_channels", "rgb") != "rgb":
        return (
            f"transformers' LLaVA reads an image at its placeholder and in RGB; this model has mm_image_position "
            f"{config.get('mm_image_position')!r} and image_channels {config.get('image_channels')!r}. {kept}"
        )
    if config.get("mm_vision_select_feature") == "pooled":
        return f"transformers' LLaVA reads patches, and this model one pooled vector an image. {kept}"
    tower = (config.get("vision_config") or {}).get("model_type")
    if qwen3_moe.has_experts(config) and (reason := qwen3_moe.refusal(config)) is not None:
        return f"{reason} {kept}"
    if decoder == "phi":
        return f"Phi's lm_head has a bias, and transformers' LLaVA has no place for one. {kept}"
    if decoder not in DECODERS:
        return f"text model {decoder!r} is not among those tried in transformers' LLaVA: {', '.join(DECODERS)}. {kept}"
    if tower is None:
        return f"this model has no vision tower; it is a plain {decoder} and transformers' LLaVA needs one. {kept}"
    if tower not in CLASS_TOKENS:
        return f"vision tower {tower!r} is none that readers of this layout know: {', '.join(CLASS_TOKENS)}. {kept}"
    if config["mm_projector_type"] not in ("mlp2x_gelu", "linear", "identity"):
        return (
            f"connector {config['mm_projector_type']!r} is not two linear layers with an activation between them, "
            f"which is all that transformers' LLaVA has. {kept}"
        )
    size = config.get("mm_image_size")
    if size is not None and size != config["vision_config"]["image_size"]:
        return f"the tower is fed {size} pixels and built for {config['vision_config']['image_size']}. {kept}"
    merge = config.get("mm_patch_merge_type", "flat")
    if is_anyres(config) and merge != "spatial_unpad":
        return f"LlavaNext always merges crops as 'spatial_unpad'; this model has {merge!r}. {kept}"
    if not is_anyres(config) and "unpad" in merge:
        return f"transformers' Llava has no image_newline, which goes with mm_patch_merge_type {merge!r}. {kept}"
    return None


def is_anyres(config: Mapping) -> bool:
    """Tell whether images are cut into crops: LlavaNext and not Llava."""
    return str(config.get("image_aspect_ratio")).startswith("anyres")


def num_features(config: Mapping) -> int:
    """Return the number of features of one image, or of one crop."""
    vision = config["vision_config"]
    num_tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + CLASS_TOKENS[vision["model_type"]]
    return num_tokens - (strategy(config) == "default")


def _kept(config: Mapping) -> dict:
    """Return the keys of ours that the layout has no place for; of a tower its hub id, and no path of this machine."""
    kept = {key: config[key] for key in KEPT if config.get(key) is not None}
    if qwen3_moe.has_experts(config):
        kept["moe"] = config["moe"]
    tower = config.get("mm_vision_tower")
    is_hub_id = isinstance(tower, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", tower)
    return kept | ({"mm_vision_tower": tower} if is_hub_id else {})


def strategy(config: Mapping) -> str:
    """Return "default", which drops the first feature, or "full"."""
    has_class_token = CLASS_TOKENS[config["vision_config"]["model_type"]] > 0
    feature = config["mm_vision_select_feature"]
    return "default" if feature == "drop_first" or (feature == "patch" and has_class_token) else "full"


def text_decoder(config: Mapping) -> str:
    """Return the model_type of the text model that a model of ours becomes."""
    return qwen3_moe.DECODER if qwen3_moe.has_experts(config) else config["model_type"].removeprefix("llava_")


def _text_config(config: Mapping) -> dict:
    """Return the text model's fields out of all, with the names that older versions read."""
    decoder = text_decoder(config)
    known = set(CONFIG_MAPPING[decoder]().to_dict()) - NOT_TEXT
    text = {key: value for key, value in config.items() if key in known}
    rope = text.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if decoder == qwen3_moe.DECODER:
        text |= qwen3_moe.fields_to(config)
    return {"architectures": [DECODERS[decoder]], "model_type": decoder, **text}


def _tower_width(vision: Mapping) -> int:
    return vision["hidden_size"] if "hidden_size" in vision else CONFIG_MAPPING[vision["model_type"]]().hidden_size


def _connector_from(config: Mapping) -> str:
    act = config.get("projector_hidden_act", "gelu")
    kinds = {"gelu": "mlp2x_gelu", "linear": "linear"}
    if act not in kinds:
        raise ValueError(f"projector_hidden_act {act!r} has no connector here; known: {', '.join(kinds)}.")
    return kinds[act]


def _layer_from(config: Mapping) -> int:
    layer = config.get("vision_feature_layer", -2)
    layers = list(layer) if isinstance(layer, (list, tuple)) else [layer]
    if len(layers) != 1:
        raise ValueError(
            f"vision_feature_layer {layers} joins the features of {len(layers)} layers; "
            "here a tower gives those of one."
        )
    return layers[0]


def _feature_from(config: Mapping, vision: Mapping) -> str:
    has_class_token = CLASS_TOKENS.get(vision["model_type"], 1) > 0
    is_full = config.get("vision_feature_select_strategy", "default") == "full"
    if has_class_token:
        return "cls_patch" if is_full else "patch"
    # `default` drops the first token whatever it is, as MoE-LLaVA does.
    return "patch" if is_full else "drop_first"


def _first_match(name: str) -> str:
    for pattern, ours in _THEIRS:
        match = pattern.match(name)
        if match:
            return ours + name[match.end() :]
    return name
