"""Turn an error of the Hub's client into one sentence: the repository, the reason, what to do."""

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
# Keywords that find the files of a repository, and those that also hold for its base and its vision tower.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
SHARED_ARGUMENTS = ("cache_dir", "local_files_only", "token")
# Addresses that the client requests: files, and everything else about a repository.
ADDRESS = re.compile(
    r"/(?:api/models/)?(?P<repo>[^/]+(?:/[^/]+?)?)(?:\.git)?"
    r"(?:/(?:resolve|tree|revision|commit|preupload|branch|tag|refs|info)(?:/.*)?)?"
)
FILE = re.compile(r"/resolve/(?:refs/pr/\d+|[^/]+)/(?P<file>.+)")


class HubError(OSError):
    """The Hub refused a request or cannot be reached; the client's own error is the cause."""


@contextmanager
def readable_errors(name, needed_by: str | None = None, **hub):
    """Raise HubError for a failure between this machine and the Hub within the block; other errors pass.

    name: the repository or directory. needed_by: the checkpoint that names it, if another one; the message names both.
    hub: keywords of HUB_ARGUMENTS.
    """
    try:
        yield
    except Exception as error:
        message = get_message(error, str(name), needed_by, hub)
        if message is None:
            raise
        raise HubError(message) from error


def get_message(error: BaseException, name: str, needed_by: str | None, hub: dict) -> str | None:
    """Return the sentence for an error of the Hub's client; None for any other error and for a HubError."""
    chain = causes(error)
    if any(isinstance(cause, HubError) for cause in chain):
        return None
    for kind, write in KINDS:
        found = next((cause for cause in chain if isinstance(cause, kind)), None)
        if found is not None:
            repo, file = get_address(found)
            needed_by = needed_by or (name if repo not in (None, name) else None)
            needs = f" ({needed_by!r} needs it.)" if needed_by else ""
            return write(found, repo or name, file, hub) + needs
    if isinstance(error, OSError) and is_offline(hub) and not os.path.exists(name) and may_be_repository(name):
        # The client reports a file that is not in the cache as one that the repository does not have.
        return f"{name!r} is not completely in the cache: {without_links(error)}. {how_to_fetch(name, hub)}"
    return None


def find_file(path, name: str, hub: dict) -> str | None:
    """Return the local path of a file of a directory or repository, fetched if need be.

    None if it has none of that name, or if there is no network and the file is not in the cache.
    """
    try:
        return cached_file(path, name, **hub)
    except OSError as error:
        # transformers gives every reason but "there is no such file" a cause or an errno.
        is_missing = error.__cause__ is None and error.errno is None
        if not is_missing and not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
    return None


def has_file(path, name: str, hub: dict) -> bool:
    """Tell whether a directory, the cache or a repository has a file; a file in the cache is not fetched again."""
    try:
        return (
            cached_file(path, name, **{key: value for key, value in hub.items() if key != "force_download"})
            is not None
        )
    except OSError:
        return False


