"""One repository on the Hub: its content, the content to publish, and the operations of publishing.

The client itself retries listings, downloads and uploads. The calls that it makes only once are retried here once if
the Hub answers 429 or 503, after the time that it asks for; a commit only if main has not moved, because a blind retry
could overwrite another commit. Every failure becomes a ValueError with a plain message, without the client's own
traceback, which holds the request and so the token.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from clove_hub.runs import sha256
from clove_hub.weights.hub import expired, in_plain_words

log = logging.getLogger(__name__)
T = TypeVar("T")

ENDPOINT = constants.ENDPOINT
LOOKS = (1, 2, 4, 8)
"""Seconds between looks at what the Hub has agreed to and may not show yet."""
LONGEST_PAUSE = 300
"""Seconds. A Hub that asks for more is not waited for."""
SAME_MODEL = ("method", "backbone", "model")
"""What all versions in one repository have in common, of what is told in `Artifact.told_in`."""


@dataclass(frozen=True)
class File:
    """One file to publish."""

    content: Path | bytes

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else sha256(self.content)

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def git_id(self) -> str:
        """What git calls this content, and so the Hub, unless it stores the file as a large one."""
        digest = hashlib.sha1(b"blob %d\0" % self.size)
        digest.update(self.read())
        return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """What is published in one commit."""

    what: str
    """For messages: `the bundle photos/bundle`."""
    files: Mapping[str, File]
    """By their name in the repository. Nothing else is ever uploaded."""
    told_in: str
    """The file that identifies the model; a repository without it was created by others."""
    model: Mapping[str, Any]
    """What it says, of SAME_MODEL."""
    library: str | None = None
    """What loads it, and the card's library_name: `timm`, or `clove-hub` for fine-tuned models; None for a run's state."""


@dataclass(frozen=True)
class Remote:
    """The state of a repository at one time."""

    private: bool
    head: str | None
    """The commit that main is at; None if there is none yet."""
    tags: Mapping[str, str]
    """The commit of each."""
    files: Mapping[str, str]
    """Of `head`: the sha256 of each that is large, and of the others what git calls their content."""


def differences(artifact: Artifact, files: Mapping[str, str]) -> dict[str, str]:
    """The artifact's files that differ from the repository's: `new` there, or `changed`."""
    return {
        name: "changed" if name in files else "new"
        for name, file in artifact.files.items()
        if name not in files or (files[name] != file.sha256 and files[name] != file.git_id())
    }


def pause_asked_for(error: HfHubHTTPError) -> float | None:
    """Seconds after which to retry; None if the Hub does not answer 429 or 503, or asks for too many."""
    status, headers = error.response.status_code, error.response.headers
    if status not in (429, 503):
        return None
    asked, limit = headers.get("Retry-After", ""), re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    pause = 5.0
    if asked.isdigit():
        pause = float(asked)
    elif asked:
        with suppress(ValueError):
            pause = max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    elif status == 429 and limit:
        pause = float(limit[1])
    return pause if pause <= LONGEST_PAUSE else None


def once_more(
    call: Callable[[], T],
    undone: Callable[[], bool] = lambda: True,
    only: str = "",
    wait: Callable[[float], None] | None = None,
) -> T:
    """Make a call that the client does not retry itself; retry it once if the Hub asks for a pause.

    Args:
        undone: whether it is known, after the pause, that the first time changed nothing.
        only: in the request that may be repeated, `METHOD path`.
        wait: takes the seconds between the two.
    """
    try:
        return call()
    except HfHubHTTPError as error:
        pause, request = pause_asked_for(error), error.response.request
        if pause is None or only not in f"{request.method} {request.url.path}":
            raise
        log.warning("the Hub answered %d; retrying in %.0f s", error.response.status_code, pause)
        (wait or time.sleep)(pause)
        if not undone():
            raise
    return call()


def download(repository: str, name: str, commit: str, cache: str, wait: Callable[[float], None] | None = None) -> str:
    """The path of a file of a commit, in a cache; the client repeats its HEAD by itself, and not its GET."""
    return once_more(
        lambda: hf_hub_download(repository, name, revision=commit, cache_dir=cache), only="GET ", wait=wait
    )


class Repository:
    """A repository of the Hub that HF_ENDPOINT names, with the token of HF_TOKEN or `hf auth login`.

    Args:
        wait: takes the seconds between two tries.
    """

    def __init__(self, name: str, wait: Callable[[float], None] | None = None) -> None:
        self.name = name
        self._api = HfApi()
        self._wait = wait or time.sleep

    def require_token(self) -> None:
        """Raises ValueError unless there is a token that the Hub accepts for writing."""
        if get_token() is None:
            raise ValueError(
                "publishing needs a token with write access: store one with `hf auth login`, or set HF_TOKEN. There is no "
                "option for it, because other users can see a command line"
            )
        with in_plain_words("checking the token"):
            told = self._once_more(self._api.whoami)
            role = told.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError(
                f"the token of {told.get('name')} has only read access; create one with write access to {self.name}"
            )

    def look(self) -> Remote | None:
        """The state of the repository; None if it does not exist or is not accessible."""
        with in_plain_words(f"reading the state of {self.name}"):
            try:
                info = self._once_more(lambda: self._api.model_info(self.name))
            except RepositoryNotFoundError as error:
                if isinstance(error, GatedRepoError) or expired(error):  # the client takes both for not being there
                    raise
                return None
            head, tags = self._refs()
        if info.id != self.name:
            raise ValueError(f"{self.name} is {info.id} on the Hub: give --repo {info.id}")
        return Remote(bool(info.private), head, tags, self.files(head) if head else {})

    def look_until(self, seen: Callable[[Remote | None], bool]) -> Remote | None:
        """The state once it is as expected, or after some tries, because the Hub may show changes with a delay."""
        for pause in LOOKS:
            if seen(remote := self.look()):
                return remote
            self._wait(pause)
        return self.look()

    def files(self, commit: str) -> dict[str, str]:
        """All files of a commit, as in `Remote`."""
        with in_plain_words(f"listing {self.name} at {commit[:12]}"):
            for pause in LOOKS:
                with suppress(RevisionNotFoundError):  # a new commit may not be shown yet
                    return self._files(commit)
                self._wait(pause)
            return self._files(commit)

    def read(self, name: str, commit: str) -> bytes:
        """A small file of a commit."""
        with in_plain_words(f"reading {name} of {self.name}"), tempfile.TemporaryDirectory() as cache:
            return Path(download(self.name, name, commit, cache, self._wait)).read_bytes()

    def create(self) -> None:
        conflict = "it exists already: somebody created it a moment ago, or the token has no access to it"
        with in_plain_words(f"creating {self.name}", conflict):
            try:
                self._once_more(lambda: self._api.create_repo(self.name, private=True), lambda: not self._exists())
            except HfHubHTTPError as error:
                if pause_asked_for(error) is None or not self._exists():
                    raise

    def commit(self, files: Mapping[str, File], removed: Collection[str], title: str, parent: str | None) -> str:
        """Uploads files and commits them, and that others are removed, if main is still at `parent`.

        Returns:
            The new commit.
        """
        with in_plain_words(f"committing to {self.name}"):
            changes: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(name, str(file.content) if isinstance(file.content, Path) else file.content)
                for name, file in files.items()
            ]
            changes += [CommitOperationDelete(name) for name in removed]
            return self._once_more(
                lambda: self._api.create_commit(self.name, changes, commit_message=title, parent_commit=parent),
                lambda: self._refs()[0] == parent,
                only="/commit/",  # uploads were tried again by the client
            ).oid

    def tag(self, tag: str, commit: str) -> None:
        conflict = f"somebody else set {tag} a moment ago, at another commit. A tag is never moved: give a new --tag"
        with in_plain_words(f"tagging {self.name}", conflict):
            try:
                self._once_more(
                    lambda: self._api.create_tag(self.name, tag=tag, revision=commit),
                    lambda: tag not in self._refs()[1],
                )
            except HfHubHTTPError as error:
                if error.response.status_code not in (409, 429, 503) or self._refs()[1].get(tag) != commit:
                    raise

    def make_public(self) -> None:
        with in_plain_words(f"making {self.name} public"):
            self._once_more(lambda: self._api.update_repo_settings(self.name, private=False))

    def _refs(self) -> tuple[str | None, dict[str, str]]:
        """The commit of main, and that of each tag."""
        refs = self._once_more(lambda: self._api.list_repo_refs(self.name))
        head = next((branch.target_commit for branch in refs.branches if branch.name == "main"), None)
        return head, {tag.name: tag.target_commit for tag in refs.tags}

    def _files(self, commit: str) -> dict[str, str]:
        return {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in self._api.list_repo_tree(self.name, revision=commit, recursive=True)
            if isinstance(entry, RepoFile)
        }

    def _exists(self) -> bool:
        return self._api.repo_exists(self.name)

    def _once_more(self, call: Callable[[], T], undone: Callable[[], bool] = lambda: True, only: str = "") -> T:
        return once_more(call, undone, only, self._wait)
