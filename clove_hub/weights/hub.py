"""Reading from the Hub: one cache, and plain error messages without tokens and signed addresses."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB = "hf-hub:"
REASONS = {
    401: "the Hub does not accept the token. `hf auth login` stores another one; HF_TOKEN takes precedence over it",
    403: "the token does not permit this: it must have write access to this organization or user",
    404: "it does not exist on the Hub, or the token has no access to it",
    409: "another change on the Hub conflicts with this one at the moment: run the command again",
    412: "somebody else committed in the meantime, so nothing was committed. Run the command without --yes to see what is "
    "there now and what would change",
    429: "the Hub accepts no more requests for a while; wait some minutes",
    507: "the quota of this organization or user is used up: its settings on the Hub show how much there is",
}
EXPIRED = "the token has expired: create another one on the Hub's page Settings > Access Tokens, then `hf auth login` or set HF_TOKEN"
FULL = (
    "the storage of this user or organization on the Hub is used up, or a file is larger than the Hub accepts: "
    "delete what is not needed, or get more on the Hub's page Settings > Billing"
)
GATED = "its owner must grant you access: request it on the repository's page, then `hf auth login`"
DISABLED = "the Hub has disabled this repository; its page gives the reason"
STORAGE = {
    403: "the storage refused an address that the Hub had signed. The token is not the cause: the signature has "
    "expired (is this machine's clock right?), or a proxy changes requests. Run the command again",
    404: "the storage lacks a file that the Hub lists; run the command again",
}
"""Hosts of the Hub's large files, with signed addresses; they never receive the token."""
TROUBLE = "the Hub has an internal error; try again later"
OFFLINE = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it"


def fetch(source: str, *names: str) -> Path:
    """The folder in the Hub's cache with the requested files that exist in a repository.

    Args:
        source: `hf-hub:organization/name[@revision]`.
        names: names of the files.

    Raises:
        ValueError: the repository cannot be reached.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = source.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(names)))
    except Exception as error:  # the client raises its libraries' errors, and any that a broken response causes
        raise ValueError(f"cannot fetch {source}: {not_fetched(error, revision)}") from None


def not_fetched(error: BaseException, revision: str) -> str:
    """A readable message why a repository could not be fetched, and what to do.

    Args:
        revision: the requested revision; empty for the newest commit.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return f"it has no tag, branch or commit {revision}: leave out @{revision} for the newest"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"it is not in the cache, and {OFFLINE}"
    reason = explain(error)
    if reason.startswith((REASONS[404], "HFValidationError")):
        reason += ". Check the name, the network, and for a private repository `hf auth login`"
    return reason


@contextmanager
def in_plain_words(action: str, conflict: str = REASONS[409]) -> Iterator[None]:
    """Convert any error of the client to a ValueError that says what failed, why, and what to do.

    The client's error is not chained: it holds the request, which holds the token.

    Args:
        conflict: the meaning of status 409 from the Hub.
    """
    try:
        yield
    except Exception as error:  # the client raises its libraries' errors, and any that a broken response causes
        raise ValueError(f"{action} failed: {explain(error, conflict)}") from None


def explain(error: BaseException, conflict: str = REASONS[409]) -> str:
    """A readable message why a call to the client failed, without tokens and queries of addresses."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # The client's error if there is no response; its library is httpx or httpx2, depending on the version.
    client_error: type[Exception] = HfHubHTTPError.__mro__[1]
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return OFFLINE
        if isinstance(one, HfHubHTTPError):
            told = one.server_message or one.response.headers.get("X-Error-Message") or str(one)
            return f"{_reason(one, told, conflict)} (HTTP {one.response.status_code}: {redacted(told)})"
        if isinstance(one, OSError) and one.errno == errno.ENOSPC:
            return f"the disk is full ({one.filename or tempfile.gettempdir()}): free some space, or set TMPDIR and HF_HOME"
        if isinstance(one, client_error | ConnectionError):  # the latter from xet, for any response of the storage
            if answered := re.search(r"HTTP status (?:client|server) error \((\d{3})", str(one)):
                return f"{_of_storage(int(answered[1]))} ({redacted(str(one))})"
            return (
                f"no answer from {constants.ENDPOINT} ({type(one).__name__}: {redacted(str(one))}). Check the network, "
                "proxies and HF_ENDPOINT"
            )
    return f"{type(error).__name__}: {redacted(str(error))}"


def _reason(error: HfHubHTTPError, told: str, conflict: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError

    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return GATED
    if isinstance(error, DisabledRepoError):
        return DISABLED
    if expired(error):
        return EXPIRED
    if status in (402, 413, 507) or (status == 403 and re.search(r"storage.*(limit|quota)|quota", told, re.IGNORECASE)):
        return FULL
    if error.response.url.host != urlsplit(constants.ENDPOINT).hostname:
        return _of_storage(status)
    if isinstance(error, RepositoryNotFoundError):  # the Hub's status for it is 401 or 404
        status = 404
    if status == 409:
        return conflict
    return REASONS.get(status, TROUBLE if status >= 500 else "refused")


def _of_storage(status: int) -> str:
    return STORAGE.get(
        status, "the storage of the Hub has an internal error; try again later" if status >= 500 else STORAGE[403]
    )


def expired(error: HfHubHTTPError) -> bool:
    """Whether the Hub reports an expired token, which the client treats as a repository that does not exist."""
    told = f"{error.server_message} {error.response.headers.get('X-Error-Message')}"
    return error.response.status_code == 401 and "expired" in told


def redacted(text: str) -> str:
    """The text in one line, without the token and without queries of addresses, which may be signatures."""
    from huggingface_hub import get_token

    for token in {get_token(), os.environ.get("HF_TOKEN")} - {None, ""}:
        assert token is not None
        text = text.replace(token, "(token)")
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
    return " ".join(text.split())[:300]
