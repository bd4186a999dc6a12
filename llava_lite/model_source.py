"""Turn the name of a model, as a person wrote it, into an early answer: it can be opened, or one sentence why not."""

from __future__ import annotations

import difflib
import os

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llava_lite.hub import CONFIG, HubError, is_offline, may_be_repository, unreachable

# What somebody who opened a repository has fetched of it, at least one: of a tower perhaps its weights alone.
FETCHED = (
    CONFIG,
    "model.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "pytorch_model.bin",
)
LANGUAGE_MODEL, VISION_TOWER = "lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"


def check_source(name, flag: str = "", example: str = LANGUAGE_MODEL, **hub) -> None:
    """Raise OSError at once if `name` is neither a directory of this machine nor a repository that can be asked for.

    flag: what the name was given to, such as --model_name_or_path; it begins the sentence. example: a hub id of the
    kind that is wanted. hub: the keywords of `hub_arguments`. A directory costs no request, and a repository in the
    cache none; any other is asked for once, with the timeout of HF_HUB_ETAG_TIMEOUT, since the client's own look-ups
    each repeat for half a minute without a network.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return
    said, near = f"{flag} {name!r}".lstrip(), did_you_mean(name)
    if os.path.isfile(name):
        raise NotADirectoryError(f"{said} is a file; give the directory that holds it, with its config.json.")
    if is_path(name):
        advice = near or f" Give the path of one, or a hub id such as {example}."
        raise FileNotFoundError(f"{said}: there is no such directory.{advice}")
    if not is_cached(name, hub):
        reason = why_out_of_reach(name, hub)
        if reason:
            raise HubError(f"{said}: there is no such directory.{near} As a repository of the Hub: {reason}")


def check_directory(path: str | None, flag: str) -> None:
    """Raise OSError if what a flag names is no directory of this machine; None passes."""
    if path is None or os.path.isdir(path):
        return
    if os.path.exists(path):
        raise NotADirectoryError(f"{flag} {path!r} is a file; give a directory.")
    raise FileNotFoundError(f"{flag} {path!r}: there is no such directory.{did_you_mean(path)}")


def is_path(name: str) -> bool:
    """Tell whether a name can only be meant as a path of this machine."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or not may_be_repository(name)


def did_you_mean(name: str) -> str:
    """Return a sentence with what stands beside a path that is not there under a name like it; "" for nothing."""
    expanded = os.path.expanduser(name).rstrip("/")
    if os.path.isdir(expanded):
        return f" Write {expanded!r}."
    parent, last = os.path.split(expanded)
    if not os.path.isdir(parent or "."):
        return ""
    near = difflib.get_close_matches(last, os.listdir(parent or "."), n=2)
    return f" Did you mean {' or '.join(repr(os.path.join(parent, one)) for one in near)}?" if near else ""


def is_cached(name: str, hub: dict) -> bool:
    """Tell whether the cache knows a file of a repository, or that it has none of that name."""
    if hub.get("force_download"):
        return False
    where = {key: hub.get(key) for key in ("cache_dir", "revision")}
    paths = [os.path.join(hub.get("subfolder") or "", file) for file in FETCHED]
    return any(try_to_load_from_cache(name, path, **where) is not None for path in paths)


def why_out_of_reach(name: str, hub: dict) -> str | None:
    """Return the sentence for a Hub that cannot be reached; None where it answers, whatever the answer."""
    if is_offline(hub):
        return unreachable(None, name, None, hub)
    try:
        HfApi(token=hub.get("token")).model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        # The Hub is there; what it refuses is told by whoever asks for the files.
        return None
    except Exception as error:
        # No answer; of which kind depends on the HTTP client, another one in each major version of huggingface_hub.
        return unreachable(error, name, None, hub)
    return None
