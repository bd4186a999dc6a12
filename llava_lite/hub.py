"""Turn what the Hub's client raises into a sentence that names the repository and says what to do."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import cached_file

CONFIG = "config.json"
# What a caller says of one repository, and what of that holds for the others that it names (base, vision tower).
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
EVERYWHERE = ("cache_dir", "local_files_only", "token")
# Addresses that the client asks: files, and everything else about a repository.
ADDRESS = re.compile(
    r"/(?:api/models/)?(?P<repo>[^/]+(?:/[^/]+?)?)(?:\.git)?"
    r"(?:/(?:resolve|tree|revision|commit|preupload|branch|tag|refs|info)(?:/.*)?)?"
)
FILE = re.compile(r"/resolve/(?:refs/pr/\d+|[^/]+)/(?P<file>.+)")


class HubError(OSError):
    """What the Hub refused or could not give, in words; the client's own error is its cause."""


def hub_arguments(arguments: dict) -> dict:
    """Return those of some keywords that say where and how to look in the Hub."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}


def everywhere(hub: dict) -> dict:
    """Return what a caller said of one repository and means for the others too: its revision is its own."""
    return {name: value for name, value in hub.items() if name in EVERYWHERE}


@contextmanager
def in_words(name, **hub):
    """Raise HubError for what goes wrong between this machine and the Hub within the block; all else passes.

    name: the repository or folder that was asked for; where another one failed (a base, a tower), both are named.
    hub: what the caller said of it: revision, token, local_files_only, cache_dir.
    """
    try:
        yield
    except Exception as error:
        words = told(error, str(name), hub)
        if words is None:
            raise
        raise HubError(words) from error


def told(error: BaseException, name: str, hub: dict) -> str | None:
    """Return what an error of the Hub's client means, None for any other error and for one that is told already."""
    chain = causes(error)
    if any(isinstance(cause, HubError) for cause in chain):
        return None
    for kind, words in KINDS:
        found = next((cause for cause in chain if isinstance(cause, kind)), None)
        if found is not None:
            repo, file = address_of(found)
            needs = f" ({name!r} needs it.)" if repo not in (None, name) else ""
            return words(found, repo or name, file, hub) + needs
    if isinstance(error, OSError) and is_offline(hub) and not os.path.exists(name) and may_be_repository(name):
        # Of a file that is not in the cache the client says only that the repository has none.
        return f"{name!r} is not in the cache as a whole: {without_links(error)}. {how_to_fetch(name, hub)}"
    return None


