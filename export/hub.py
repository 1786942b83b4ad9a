"""One repository on the Hub: what is in it, what is to be in it, and the few things that publishing does to it.

The client itself repeats uploads, downloads and listings. Here what may be repeated is repeated once, if the Hub says when; not a
commit, because one that is repeated blindly may land on top of somebody else's. Every failure becomes a ValueError in plain
words, from which no traceback leads on to the client's own: that one holds the request, which holds the token.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from clove_hub.runs import sha256
from clove_hub.weights.hub import in_plain_words

T = TypeVar("T")
ENDPOINT = constants.ENDPOINT
OTHER_WEIGHTS = {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json"}
"""Where other programs look for weights: beside ours they would be those of another version. timm's `push_to_hf_hub`
writes the first."""
LONGEST_WAIT = 60.0
"""Seconds that are waited when the Hub asks for it."""
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
        return hashlib.sha1(b"blob %d\0" % self.size + self.read()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """What is published in one commit."""

    what: str
    """For messages: `the bundle photos/bundle`."""
    files: Mapping[str, File]
    """By their name in the repository. Nothing else is ever uploaded."""
    told_in: str
    """The file that says which model this is; a repository without it is somebody else's."""
    model: Mapping[str, Any]
    """What it says, of SAME_MODEL."""


@dataclass(frozen=True)
class Remote:
    """A repository as it was when it was looked at."""

    private: bool
    head: str | None
    """The commit that main is at; None if there is none yet."""
    tags: Mapping[str, str]
    """The commit of each."""
    files: Mapping[str, str]
    """Of `head`: the sha256 of each that is large, and of the others what git calls their content."""


def differences(artifact: Artifact, files: Mapping[str, str]) -> dict[str, str]:
    """Which files are not as they are to be in the repository: `new` there, `changed` or, of OTHER_WEIGHTS, `removed`."""
    found = {
        name: "changed" if name in files else "new"
        for name, file in artifact.files.items()
        if name not in files or (files[name] != file.sha256 and files[name] != file.git_id())
    }
    return found | {name: "removed" for name in files if name in OTHER_WEIGHTS}


class Repository:
    """A repository of the Hub that HF_ENDPOINT names, with the token of HF_TOKEN or `hf auth login`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._api = HfApi()

    def require_token(self) -> None:
        """Raises ValueError unless there is a token that the Hub accepts for writing."""
        if get_token() is None:
            raise ValueError(
                "publishing needs a token that may write: `hf auth login` stores one, or set HF_TOKEN. It is never "
                "taken from the command line, where others could see it"
            )
        with in_plain_words("asking the Hub whose token this is"):
            told = patiently(self._api.whoami)
            role = told.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError(f"the token of {told.get('name')} may only read; make one that may write to {self.name}")

    def look(self) -> Remote | None:
        """What is there; None if it does not exist, or not for the one who asks."""
        with in_plain_words(f"looking at {self.name}"):
            try:
                info = patiently(lambda: self._api.model_info(self.name))
            except RepositoryNotFoundError:
                return None
            refs = patiently(lambda: self._api.list_repo_refs(self.name))
            head = next((branch.target_commit for branch in refs.branches if branch.name == "main"), None)
            tags = {tag.name: tag.target_commit for tag in refs.tags}
        if info.id != self.name:
            raise ValueError(f"{self.name} is called {info.id} on the Hub: give that name")
        return Remote(bool(info.private), head, tags, self.files(head) if head else {})

    def files(self, commit: str) -> dict[str, str]:
        """All files of a commit, as in `Remote`."""
        with in_plain_words(f"listing {self.name} at {commit[:12]}"):
            entries = list(self._api.list_repo_tree(self.name, revision=commit, recursive=True))
        found = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in found}

    def read(self, name: str, commit: str) -> bytes:
        """A small file of a commit."""
        with in_plain_words(f"reading {name} of {self.name}"), tempfile.TemporaryDirectory() as cache:
            return Path(hf_hub_download(self.name, name, revision=commit, cache_dir=cache)).read_bytes()

    def create(self) -> None:
        with in_plain_words(f"creating {self.name}"):
            self._api.create_repo(self.name, private=True)

    def commit(self, files: Mapping[str, File], removed: Collection[str], title: str, parent: str | None) -> str:
        """Uploads files and commits them, if main is still at `parent`; returns the new commit."""
        with in_plain_words(f"committing to {self.name}"):
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(name, str(file.content) if isinstance(file.content, Path) else file.content)
                for name, file in files.items()
            ]
            operations += map(CommitOperationDelete, removed)
            return self._api.create_commit(self.name, operations, commit_message=title, parent_commit=parent).oid

    def tag(self, tag: str, commit: str) -> None:
        """Sets a tag that was not there; one that somebody has set in between stays where it is."""
        with in_plain_words(f"tagging {self.name}"):
            patiently(lambda: self._api.create_tag(self.name, tag=tag, revision=commit, exist_ok=True))

    def make_public(self) -> None:
        with in_plain_words(f"making {self.name} public"):
            patiently(lambda: self._api.update_repo_settings(self.name, private=False))


def patiently(call: Callable[[], T]) -> T:
    """Calls the Hub, and once more if it is busy and says when to come again (429 or 503 with `Retry-After`)."""
    try:
        return call()
    except HfHubHTTPError as error:
        said = error.response.headers.get("Retry-After", "")
        if error.response.status_code not in (429, 503) or not said.isdigit() or int(said) > LONGEST_WAIT:
            raise
        print(f"the Hub asks to wait {said} seconds ...", flush=True)
        time.sleep(int(said))
    return call()
