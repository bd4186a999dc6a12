"""BLIP-2's image side (Li et al. 2023, arXiv 2301.12597): a ViT-g and a Q-Former, pixels to 32 features of width 768.

The modules and the names of their weights are those of transformers' Blip2Model; the language model, most of a
checkpoint, is neither built nor read.
"""

from __future__ import annotations

from fnmatch import fnmatch

import torch
from safetensors import safe_open
from torch import nn
from transformers import Blip2Config, Blip2QFormerModel, Blip2VisionModel, PreTrainedModel
from transformers import initialization as init

from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.files import PICKLED, SAFE, find_weight_files
from llava_lite.checkpoints.source import Checkpoint

WANTED = ("vision_model.*", "qformer.*", "query_tokens")
# The text side of a Q-Former that was trained to match images with texts.
UNREAD = ("qformer.embeddings.*",)


class Blip2Encoder(PreTrainedModel):
    """The image side of a BLIP-2; of the config it reads vision_config, qformer_config and num_query_tokens."""

    config_class = Blip2Config
    base_model_prefix = "blip"
    main_input_name = "pixel_values"
    _no_split_modules = ("Blip2EncoderLayer", "Blip2QFormerLayer")
    _supports_sdpa = True

    def __init__(self, config: Blip2Config):
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.post_init()

    @property
    def hidden_size(self) -> int:
        """Return the width C of a feature."""
        return self.config.qformer_config.hidden_size

    @property
    def num_features(self) -> int:
        """Return the features of an image."""
        return self.config.num_query_tokens

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the features [N, Q, C] of images [N, 3, H, W], Q query tokens."""
        patches = self.vision_model(pixel_values=pixel_values).last_hidden_state
        # Checkpoints in half precision may keep the Q-Former in float32, as transformers does.
        patches = patches.to(self.query_tokens.dtype)
        queries = self.query_tokens.expand(len(patches), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Blip2Encoder):
            init.normal_(module.query_tokens, std=self.config.initializer_range)


def open_blip2(name, config: Blip2Config | None = None, **hub) -> Blip2Encoder:
    """Return the image side of a BLIP-2 checkpoint in eval mode, in the dtype that it is stored in.

    name: directory or hub id of a Blip2Model or Blip2ForConditionalGeneration; only the shards that hold these weights
    are fetched, and only these weights are read. config: None for that of the checkpoint. Raises ValueError for a
    checkpoint of another model, and with the names for weights that are missing, not known or of another size.
    """
    checkpoint = Checkpoint(name, **hub)
    if config is None:
        checkpoint.require_config()
        if checkpoint.fields.get("model_type") != Blip2Config.model_type:
            raise ValueError(
                f"{name!r} holds a model of model_type {checkpoint.fields.get('model_type')!r}, not BLIP-2. Give one "
                "such as Salesforce/blip2-opt-2.7b."
            )
        config = Blip2Config.from_dict(checkpoint.fields)
    state = read_image_side(checkpoint)
    with torch.device("meta"):
        model = Blip2Encoder(config)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    check_names(name, shapes, state)
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_image_side(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint that WANTED names; OSError if it has no weights."""
    for full_name in (SAFE, PICKLED):
        files = find_weight_files(checkpoint, full_name, is_wanted)
        if files:
            return {key: tensor for file in files for key, tensor in read_wanted(file).items()}
    raise OSError(f"{checkpoint.path!r} has no weights; looked for {SAFE} and {PICKLED}, in one file or in shards.")


def read_wanted(file: str) -> dict[str, torch.Tensor]:
    """Return the weights of one file that WANTED names; of a pickle, which is mapped, the others are not touched."""
    if not file.endswith(".safetensors"):
        return {key: tensor for key, tensor in read_weights(file).items() if is_wanted(key)}
    with safe_open(file, framework="pt") as stored:
        return {key: stored.get_tensor(key) for key in stored.keys() if is_wanted(key)}  # noqa: SIM118


def is_wanted(key: str) -> bool:
    """Tell whether a weight belongs to the image side."""
    return any(fnmatch(key, name) for name in WANTED) and not any(fnmatch(key, name) for name in UNREAD)


def check_names(name, shapes: dict, state: dict) -> None:
    """Raise ValueError if weights are not exactly those of the encoder."""
    wrong = {
        "missing": [key for key in shapes if key not in state],
        "unexpected": [key for key in state if key not in shapes],
        "of another size": [key for key in shapes if key in state and state[key].shape != shapes[key]],
    }
    reasons = [f"{len(keys)} {what}, such as {sorted(keys)[:3]}" for what, keys in wrong.items() if keys]
    if reasons:
        raise ValueError(f"{name!r} does not hold the BLIP-2 that its config describes: {'; '.join(reasons)}.")
