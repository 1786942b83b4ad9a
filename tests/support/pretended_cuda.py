"""A stand-in for a CUDA device: its branches run, and the arithmetic stays on the CPU.

Within `pretended_cuda` a device that is named `cuda` is the CPU to whatever makes or moves a tensor, and `torch.cuda` answers; what
it is asked is recorded in order. Kernels, and what really runs beside what, a GPU alone can show (`tests/test_gpu.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 1)  # not the first, which is what is taken where an index is forgotten
HOST = torch.device("cpu")


class OnHost(TorchFunctionMode):
    """Puts on the host what is made on, or moved to, a CUDA device."""

    def __torch_function__(self, function, types, arguments=(), settings=None):
        settings = {key: hosted(value) for key, value in (settings or {}).items()}
        return function(*map(hosted, arguments), **settings)


def hosted(value: object) -> object:
    if isinstance(value, torch.device) and value.type == "cuda":
        assert value == DEVICE, f"{value} is another device than that of this process"
        return HOST
    return value


class Cuda:
    """What stands for `torch.cuda`. Every call leaves a pair in `said`: the function, and what tells its calls apart."""

    def __init__(self, total: int) -> None:
        self.said: list[tuple[str, object]] = []
        self.total, self.held, self.peak = total, 0, 0
        self.current, self.spare = "computing", 0

    def Stream(self, device: torch.device) -> str:  # torch's name
        assert device == DEVICE
        return "copying"

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def current_stream(self, device: torch.device) -> mock.Mock:
        assert device == DEVICE
        return mock.Mock(
            wait_stream=lambda other: self.said.append(("wait", (self.current, other))), label=self.current
        )

    def recorded(self, tensor: torch.Tensor, stream: mock.Mock) -> None:
        self.said.append(("record", (id(tensor), stream.label)))

    def asked(self, name: str, answer: object = None):
        def function(device: torch.device) -> object:
            assert device == DEVICE, f"torch.cuda.{name}({device})"
            self.said.append((name, device))
            return answer(self) if callable(answer) else answer

        return function


@contextlib.contextmanager
def pretended_cuda(total: int = 10**9) -> Iterator[Cuda]:
    """Accelerate's device is CUDA's within the context.

    Args:
        total: bytes of the device's memory.
    """
    cuda = Cuda(total)
    functions = {
        "mem_get_info": cuda.asked("mem_get_info", (total // 2, total)),
        "reset_peak_memory_stats": cuda.asked("reset_peak_memory_stats"),
        "synchronize": cuda.asked("synchronize"),
        "memory_allocated": cuda.asked("memory_allocated", lambda one: one.held),
        "max_memory_allocated": cuda.asked("max_memory_allocated", lambda one: one.peak),
        "get_device_name": cuda.asked("get_device_name", "a GPU"),
        "Stream": cuda.Stream,
        "stream": cuda.stream,
        "current_stream": cuda.current_stream,
    }
    with (
        mock.patch.multiple(torch.cuda, **functions),
        mock.patch.object(
            torch.Tensor, "record_stream", lambda tensor, stream: cuda.recorded(tensor, stream), create=True
        ),
        mock.patch.object(Accelerator, "device", DEVICE),
        OnHost(),
    ):
        yield cuda
