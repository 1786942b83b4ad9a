"""The processes and devices of a run, set up in the same way for pre-training and fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn


def make_accelerator(
    precision: str, minutes: float, kwargs_handlers: Sequence[KwargsHandler] = (), **settings: Any
) -> Accelerator:
    """Accelerate's view of this process.

    Args:
        precision: `fp32`, `bf16` or `fp16`, of the forward pass.
        minutes: timeout of a process that waits for another one.
    """
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, Accelerate runs several CPU processes independently
        mixed_precision={"fp32": "no"}.get(precision, precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=minutes)), *kwargs_handlers],
        **settings,
    )


def synchronized(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network with batch norm synchronized over all processes; unchanged on a CPU, where torch has none."""
    if accelerator.num_processes == 1 or accelerator.device.type == "cpu":
        return network
    converted: nn.Module = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return converted
