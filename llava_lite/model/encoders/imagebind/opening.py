"""Open ImageBind from a directory (config.json, safetensors) or from a released state dict (.pth)."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_lite.checkpoints.copying import read_weights
from llava_lite.checkpoints.files import check_before_opening
from llava_lite.checkpoints.source import Checkpoint
from llava_lite.hub.errors import CONFIG, HUB_ARGUMENTS
from llava_lite.imagebind_config import BRANCHES, ImageBindConfig
from llava_lite.model.encoders.imagebind.model import ImageBindModel


def open_imagebind(
    path: str | Path, config: ImageBindConfig | None = None, modalities: list[str] | None = None, **kwargs
) -> ImageBindModel:
    """Return the encoder in eval mode, every weight accounted for.

    path: a directory or hub id, whose further keywords of `from_pretrained` are kwargs; or a file of the original's
    weights, imagebind_w3D.pth or imagebind_huge.pth, which has no points. config: None for that of the directory, and
    for the published size of a file, with the kinds that it holds. modalities: the kinds to open, None for those of
    the config; weights of others are not kept. Raises ValueError for a directory of another model, and with the names
    for weights that are missing, not known or of another size.
    """
    chosen = {} if modalities is None else {"modalities": modalities}
    if not Path(path).is_file():
        return open_directory(path, config, chosen, **kwargs)
    state = read_weights(path)
    fields = {"modalities": find_modalities(state, path)} if config is None else config.to_dict()
    config = ImageBindConfig(**(fields | chosen))
    left_out = [name for name in dict.fromkeys(BRANCHES.values()) if name not in config.branches]
    state = {name: tensor for name, tensor in state.items() if branch_of(name) not in left_out}
    with torch.device("meta"):
        model = ImageBindModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_weights(
        path,
        missing=[name for name in shapes if name not in state],
        unexpected=[name for name in state if name not in shapes],
        of_another_size=[name for name in shapes if name in state and state[name].shape != shapes[name]],
    )
    model.load_state_dict(state, assign=True)
    return model.eval()


def open_directory(path, config, chosen: dict, **kwargs) -> ImageBindModel:
    """Return the encoder of a directory or hub id, in eval mode; chosen: fields to set in its config."""
    from llava_lite.model.loading import own_accounting

    checkpoint = Checkpoint(path, **{key: value for key, value in kwargs.items() if key in HUB_ARGUMENTS})
    checkpoint.read_json(CONFIG)
    check_before_opening(checkpoint)
    fields = ImageBindConfig.get_config_dict(path, **kwargs)[0] if config is None else config.to_dict()
    if fields.get("model_type") != ImageBindConfig.model_type:
        raise ValueError(
            f"{str(path)!r} holds a model of model_type {fields.get('model_type')!r}, not ImageBind. Give the "
            "directory of one, or imagebind_w3D.pth."
        )
    config = ImageBindConfig.from_dict(fields | chosen)
    with own_accounting():
        model, info = ImageBindModel.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    left_out = [name for name in dict.fromkeys(BRANCHES.values()) if name not in model.config.branches]
    check_weights(
        path,
        missing=info["missing_keys"],
        unexpected=[name for name in info["unexpected_keys"] if branch_of(name) not in left_out],
        of_another_size=[name for name, *_ in info["mismatched_keys"]],
    )
    return model.eval()


def check_weights(path, **wrong) -> None:
    """Raise ValueError if weights are not those of the encoder; wrong: names of weights by what is wrong with them."""
    reasons = [
        f"{len(names)} {what.replace('_', ' ')}, such as {sorted(names)[:3]}" for what, names in wrong.items() if names
    ]
    if reasons:
        raise ValueError(
            f"{str(path)!r} does not hold the ImageBind that its config describes: {'; '.join(reasons)}. "
            "A file without a config is read at the published size (imagebind_huge)."
        )


def branch_of(name: str) -> str | None:
    """Return the branch of a weight: audio for modality_trunks.audio.blocks.0.norm_1.weight."""
    group, _, rest = name.partition(".")
    if group == "point_trunk":
        return "point"
    return rest.partition(".")[0] if group.startswith("modality_") else None


def find_modalities(state, path) -> list[str]:
    """Return the kinds whose branches a state dict holds; ValueError if it holds none."""
    found = {branch_of(name) for name in state}
    kinds = [kind for kind, branch in BRANCHES.items() if branch in found]
    if not kinds:
        raise ValueError(
            f"{str(path)!r} holds no ImageBind: no weight is named modality_trunks..., its first are "
            f"{list(state)[:3]}. Give imagebind_w3D.pth or imagebind_huge.pth."
        )
    return kinds
