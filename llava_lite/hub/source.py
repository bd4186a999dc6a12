"""Check early whether a directory or repository can be opened; the error is one sentence."""

from __future__ import annotations

import difflib
import os

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llava_lite.hub.errors import CONFIG, HubError, is_offline, may_be_repository, unreachable

# At least one of these is in the cache of whoever opened a repository; of a tower perhaps the weights alone.
FETCHED = (
    CONFIG,
    "model.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "pytorch_model.bin",
)
LANGUAGE_MODEL, VISION_TOWER = "lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"


def check_source(name, flag: str = "", example: str = LANGUAGE_MODEL, **hub) -> None:
    """Raise OSError at once if `name` is neither a local directory nor a repository in the cache or on the Hub.

    flag: where the name was given, such as --model_name_or_path; it begins the message. example: a hub id of the kind
    that is wanted. hub: keywords of HUB_ARGUMENTS. A directory or a cached repository costs no request, any other
    one, with the timeout of HF_HUB_ETAG_TIMEOUT: without a network the client's own requests repeat for half a minute.
    """
    name = os.fspath(name)
    # The released file of a vision encoder, ImageBind's, is one too.
    if os.path.isdir(name) or (example == VISION_TOWER and name.endswith(".pth") and os.path.isfile(name)):
        return
    start, near = f"{flag} {name!r}".lstrip(), did_you_mean(name)
    if os.path.isfile(name):
        raise NotADirectoryError(f"{start} is a file; give the directory that holds it, with its config.json.")
    if is_path(name):
        advice = near or f" Give the path of one, or a hub id such as {example}."
        raise FileNotFoundError(f"{start}: there is no such directory.{advice}")
    if not is_cached(name, hub):
        reason = why_unreachable(name, hub)
        if reason:
            raise HubError(f"{start}: there is no such directory.{near} As a repository of the Hub: {reason}")


def check_directory(path: str | None, flag: str) -> None:
    """Raise OSError if the value of a flag is no local directory; None passes."""
    if path is None or os.path.isdir(path):
        return
    if os.path.exists(path):
        raise NotADirectoryError(f"{flag} {path!r} is a file; give a directory.")
    raise FileNotFoundError(f"{flag} {path!r}: there is no such directory.{did_you_mean(path)}")


def is_path(name: str) -> bool:
    """Tell whether a name can only be a local path."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or not may_be_repository(name)


def check_revision(name: str | None, revision: str | None) -> None:
    """Raise ValueError for a revision of what lies on this machine, which has one state alone."""
    if name is not None and revision is not None and os.path.exists(name):
        raise ValueError(
            f"--revision {revision} is a branch, tag or commit of a repository, and {name} is on this machine. Leave "
            "it out, or name the repository."
        )


def did_you_mean(name: str) -> str:
    """Return a sentence with directory entries whose names are close to a path that does not exist; "" for none."""
    expanded = os.path.expanduser(name).rstrip("/")
    if os.path.isdir(expanded):
        return f" Write {expanded!r}."
    parent, last = os.path.split(expanded)
    if not os.path.isdir(parent or "."):
        return ""
    near = difflib.get_close_matches(last, os.listdir(parent or "."), n=2)
    return f" Did you mean {' or '.join(repr(os.path.join(parent, one)) for one in near)}?" if near else ""


def is_cached(name: str, hub: dict) -> bool:
    """Tell whether the cache holds a file of a repository, or a note that the file does not exist."""
    if hub.get("force_download"):
        return False
    where = {key: hub.get(key) for key in ("cache_dir", "revision")}
    paths = [os.path.join(hub.get("subfolder") or "", file) for file in FETCHED]
    return any(try_to_load_from_cache(name, path, **where) is not None for path in paths)


def why_unreachable(name: str, hub: dict) -> str | None:
    """Return the message for a Hub that cannot be reached; None if it answers, whatever the answer."""
    if is_offline(hub):
        return unreachable(None, name, None, hub)
    try:
        HfApi(token=hub.get("token")).model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        # The Hub answers; a refusal is reported where the files are requested.
        return None
    except Exception as error:
        # No answer. The class depends on the HTTP client, which differs between major versions of huggingface_hub.
        return unreachable(error, name, None, hub)
    return None
