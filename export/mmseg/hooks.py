"""Hooks of MMEngine for a run: verified weights, valid checkpoints, and stopping. Importing this registers them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS

from clove_hub.command import INTERRUPTED
from clove_hub.processes import STOPPED, STOPS


@HOOKS.register_module()
class RequireBackbone(Hook):  # type: ignore[misc]
    """Stop a training whose backbone is not the converted one; MMEngine itself only logs unmatched tensors.

    Args:
        file: the converted backbone.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def before_train(self, runner: Any) -> None:
        """Raise ValueError if a tensor is missing, unexpected or has another value."""
        if runner.iter > 0:  # a resumed run has trained weights
            return
        expected = torch.load(self.file, map_location="cpu", weights_only=True)["state_dict"]
        model = getattr(runner.model, "module", runner.model)
        held = {name: tensor.cpu() for name, tensor in model.backbone.state_dict().items()}
        wrong = sorted(expected.keys() ^ held.keys())
        wrong += [name for name in expected if name in held and not torch.equal(held[name], expected[name])]
        if wrong:
            raise ValueError(
                f"the network does not hold the backbone of {self.file}: {len(wrong)} of {len(expected)} tensors are "
                f"missing or have another value ({', '.join(wrong[:4])})"
            )


@HOOKS.register_module()
class RequireFinite(Hook):  # type: ignore[misc]
    """Stop a diverged training before its state replaces a valid checkpoint.

    Args:
        interval: iterations between two checks of the loss, each a host-device synchronization.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Raise FloatingPointError."""
        if self.every_n_train_iters(runner, self.interval):
            self.require(runner, "the loss", outputs["loss"])

    def before_save_checkpoint(self, runner: Any, checkpoint: Mapping[str, Any]) -> None:
        """Raise FloatingPointError."""
        for name, tensor in checkpoint["state_dict"].items():
            self.require(runner, name, tensor)

    def require(self, runner: Any, name: str, tensor: torch.Tensor) -> None:
        if not bool(tensor.isfinite().all()):
            rate = runner.optim_wrapper.get_lr()["lr"][0]
            raise FloatingPointError(
                f"{name} is not finite after iteration {runner.iter + 1}, at the learning rate {rate:g}. Choose a lower "
                "optim_wrapper.optimizer.lr and another --out"
            )


@HOOKS.register_module()
class PlainCheckpoints(Hook):  # type: ignore[misc]
    """Omit from a checkpoint what torch since 2.6 does not load, which makes MMEngine's resuming fail.

    That is the averaging windows of logged values, and numpy scalars.
    """

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        known = checkpoint["message_hub"]["runtime_info"].items()
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in known}
        resumed = {name: kept for name, kept in checkpoint["message_hub"]["resumed_keys"].items() if name in plain}
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": plain, "resumed_keys": resumed}


@HOOKS.register_module()
class StopRequests(Hook):  # type: ignore[misc]
    """End the training with a checkpoint after the iteration in which any process received a signal.

    Outside an iteration, as in an evaluation, it ends at once: the iterations since the last checkpoint are repeated.
    """

    def __init__(self) -> None:
        self.received = 0
        self.within = False

    def before_train(self, runner: Any) -> None:
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored, as under nohup
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if not self.within:
            os._exit(exit_code(number))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.leave_if_asked()
        self.within = True

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if get_world_size() > 1:
            asked = torch.tensor(self.received, device=next(runner.model.parameters()).device)
            all_reduce(asked, "max")
            self.received = int(asked)
        if self.received:  # the saving hook runs after this one, the next iteration does not run
            for hook in runner.hooks:
                if isinstance(hook, CheckpointHook):
                    hook.interval = 1

    def before_val(self, runner: Any) -> None:
        self.leave_if_asked()
        self.within = False

    def after_train(self, runner: Any) -> None:
        self.leave_if_asked()
        self.within = False

    def leave_if_asked(self) -> None:
        """End the process as stopped by a signal. Further ones are ignored: launchers send them repeatedly."""
        if self.received:
            for each in STOPS:
                signal.signal(each, signal.SIG_IGN)
            sys.exit(exit_code(self.received))


def exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else STOPPED
