"""Early ends of a training in Detectron2: after a signal, with a checkpoint, or at a non-finite state."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import detectron2.utils.comm as comm
from detectron2.engine import HookBase

from clove_hub.command import INTERRUPTED
from clove_hub.processes import STOPPED, STOPS


class StopRequests(HookBase):  # type: ignore[misc]
    """End the training with a checkpoint after the iteration in which any process received a signal.

    Before the first iteration and in an evaluation, when nothing would be lost, it ends at once. Hence this hook must
    come directly before the one that evaluates.
    """

    def __init__(self) -> None:
        self.received = 0
        self.unsaved = False
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored, as under nohup
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if not self.unsaved:
            os._exit(exit_code(number))  # an exception can get lost here, as in a function that runs after a fork

    def before_step(self) -> None:
        self.unsaved = True

    def after_step(self) -> None:
        done, period = self.trainer.iter + 1, self.trainer.cfg.TEST.EVAL_PERIOD
        self.received = max(comm.all_gather(self.received))
        if self.received or self.at_the_end or (period and done % period == 0):
            if comm.is_main_process() and not self.at_the_end:  # Detectron2 has saved there
                self.save(f"model_{self.trainer.iter:07d}")
            comm.synchronize()  # the first process that ends terminates all
            if self.received:
                leave(self.received)
            self.unsaved = False

    def save(self, name: str) -> None:
        checkpointer = self.trainer.checkpointer
        if Path(checkpointer.get_checkpoint_file()).stem != name:  # otherwise Detectron2 has just saved it
            checkpointer.save(name, iteration=self.trainer.iter)

    def after_train(self) -> None:
        if self.received and self.at_the_end:  # otherwise it would be evaluated now
            leave(self.received)

    @property
    def at_the_end(self) -> bool:
        return bool(self.trainer.iter + 1 >= self.trainer.max_iter)


class FiniteCheckpoints(HookBase):  # type: ignore[misc]
    """Refuse to save a non-finite state: the loss, which Detectron2 checks, shows a bad update one iteration later."""

    def state_dict(self) -> dict[str, object]:
        """Raise FloatingPointError; every hook's state is read before a checkpoint is written."""
        for name, tensor in self.trainer.checkpointer.model.state_dict().items():
            if not tensor.isfinite().all():
                raise FloatingPointError(f"{name} became infinite or NaN at iteration={self.trainer.iter}")
        return {}


def pass_on_signals() -> None:
    """Forward the signals of the launching process to the others. Without any, it ends at once."""

    def receive(number: int, frame: FrameType | None) -> None:
        if not (children := [child.pid for child in multiprocessing.active_children() if child.pid]):
            os._exit(exit_code(number))
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, number)

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, receive)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # pending until a handler was installed


def leave(number: int) -> NoReturn:
    """End the process as stopped by a signal. Further ones are ignored: launchers send them repeatedly."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(exit_code(number))


def exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else STOPPED