def may_be_repository(name: str) -> bool:
    """Tell whether a name could be one of the Hub's, and not only that of a directory."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, the error itself first."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def get_address(error) -> tuple[str | None, str | None]:
    """Return (repository, file) of a refused request, read from its address; None for a part that it does not hold."""
    response = getattr(error, "response", None)
    path = unquote(urlsplit(str(response.request.url)).path) if response is not None else ""
    path = path.removeprefix(urlsplit(constants.ENDPOINT).path)
    repo, file = ADDRESS.fullmatch(path), FILE.search(path)
    is_repo = repo is not None and not path.startswith(("/api/repos", "/api/validate"))
    return repo["repo"] if is_repo else None, file["file"] if file else None


def no_repository(error, repo: str, file, hub: dict) -> str:
    """Return the message for a repository that does not exist or is private."""
    there = f"{constants.ENDPOINT}/{repo}"
    found = f"{repo!r} is no directory here, and the Hub shows no repository of that name ({there})"
    if has_token(hub):
        return f"{found} to the owner of your token. Check the spelling; if it is private, ask its owner for access."
    return (
        f"{found}. Check the spelling; if it is private, log in with `hf auth login`, or set HF_TOKEN, as a "
        "user with access."
    )


def gated(error, repo: str, file, hub: dict) -> str:
    """Return the message for a gated repository."""
    there = f"{constants.ENDPOINT}/{repo}"
    if has_token(hub):
        return f"{repo!r} is gated, and the owner of your token has no access yet. Ask on {there}, then try again."
    return f"{repo!r} is gated: accept its terms on {there}, then log in with `hf auth login`, or set HF_TOKEN."


def no_revision(error, repo: str, file, hub: dict) -> str:
    """Return the message for a missing revision, with those that exist."""
    asked = hub.get("revision")
    asked = f" {asked!r}" if asked else " that was asked for"
    names = get_revisions(repo, hub)
    listed = f"; it has {', '.join(map(repr, names))}" if names else ""
    return f"repository {repo!r} has no revision{asked}{listed}. Give a branch, a tag or a full commit id."


def no_file(error, repo: str, file, hub: dict) -> str:
    """Return the message for a missing file."""
    revision = hub.get("revision") or "main"
    there = f"{constants.ENDPOINT}/{repo}/tree/{revision}"
    return f"repository {repo!r} has no file {file!r} in revision {revision!r}; {there} lists those it has."


def refused(error, repo: str, file, hub: dict) -> str:
    """Return the message for another status of the server."""
    status = error.response.status_code
    answer = f" The Hub answers: {error.server_message}" if getattr(error, "server_message", None) else ""
    if status == 401 and not has_token(hub):
        return (
            f"the Hub allows this for {repo!r} only to logged-in users: log in with `hf auth login`, or set HF_TOKEN."
        )
    if status == 401:
        return (
            f"the Hub does not take the token for {repo!r}: it is mistyped, or has expired. Make one on "
            f"{constants.ENDPOINT}/settings/tokens and log in with `hf auth login`."
        )
    if status == 403:
        return (
            f"the owner of your token may not do this to {repo!r}. Use the token of a user with write "
            f"access, or open a pull request (create_pr=True).{answer}"
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
    return f"the Hub refused what was asked of {repo!r} ({status}).{answer or f' {error}'}"


def unreachable(error, repo: str, file, hub: dict) -> str:
    """Return the message for a Hub that cannot be reached, with nothing in the cache."""
    if is_offline(hub):
        return f"{repo!r} is not in the cache, and asking the Hub is switched off. {how_to_fetch(repo, hub)}"
    reason = causes(error)[-1]
    return (
        f"{repo!r} is not in the cache, and the Hub at {constants.ENDPOINT} cannot be reached "
        f"({type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else 'no further message'}). Check "
        "the network and its proxy, or give the path of a directory that holds the model."
    )


def no_answer(error, repo: str, file, hub: dict) -> str:
    """Return the message for a request that got no answer, such as one of an upload."""
    reason = str(error).splitlines()[0] if str(error) else "no further message"
    return (
        f"the Hub at {constants.ENDPOINT} cannot be reached for {repo!r} ({type(error).__name__}: {reason}). Check "
        "the network and its proxy."
    )


# Of the client's library for HTTP, which is another one from version to version.
HTTP_ERROR = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
# In this order: a status of the server says more than "not in the cache".
KINDS = (
    (GatedRepoError, gated),
    (RepositoryNotFoundError, no_repository),
    (RevisionNotFoundError, no_revision),
    (RemoteEntryNotFoundError, no_file),
    (HfHubHTTPError, refused),
    ((LocalEntryNotFoundError, OfflineModeIsEnabled), unreachable),
    (HTTP_ERROR, no_answer),
)


def how_to_fetch(repo: str, hub: dict) -> str:
    """Return how to get a repository into the cache."""
    switch = "without local_files_only=True" if hub.get("local_files_only") else "with HF_HUB_OFFLINE unset"
    return f"Fetch it once where there is a network (`hf download {repo}`), or run {switch}."


def has_token(hub: dict) -> bool:
    """Tell whether requests carry a token."""
    token = hub.get("token")
    return token is not False and bool(token if isinstance(token, str) else get_token())


def is_offline(hub: dict) -> bool:
    """Tell whether only the cache is read."""
    return bool(hub.get("local_files_only")) or constants.HF_HUB_OFFLINE


def get_revisions(repo: str, hub: dict) -> list[str]:
    """Return the branches and tags of a repository, [] if they cannot be listed."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi(token=hub.get("token")).list_repo_refs(repo)
    except Exception:
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def without_links(error: BaseException) -> str:
    """Return the first sentence of an error of transformers, without the address after it."""
    return str(error).splitlines()[0].split(". Checkout ")[0].rstrip(".")
