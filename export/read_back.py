"""Reading back what was published, as a new user would: with an empty cache, in a fresh process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clove_hub.processes import die_with_parent
from clove_hub.runs import sha256
from clove_hub.weights.hub import in_plain_words

from .hub import download, once_more

PREFIX = "clove-hub-read-back-"


def read_back_in_a_fresh_process(repository: str, commit: str, sums: Mapping[str, str], library: str | None) -> None:
    """`read_back` in a separate process with an empty cache, so that nothing is reused from this one.

    Raises:
        ValueError: as `read_back`, or the process died.
    """
    with locked_folder() as cache:
        order = {"parent": os.getpid()} | {
            "repository": repository,
            "commit": commit,
            "sums": dict(sums),
            "library": library,
            "cache": cache,
        }
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            # Without PYTHONSAFEPATH, `-m` would import modules from the working directory.
            env=os.environ | {"HF_HUB_CACHE": cache, "HF_XET_CACHE": f"{cache}/xet", "PYTHONSAFEPATH": "1"},
            check=False,
        )
    if child.returncode == 2:
        raise ValueError(child.stdout.strip())
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"the process that read {repository} back ended with exit code {child.returncode}: {reason}")


@contextmanager
def locked_folder() -> Iterator[str]:
    """A temporary folder, locked while this process lives, so that another one's `clear_interrupted` keeps it."""
    while True:
        with (
            tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder,
            _lock(Path(folder)) as ours,
        ):
            if ours:
                yield folder
                return


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder; yield whether that succeeded and the folder still exists."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield folder.exists()
    finally:
        os.close(handle)


def clear_interrupted() -> None:
    """Remove the temporary folders of this user's read-backs that were killed, and report it."""
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        with _lock(folder) as free:
            if free and folder.stat().st_uid == os.getuid():
                size = sum(path.lstat().st_size for path in folder.rglob("*"))
                shutil.rmtree(folder, ignore_errors=True)
                print(f"Removed {folder} ({size:,} bytes), left behind by a publication that was killed.")


def read_back(repository: str, commit: str, sums: Mapping[str, str], library: str | None, cache: str) -> None:
    """Download a commit's files and compare their checksums; load the weights as a user would, and compare every bit.

    Args:
        sums: sha256 of each file.
        library: the library that loads them, as in `Artifact`.
        cache: a folder for the client's cache; the check is valid only if it is empty.

    Raises:
        ValueError: a file cannot be fetched or differs, or the library does not load its content.
    """
    state, paths = None, {}
    if library == "clove-hub":
        import clove_hub

        state = clove_hub.load_detector(f"hf-hub:{repository}@{commit}", device="cpu").network.state_dict()
    if library == "timm":  # first, so that it downloads what it needs itself, which is then compared
        import timm

        with in_plain_words(f"loading {repository} with timm"):
            model = once_more(
                lambda: timm.create_model(f"hf-hub:{repository}@{commit}", pretrained=True, cache_dir=cache),
                only="GET ",
            )
            state = model.state_dict()
    for name, expected in sums.items():
        with in_plain_words(f"reading {name} of {repository} back"):
            paths[name] = Path(download(repository, name, commit, cache))
            found = sha256(paths[name])
        if found != expected:
            raise ValueError(
                f"{name} of {repository} differs from what was sent (sha256 {found[:12]}..., expected {expected[:12]}...): it "
                "is damaged on the Hub, or was damaged in transit"
            )
    if state is not None:
        from clove_hub.zoo.checks import counted
        from clove_hub.zoo.tensors import read_tensors

        from .bundle import different
        from .card_files import WEIGHTS

        tensors, _ = read_tensors(paths[WEIGHTS])
        if names := different(state, tensors):
            raise ValueError(f"{repository}, loaded by {library}, differs from its file in {counted('tensor', names)}")


if __name__ == "__main__":
    try:
        order = json.loads(sys.stdin.read())
        die_with_parent(signal.SIGKILL, order.pop("parent"))
        read_back(**order)
    except ValueError as problem:
        print(problem)
        sys.exit(2)