def may_be_repository(name: str) -> bool:
    """Tell whether a name could be one of the Hub's, and not only that of a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it, the last first."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def address_of(error) -> tuple[str | None, str | None]:
    """Return (repository, file) that a refused request asked for, as far as its address says."""
    response = getattr(error, "response", None)
    path = unquote(urlsplit(str(response.request.url)).path) if response is not None else ""
    path = path.removeprefix(urlsplit(constants.ENDPOINT).path)
    repo, file = ADDRESS.fullmatch(path), FILE.search(path)
    is_repo = repo is not None and not path.startswith(("/api/repos", "/api/validate"))
    return repo["repo"] if is_repo else None, file["file"] if file else None


def no_repository(error, repo: str, file, hub: dict) -> str:
    """Say that a repository does not exist, or is hidden."""
    there = f"{constants.ENDPOINT}/{repo}"
    found = f"{repo!r} is no directory here, and the Hub shows no repository of that name ({there})"
    if has_token(hub):
        return f"{found} to the owner of your token. Check the spelling; if it is private, ask its owner for access."
    return (
        f"{found}. Check the spelling; if it is private, log in with `hf auth login`, or set HF_TOKEN, as somebody "
        "who may see it."
    )


def gated(error, repo: str, file, hub: dict) -> str:
    """Say where to ask for access."""
    there = f"{constants.ENDPOINT}/{repo}"
    if has_token(hub):
        return f"{repo!r} is gated, and the owner of your token has no access yet. Ask on {there}, then try again."
    return f"{repo!r} is gated: accept its terms on {there}, then log in with `hf auth login`, or set HF_TOKEN."


def no_revision(error, repo: str, file, hub: dict) -> str:
    """Say which revisions there are."""
    asked = hub.get("revision")
    asked = f" {asked!r}" if asked else " that was asked for"
    names = revisions_of(repo, hub)
    listed = f"; it has {', '.join(map(repr, names))}" if names else ""
    return f"repository {repo!r} has no revision{asked}{listed}. Give a branch, a tag or a whole commit id."


def no_file(error, repo: str, file, hub: dict) -> str:
    """Say which file is missing."""
    revision = hub.get("revision") or "main"
    there = f"{constants.ENDPOINT}/{repo}/tree/{revision}"
    return f"repository {repo!r} has no file {file!r} in revision {revision!r}; {there} lists those it has."


def refused(error, repo: str, file, hub: dict) -> str:
    """Say what a status of the server means."""
    status = error.response.status_code
    says = f" The Hub says: {error.server_message}" if getattr(error, "server_message", None) else ""
    if status == 401 and not has_token(hub):
        return (
            f"the Hub asks who you are before it does this to {repo!r}: log in with `hf auth login`, or set HF_TOKEN."
        )
    if status == 401:
        return (
            f"the Hub does not take the token for {repo!r}: it is mistyped, or has expired. Make one on "
            f"{constants.ENDPOINT}/settings/tokens and log in with `hf auth login`."
        )
    if status == 403:
        return (
            f"the owner of your token may not do this to {repo!r}. Use a token with the right to write, of somebody "
            f"who may write there, or open a pull request (create_pr=True).{says}"
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        pause = f"in {wait} seconds" if wait else "in some minutes"
        login = "" if has_token(hub) else "; logged in (`hf auth login`) one may ask more often"
        return f"the Hub asks for a pause (429, too many requests) at {repo!r}. Try again {pause}{login}."
    if status >= 500:
        return (
            f"the Hub has trouble of its own ({status}) at {repo!r}. Try again later; what was fetched so far is kept "
            "in the cache, from which local_files_only=True opens it."
        )
    return f"the Hub refused what was asked of {repo!r} ({status}).{says or f' {error}'}"


def unreachable(error, repo: str, file, hub: dict) -> str:
    """Say that there is no way to the Hub and nothing in the cache."""
    if is_offline(hub):
        return f"{repo!r} is not in the cache, and asking the Hub is switched off. {how_to_fetch(repo, hub)}"
    reason = causes(error)[-1]
    return (
        f"{repo!r} is not in the cache, and the Hub at {constants.ENDPOINT} cannot be reached "
        f"({type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else 'no more is known'}). Check the "
        "network and its proxy, or give the path of a directory that holds the model."
    )


def reach_config(name, hub: dict) -> bool:
    """Tell whether a repository or folder has a config.json; unlike a look for any other file this may fail aloud."""
    return cached_file(str(name), CONFIG, **hub) is not None


def require_config(name, hub: dict) -> None:
    """Raise HubError if a repository holds no config.json; of a folder, whoever opens it says what it lacks."""
    name = str(name)
    if not os.path.isdir(name) and not reach_config(name, hub):
        raise HubError(no_file(None, name, os.path.join(hub.get("subfolder") or "", CONFIG), hub))


# The first kind that occurs anywhere among the causes; a status says more than "not in the cache".
KINDS = (
    (GatedRepoError, gated),
    (RepositoryNotFoundError, no_repository),
    (RevisionNotFoundError, no_revision),
    (RemoteEntryNotFoundError, no_file),
    (HfHubHTTPError, refused),
    ((LocalEntryNotFoundError, OfflineModeIsEnabled), unreachable),
)


def how_to_fetch(repo: str, hub: dict) -> str:
    """Say how a repository gets into the cache."""
    switch = "without local_files_only=True" if hub.get("local_files_only") else "with HF_HUB_OFFLINE unset"
    return f"Fetch it once where there is a network (`hf download {repo}`), or run {switch}."


def has_token(hub: dict) -> bool:
    """Tell whether the Hub was told who is asking."""
    token = hub.get("token")
    return token is not False and bool(token if isinstance(token, str) else get_token())


def is_offline(hub: dict) -> bool:
    """Tell whether only the cache may be read."""
    return bool(hub.get("local_files_only")) or constants.HF_HUB_OFFLINE


def revisions_of(repo: str, hub: dict) -> list[str]:
    """Return the branches and tags of a repository, [] if they cannot be had."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi(token=hub.get("token")).list_repo_refs(repo)
    except Exception:
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def without_links(error: BaseException) -> str:
    """Return the first sentence of an error of transformers, which goes on with an address."""
    return str(error).splitlines()[0].split(". Checkout ")[0].rstrip(".")
