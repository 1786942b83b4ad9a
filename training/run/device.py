"""The processes and devices of a run, set up alike for pre-training and fine-tuning."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn


def make_accelerator(precision: str, **settings: Any) -> Accelerator:
    """Accelerate's view of this process; `precision` is `fp32`, `bf16` or `fp16`, of the forward pass."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # unsaid, Accelerate runs several CPU processes as so many lone ones
        mixed_precision={"fp32": "no"}.get(precision, precision),
        **settings,
    )


def synchronized(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The network with batch norm over all processes; on a CPU, for which torch has none, as it is."""
    if accelerator.num_processes == 1 or accelerator.device.type == "cpu":
        return network
    converted: nn.Module = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return converted
