"""Repositories that the Hub's client fetched earlier, which it finds without a network."""

import hashlib
from pathlib import Path


def fetched(cache: Path, repository: str, folder: Path, *names: str) -> str:
    """Puts a folder's files into the cache as the newest commit of a repository, and returns the commit.

    Args:
        names: of the files; all by default.
    """
    home = cache / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(repository.encode()).hexdigest()
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in [folder / name for name in names] or list(folder.iterdir()):
        (snapshot / path.name).symlink_to(path)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    return commit
