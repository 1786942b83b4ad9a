"""Communication between the processes of a run over the hosts' network, separate from the devices' collectives.

No process waits for one that has failed: each notifies the others before it ends, and prints its own error.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

T = TypeVar("T")
GONE = r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout|failed to (send|recv|write)"
"""Errors of gloo about a process that has ended or does not respond."""
TROUBLE = 255
"""What a process without images for the next step tells the others, in place of an exit code: above all of these."""


class PeerFailed(ConnectionError):
    """Another process of the run failed, or cannot be reached."""


class Peers:
    """The processes of a run; all of them construct one together and call its methods in the same order.

    Args:
        minutes: timeout of a process that waits for another one.
    """

    def __init__(self, minutes: float) -> None:
        self.rank, self.world = 0, 1
        self.group: Any = None
        self.minutes = minutes
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let each process work independently within the context; all of them succeed, or all fail.

        Raises:
            PeerFailed: another process failed. An error of this process is raised unchanged.
        """
        try:
            yield
        except Exception as error:
            with contextlib.suppress(PeerFailed):
                self.gathered(str(error) or type(error).__name__)
            raise
        failed = [(place, message) for place, message in self.gathered(None) if message is not None]
        if failed:
            place, message = failed[0]
            raise PeerFailed(f"{place} failed: {message}")

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError on every process unless all have equal facts; it names process, host and values."""
        gathered = self.gathered(dict(facts))
        _, first = gathered[0]
        for place, other in gathered[1:]:
            for name in facts:
                if first[name] != other[name]:
                    raise ValueError(
                        f"the processes of this run were not started alike: {name} is {other[name]!s:.200} for {place}, "
                        f"and {first[name]!s:.200} for {gathered[0][0]}. Start all with the same command on the same data"
                    )

    def from_main(self, value: T) -> T:
        """The main process's value, on all."""
        box = [value]
        if self.group is not None:
            with named():
                dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def highest(self, value: int) -> int:
        """The highest of all processes' values."""
        if self.group is None:
            return value
        flag = torch.tensor(value)
        with named():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return int(flag)

    def share(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Broadcast the main process's tensors; the others' optimizers may have none yet."""
        if self.group is None:
            return
        moments = self.from_main(
            [
                {key: (value.shape, value.dtype, value.stride()) for key, value in optimizer.state.get(p, {}).items()}
                for p in module.parameters()
            ]
        )
        tensors: list[Tensor] = list(module.state_dict().values())
        for parameter, found in zip(module.parameters(), moments, strict=True):
            for key, (shape, kind, stride) in found.items():
                if key not in optimizer.state[parameter]:
                    empty = torch.empty_strided(shape, stride, dtype=kind, device=parameter.device if shape else "cpu")
                    optimizer.state[parameter][key] = empty
                tensors.append(optimizer.state[parameter][key])
        for tensor in tensors:
            with named():
                sent = tensor.detach().cpu().contiguous()
                dist.broadcast(sent, 0, group=self.group)
                tensor.detach().copy_(sent)

    def gathered(self, value: T) -> list[tuple[str, T]]:
        """Each process's name and value, in the order of the ranks."""
        own = (f"process {self.rank} on {socket.gethostname()}", value)
        if self.group is None:
            return [own]
        box: list[Any] = [None] * self.world
        with named():
            dist.all_gather_object(box, own, group=self.group)
        return box


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Turn every network error about a lost process into `PeerFailed` within the context."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(GONE, str(error), re.IGNORECASE):
            raise
        said = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).partition(". ")[0]  # without the line of gloo's source
        late = " If it is only slow, raise run.timeout." if re.search("timed? ?out", said, re.IGNORECASE) else ""
        raise PeerFailed(
            "another process of this run has ended or does not respond; unless it was killed, see its own error "
            f"({said:.200}).{late}"
        ) from None


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Report an error in the context, before a process has peers, to the others that wait for it."""
    try:
        yield
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not PartialState._shared_state:
            PartialState(cpu=not torch.accelerator.is_available())
            with contextlib.suppress(PeerFailed), contextlib.suppress(type(error)), Peers(1.0).together():
                raise error
        raise
