"""What `check` runs in a process of its own."""

from __future__ import annotations

import os
import time
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist
from torch import nn

from clove_hub.batch_norm import GroupedBatchNorm, NormGroups, settle_statistics
from clove_hub.training.loop import train
from clove_hub.training.run.stopping import never

from ..setting import made_crops, make_accelerator, sized
from ..train_state import make_train_state, step
from .place import Place, options, recipe_of


def one_of_two(place: Place, rank: int, port: int, words: list[str]) -> int:
    """One of two processes of a run that share a device, which nccl refuses and gloo allows."""
    launched = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in launched.items()}}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    barrier = dist.barrier
    with mock.patch.object(dist, "barrier", side_effect=lambda **_: barrier()):  # gloo refuses the device that is named
        return train(recipe_of("clove", place, *words), never)


def synchronized_norm(place: Place, port: int) -> dict[str, float]:
    """With one process, which suffices for the kernels."""
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    torch.manual_seed(0)
    x, found = torch.randn(8, 3, 5, 5, dtype=torch.float64), []
    try:
        for device, processes in (("cpu", None), (place.device.type, dist.group.WORLD)):
            groups = NormGroups(4, 4, rank=0, world=1, processes=processes)
            network = nn.Sequential(GroupedBatchNorm(nn.BatchNorm2d(3).double().to(device), groups))
            y = x.to(device).requires_grad_()
            out = network(y)
            out.cos().sum().backward()
            settle_statistics(network, 1)
            assert y.grad is not None
            found.append([out, y.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    finally:
        dist.destroy_process_group()
    off = max(
        float((a.detach().cpu().double() - b.detach().double()).abs().max()) for a, b in zip(*found[::-1], strict=True)
    )
    assert off < 1e-9, f"off by {off:.3g}"
    return {"off": off}


def compiled_in_full(place: Place, batch: int) -> dict[str, Any]:
    """Compiles the paper's step."""
    recipe = sized(options(place, [f"batch.total={batch}", "run.compile=true"]))
    train_state = make_train_state(recipe, make_accelerator(recipe, place.device.type))
    crops = made_crops(train_state.method.view_spec, batch).to(place.device)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        step(train_state, crops)
        assert bool(train_state.finite)
        seconds.append(time.perf_counter() - began)
    return {"seconds_of_the_first_steps": seconds}
