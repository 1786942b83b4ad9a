"""The one owner of a run's folder, for pre-training and fine-tuning: lock, checkpoints and rows.

Only the main process reads and writes there; it sends its results and failures to the others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from clove_hub.runs import STATE, checkpoint_folders, complete_lines, newest_checkpoint, read_state, write_whole

from . import checkpoints
from .loader import explained
from .lock import Lock
from .peers import PeerFailed, Peers, named
from .rescue import Undo, uninterrupted

log = logging.getLogger(__name__)


class RunFailed(OSError):
    """The folder cannot be written, or no longer belongs to this process; the message says what is kept."""


class RunFolder:
    """A run's folder during training. A context manager, within which no other process can write there.

    Args:
        path: the folder, which is created, and removed again if nothing was written into it.
        peers: the processes of the run, all of which enter the context.
        keep: how many of the newest valid checkpoints are kept.
        keys: the keys that a checkpoint's state must have.
        option: the option that names the folder in a command, for messages.

    Raises:
        BlockingIOError: another process has the folder.
        PeerFailed: the main process could not enter.
        RunFailed: a file operation in the folder failed.
        ValueError: there are checkpoints, but none is valid.
    """

    def __init__(self, path: Path, peers: Peers, keep: int, option: str, keys: Sequence[str] = STATE) -> None:
        self.path, self.peers, self.keep, self.option, self.keys = path, peers, keep, option, keys
        self.found: tuple[Path, dict[str, Any]] | None = None
        """The checkpoint to resume from and its state, the same on all processes."""
        self.saved: int | None = None
        """Steps done at the newest good checkpoint."""
        self.moved = False
        self.made: list[Path] = []
        self.good: dict[Path, object] = {}
        self.rows: dict[str, IO[str]] = {}
        self.lock: Lock | None = None

    def __enter__(self) -> RunFolder:
        try:
            with self.peers.together(), self._told(self.path):
                if self.peers.main:
                    self._open()
            self.found = self.peers.from_main(self.found)
            for place, path in self.peers.gathered(str(self.path.absolute()))[1:]:
                if self.peers.main and path != str(self.path.absolute()):
                    log.warning(
                        "%s has %s as the run's folder; that of the main process, %s, is used",
                        place,
                        path,
                        self.path.absolute(),
                    )
        except BaseException:
            self._close()
            raise
        self.saved = self.found[1]["step"] if self.found else None
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, OSError):
                with self._told(None):
                    raise error
        finally:
            self._close()

    def save(
        self, step: int, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], failed: bool = False
    ) -> Path:
        """Write a checkpoint in the main process, while the others wait; return its folder.

        Args:
            step: optimizer steps done.
            module: not wrapped, as `restore` takes it; the optimizer too.
            state: plain data for state.json.
            failed: the state of a run that failed, for inspection; it is never resumed from.

        Raises:
            FloatingPointError: a weight is not finite; the state is then written as failed.
            PeerFailed: the main process could not write.
            RunFailed: as this says.
        """
        folder = self._checkpoint(step, failed)
        with self.peers.together(), self._told(folder):
            if self.peers.main:
                self.write(step, module, optimizer, state, failed)
        return folder

    def write(
        self, step: int, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any], failed: bool = False
    ) -> None:
        """`save` in the main process alone."""
        self.require_own()
        for file in self.rows.values():  # before a checkpoint counts on them
            os.fsync(file.fileno())
        tensors = checkpoints.state_tensors(module, optimizer)
        folder = self._checkpoint(step, failed)
        if failed:
            for old in folder.parent.glob("failed_*"):  # one is enough for inspection
                shutil.rmtree(old, ignore_errors=True)
            checkpoints.write(folder, step, tensors, state)
            return
        if bad := checkpoints.not_finite(tensors):
            self.write(step, module, optimizer, state, failed=True)
            raise FloatingPointError(
                f"after step {step} {len(bad)} tensors hold non-finite values ({', '.join(bad[:3])}); they are in "
                f"{self._checkpoint(step, failed=True)}, for inspection, and the run resumes from the checkpoint before"
            )
        if not self._is_good(folder):  # if it is: the same step of the same run, the same bytes
            checkpoints.write(folder, step, tensors, state)
        self.good[folder] = _signature(folder)
        self.saved = step
        self._prune()

    @contextlib.contextmanager
    def rescuing(self, undo: Undo, rescue: Callable[[], None]) -> Iterator[None]:
        """Save the state after the last complete step, whatever ends the run within the context.

        Args:
            undo: records whether the state is complete.
            rescue: saves it by `write`; called in the main process alone, as the others may be gone.
        """
        try:
            with named(), explained():
                yield
        except BaseException as error:
            told = isinstance(error, FloatingPointError) or (isinstance(error, RunFailed) and not self.moved)
            # A device may wait forever for a process that has ended; nothing can be read from it then.
            stuck = isinstance(error, PeerFailed) and any(tensor.is_cuda for tensor in undo.tensors)
            if self.peers.main and undo.whole and not told and not stuck:
                before = self.saved
                try:
                    with uninterrupted(signal.SIGCHLD):  # torch may be about to report the worker that ended
                        rescue()
                except Exception as second:
                    if self.saved == before:
                        log.warning("the state after the last step could not be saved: %s", second)
                if self.saved != before:
                    way = "" if self.moved else "; the same command resumes from there"
                    log.warning("saved after step %s%s", self.saved, way)
            raise

    def restore(self, module: nn.Module, optimizer: Optimizer) -> int:
        """Restore module and optimizer of all processes from the newest checkpoint; return the steps done."""
        if self.found is None:
            return 0
        folder, state = self.found
        with self.peers.together():
            if self.peers.main:
                checkpoints.restore(folder, module, optimizer)
        self.peers.share(module, optimizer)
        log.info("resuming from %s", folder)
        return int(state["step"])

    def truncate(self, name: str, step: int) -> None:
        """Remove a file's rows after `step`, which the run will write again, and an incomplete last row."""
        path = self.path / name
        with self.peers.together(), self._told(path):
            if self.peers.main and path.is_file():
                write_whole(path, "".join(line for line in complete_lines(path) if json.loads(line)["step"] <= step))

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the folder atomically, in the main process."""
        with self.peers.together(), self._told(self.path / name):
            if self.peers.main:
                write_whole(self.path / name, text)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of tensors atomically, in the main process."""
        with self.peers.together(), self._told(self.path / name):
            if self.peers.main:
                draft = self.path / f".{name}.partial"
                checkpoints.save_tensors(draft, tensors)
                draft.replace(self.path / name)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends a row to a file of rows, which stays open; on the other processes nothing."""
        if not self.peers.main:
            return
        with self._told(self.path / name):
            self.require_own()
            if name not in self.rows:
                self.rows[name] = (self.path / name).open("a", encoding="utf-8")
            self.rows[name].write(json.dumps(row) + "\n")
            self.rows[name].flush()

    def require_own(self) -> None:
        """Raise RunFailed if the folder was moved, deleted or taken over by another process.

        A moved folder is followed, so that the state can still be saved there.
        """
        assert self.lock is not None
        problem, now = self.lock.problem(), self.lock.whereabouts()
        if problem is None:
            return
        if now is None or now == self.path:
            raise RunFailed(
                f"{problem}: nothing more is written, and what was trained since the last checkpoint is lost"
            )
        self.path = self.lock.run = now
        self.moved = True
        raise RunFailed(f"{problem}: start again with {self.option}={now} to resume")

    def _checkpoint(self, step: int, failed: bool = False) -> Path:
        return self.path / "checkpoints" / f"{'failed' if failed else 'step'}_{step:08d}"

    def _open(self) -> None:
        self.made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.path)
        for leftover in [*self.path.glob(".*"), *(self.path / "checkpoints").glob(".*")]:
            if leftover.suffix in (".partial", ".damaged"):
                shutil.rmtree(leftover, ignore_errors=True)
                with contextlib.suppress(OSError):
                    leftover.unlink()
        self.found = newest_checkpoint(self.path, self.keys)

    def _close(self) -> None:
        for file in self.rows.values():
            with contextlib.suppress(OSError):
                file.close()
        self.rows = {}
        if self.lock is not None:
            self.lock.release()
            self.lock = None
        for path in self.made:
            with contextlib.suppress(OSError):
                path.rmdir()  # where nothing was written into it

    def _is_good(self, folder: Path) -> bool:
        """Whether a checkpoint is whole; read again only where its files have changed."""
        if (signature := _signature(folder)) is None:
            return False
        if self.good.get(folder) != signature:
            try:
                read_state(folder, self.keys)
            except ValueError as error:
                log.warning("the checkpoint %s is damaged: %s", folder, error)
                return False
            self.good[folder] = signature
        return True

    def _prune(self) -> None:
        """Removes what is older than the newest `keep` good checkpoints."""
        good = 0
        for folder in checkpoint_folders(self.path):
            if good < self.keep:
                good += self._is_good(folder)
                continue
            gone = folder.with_name(f".{folder.name}.damaged")  # a half removed folder must not look like a checkpoint
            try:
                shutil.rmtree(gone, ignore_errors=True)
                shutil.rmtree(folder.rename(gone))
            except OSError as error:
                log.warning("the old checkpoint %s cannot be removed: %s", folder, error.strerror)

    @contextlib.contextmanager
    def _told(self, path: Path | None) -> Iterator[None]:
        """Within the context a failed operation on a file of the run is one sentence that says what is kept.

        Args:
            path: the file, where the system does not name it; None for what may be no file of the run.
        """
        try:
            yield
        except (RunFailed, PeerFailed, BlockingIOError):
            raise
        except OSError as error:
            name = path if error.filename is None else Path(os.fsdecode(error.filename))
            if name is None or not name.absolute().is_relative_to(self.path.absolute()):
                raise
            kept = "No checkpoint was written yet: fix this and start again"
            if self.saved is not None:
                kept = f"The checkpoint of step {self.saved} is kept: fix this, and the same command resumes from there"
            raise RunFailed(f"{name}: {error.strerror}. {kept}") from error


def _signature(folder: Path) -> object:
    """Changes with the files of a folder; None where there is none."""
    try:
        stats = {path.name: path.stat() for path in folder.iterdir()}
    except OSError:
        return None
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}
