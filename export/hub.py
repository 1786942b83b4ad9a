"""One repository on the Hub: what is in it, and the few things that publishing does to it.

Each call is made once. What the client itself tries again it tries again; nothing more is retried here, because
a commit that is repeated blindly may land on top of somebody else's. Every failure becomes a ValueError in plain
words, from which no traceback leads on to the client's own: that one holds the request, which holds the token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from clove_hub.weights.hub import in_plain_words

from .artifact import Artifact, File

ENDPOINT = constants.ENDPOINT


@dataclass(frozen=True)
class RemoteFile:
    size: int
    sha256: str | None
    """Known of large files only."""
    git_id: str

    def is_same(self, file: File) -> bool:
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 else self.git_id == file.git_id()


@dataclass(frozen=True)
class Remote:
    """A repository as it was when it was looked at."""

    private: bool
    head: str | None
    """The commit that main is at; None if there is none yet."""
    tags: Mapping[str, str]
    """The commit of each."""
    files: Mapping[str, RemoteFile]
    """Of `head`."""


def differences(artifact: Artifact, files: Mapping[str, RemoteFile]) -> dict[str, str]:
    """Which of the artifact's files are not what the repository has: `new` there, or `changed`."""
    return {
        name: "changed" if name in files else "new"
        for name, file in artifact.files.items()
        if name not in files or not files[name].is_same(file)
    }


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
            told = self._api.whoami()
            role = told.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ValueError(f"the token of {told.get('name')} may only read; make one that may write to {self.name}")

    def look(self) -> Remote | None:
        """What is there; None if it does not exist, or not for the one who asks."""
        with in_plain_words(f"looking at {self.name}"):
            try:
                info = self._api.model_info(self.name)
            except RepositoryNotFoundError:
                return None
            refs = self._api.list_repo_refs(self.name)
            head = next((branch.target_commit for branch in refs.branches if branch.name == "main"), None)
            tags = {tag.name: tag.target_commit for tag in refs.tags}
        if info.id != self.name:
            raise ValueError(f"{self.name} is called {info.id} on the Hub: give that name")
        return Remote(bool(info.private), head, tags, self.files(head) if head else {})

    def files(self, commit: str) -> dict[str, RemoteFile]:
        """All files of a commit."""
        with in_plain_words(f"listing {self.name} at {commit[:12]}"):
            return {
                entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in self._api.list_repo_tree(self.name, revision=commit, recursive=True)
                if isinstance(entry, RepoFile)
            }

    def read(self, name: str, commit: str) -> bytes:
        """A small file of a commit."""
        with in_plain_words(f"reading {name} of {self.name}"), tempfile.TemporaryDirectory() as cache:
            return Path(hf_hub_download(self.name, name, revision=commit, cache_dir=cache)).read_bytes()

    def create(self) -> None:
        with in_plain_words(f"creating {self.name}"):
            self._api.create_repo(self.name, private=True)

    def commit(self, files: Mapping[str, File], title: str, parent: str | None) -> str:
        """Uploads files and commits them, if main is still at `parent`; returns the new commit."""
        with in_plain_words(f"committing to {self.name}"):
            added = [
                CommitOperationAdd(name, str(file.content) if isinstance(file.content, Path) else file.content)
                for name, file in files.items()
            ]
            return self._api.create_commit(self.name, added, commit_message=title, parent_commit=parent).oid

    def tag(self, tag: str, commit: str) -> None:
        with in_plain_words(f"tagging {self.name}"):
            self._api.create_tag(self.name, tag=tag, revision=commit)

    def make_public(self) -> None:
        with in_plain_words(f"making {self.name} public"):
            self._api.update_repo_settings(self.name, private=False)
