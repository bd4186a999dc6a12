"""Turn the value of --deepspeed into a file: a name stands for one of the configs that are part of the package."""

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

DIRECTORY = Path(__file__).resolve().parent / "configs"
# Equal to the files at the top of the repository and in scripts/; a test compares them.
CONFIGS = ("zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_nvme")


def resolve_config(value):
    """Return the path that a name of `CONFIGS` stands for; any other value of --deepspeed as it is.

    A file of that very name in the working directory comes first. The log says which of them is read.
    """
    if value not in CONFIGS:
        return value
    packaged = DIRECTORY / f"{value}.json"
    if os.path.isfile(value):
        logger.warning("--deepspeed %s: reading the file %s, not %s.", value, os.path.abspath(value), packaged)
        return value
    logger.info("--deepspeed %s: reading %s.", value, packaged)
    return str(packaged)


def deepspeed_advice() -> str:
    """Return the sentence that lists what --deepspeed takes."""
    text = '\'{"zero_optimization": {"stage": 2}}\''
    return f"Give one of {', '.join(CONFIGS)}; or the path of a DeepSpeed JSON; or its text: {text}."


def read_deepspeed(config):
    """Return a DeepSpeed config (path, JSON text, dict or None) as a dict."""
    if not config:
        return {}
    if isinstance(config, dict):
        return config
    is_text = config.lstrip().startswith("{")
    if not is_text and not Path(config).is_file():
        raise ValueError(f"--deepspeed {config}: there is no such file. {deepspeed_advice()}")
    try:
        found = json.loads(config if is_text else Path(config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed {config} is no JSON ({error}). {deepspeed_advice()}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--deepspeed {config} holds a {type(found).__name__} and no fields. {deepspeed_advice()}")
    return found
