"""The Hub, for reading: one cache, and errors in plain words without tokens and signed addresses."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUB = "hf-hub:"
REASONS = {
    401: "the Hub does not accept the token. `hf auth login` stores another one, and HF_TOKEN goes before what is stored",
    403: "the token may not do this: it has to be one that may write to this organization or user",
    404: "there is no such thing on the Hub, or the token may not see it",
    409: "it exists already, although it was not to be seen a moment ago: somebody else is at work there, or the token "
    "does not show everything",
    412: "somebody committed in between. Without --yes the same command shows what it would change now",
    429: "the Hub takes no more requests for a while; wait some minutes",
    507: "the quota of this organization or user is used up: its settings on the Hub say how much there is",
}
STORAGE = (
    "the storage refused the address that the Hub had signed: it expires after some minutes, and a wrong clock or a \
proxy that changes requests spoils it. The token is not the cause: run the command again"
)
GATED = "its owner has to let you in: ask on the repository's page, then `hf auth login`"
OFFLINE = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it"


def fetch(source: str, *names: str) -> Path:
    """The folder in the Hub's cache with those files of a repository that there are.

    Args:
        source: `hf-hub:organization/name[@revision]`.
        names: of the files.

    Raises:
        ValueError: the repository cannot be reached.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(names)))
    except Exception as error:  # the client raises what its libraries raise, and whatever a broken answer leads to
        raise ValueError(f"cannot fetch {source}: {not_fetched(error, revision)}") from None


def not_fetched(error: BaseException, revision: str) -> str:
    """Why a repository could not be fetched, for people, and what to do.

    Args:
        revision: that was asked for; empty for the newest commit.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return GATED
    if isinstance(error, RevisionNotFoundError):
        return f"it has no tag, branch or commit {revision}: leave out @{revision} for the newest"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"it is not in the cache, and {OFFLINE}"
    return f"{explain(error)}. Check the name, the network, and for a private repository `hf auth login`"


@contextmanager
def in_plain_words(action: str) -> Iterator[None]:
    """Turns whatever the client raises into a ValueError that says what failed, why, and what can be done.

    No traceback leads on to the client's own: that one holds the request, which holds the token.
    """
    try:
        yield
    except Exception as error:  # the client raises what its libraries raise, and whatever a broken answer leads to
        raise ValueError(f"{action} failed: {explain(error)}") from None


def explain(error: BaseException) -> str:
    """Why a call to the client failed, for people. Neither a token nor the query of an address is in it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    # What the client raises when there is no answer; its library is httpx or httpx2, depending on the version.
    client_error: type[Exception] = HfHubHTTPError.__mro__[1]
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return OFFLINE
        if isinstance(one, HfHubHTTPError):
            # Of a repository that is not there, or not to be seen, the Hub says either 401 or 404.
            status = 404 if isinstance(one, RepositoryNotFoundError) else one.response.status_code
            reason = REASONS.get(status, "the Hub has trouble of its own; try later" if status >= 500 else "refused")
            if isinstance(one, GatedRepoError):
                reason = GATED
            elif status in (400, 401, 403) and get_token() and "authorization" not in one.response.request.headers:
                reason = STORAGE  # such a request carries its permission in the address
            return f"{reason} (HTTP {status}: {redacted(one.server_message or str(one))})"
        if isinstance(one, OSError) and one.errno == errno.ENOSPC:
            return f"the disk is full ({one.filename or tempfile.gettempdir()}): make room, or set TMPDIR and HF_HOME"
        if isinstance(one, client_error | ConnectionError):  # the latter from xet
            return (
                f"no answer from {constants.ENDPOINT} ({type(one).__name__}: {redacted(str(one))}). Check the network, "
                "proxies and HF_ENDPOINT"
            )
    return f"{type(error).__name__}: {redacted(str(error))}"


def redacted(text: str) -> str:
    """One line without the token and without what follows a `?` in an address, which may be a signature."""
    from huggingface_hub import get_token

    for token in {get_token(), os.environ.get("HF_TOKEN")} - {None, ""}:
        assert token is not None
        text = text.replace(token, "(token)")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return " ".join(text.split())[:300]
