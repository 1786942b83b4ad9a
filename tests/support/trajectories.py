"""Five steps of training as the released trainers took them, recorded in float64, and the same steps with our methods.

What is drawn, in which order, and what was recorded is described beside the recordings, in tests/golden/README.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clove_hub.methods.moco import Moco
from clove_hub.training.optimizer import LARS, parameter_groups
from clove_hub.views import Views
from clove_hub.zoo.formats import FORMATS

Recording = Mapping[str, NDArray[Any]]


def released_names(method: torch.nn.Module, kind: str) -> dict[str, str]:
    """Our name of each tensor of a full state -> the released one, without `module.`."""
    row = next(row for row in FORMATS if row.name == kind and row.ours)
    beginnings = {ours: theirs for theirs, ours in row.ours.items()} | {"queue_features": "queue_backbone"}
    found = {}
    for name in method.state_dict():
        start = max((start for start in beginnings if name.startswith(start)), key=len)
        found[name] = beginnings[start] + name.removeprefix(start)
    return found


def golden_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith(("num_batches_tracked", "queue_ptr")):
        return torch.zeros((), dtype=torch.long)
    if len(shape) > 1:
        value = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("running_mean"):
        value = np.zeros(shape)
    elif name.endswith("running_var"):
        value = np.ones(shape)
    elif name.endswith("weight"):
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.standard_normal(shape) * 0.1
    return torch.from_numpy(value.astype(np.float32)).double()


def begin(method: torch.nn.Module, kind: str, seed: int) -> dict[str, str]:
    """Gives a method the weights that a recording began with; returns the released name of each of its tensors."""
    names = released_names(method, kind)
    state = {}
    for ours, tensor in method.state_dict().items():
        if ours.startswith("teacher."):
            continue
        theirs, shape = names[ours], tuple(tensor.shape)
        if theirs.startswith("queue") and len(shape) == 2:
            columns = golden_weight(theirs, shape[::-1], seed)
            state[ours] = (columns / columns.norm(dim=0)).T.contiguous()
        elif theirs == "value_transform.weight":
            state[ours] = golden_weight(theirs, (*shape, 1, 1), seed).flatten(1)
        else:
            state[ours] = golden_weight(theirs, shape, seed)
    for ours in names:
        if ours.startswith("teacher."):
            state[ours] = state[ours.replace("teacher.", "student.")].clone()
    method.load_state_dict(state)
    return names


def follow(
    method: Any, kind: str, g: Recording, views: Callable[[np.random.Generator, int], list[Views]], **optimizer: Any
) -> dict[str, float]:
    """Takes the recorded steps; the largest error of the losses, and of the final norms and means, relative to the norm.

    Args:
        method: in float64.
        kind: its name.
        views: makes those of a step from its random generator and its number.
        optimizer: `adapt` and `decay_all` of the groups, `eps`.
    """
    seed = int(g["seed"])
    names = begin(method, kind, seed)
    eps = optimizer.pop("eps", 1e-8)
    groups = parameter_groups(method, float(g["weight_decay"]), **optimizer)
    moves = LARS(groups, lr=0.0, eps=eps)
    error = {"loss": 0.0, "norm": 0.0, "mean": 0.0}
    for step, (rate, momentum) in enumerate(zip(g["lr"], g["momentum"], strict=True)):
        method.begin_step(float(momentum), epoch=step / int(g["steps_per_epoch"]))
        loss, _ = method(views(np.random.default_rng([seed, 1000 + step]), step))
        moves.zero_grad()
        loss.backward()
        for group in moves.param_groups:
            group["lr"] = float(rate)
        moves.step()
        error["loss"] = max(error["loss"], abs(float(loss.detach()) - float(g["loss"][step])))
    final = {names[ours]: tensor for ours, tensor in method.state_dict().items()}
    for name, norm, mean in zip(g["names"].tolist(), g["norm"], g["mean"], strict=True):
        tensor = final[name]
        if norm:
            error["norm"] = max(error["norm"], abs(float(tensor.norm()) / float(norm) - 1))
            root_mean_square = float(norm) / tensor.numel() ** 0.5
            error["mean"] = max(error["mean"], abs(float(tensor.mean()) - float(mean)) / root_mean_square)
    tracked = zip(g["batches_names"].tolist(), g["batches_tracked"], strict=True)
    error["batches"] = max(
        abs(int(final[f"{name}.num_batches_tracked" if "tracked" not in name else name]) - int(n))
        for name, n in tracked
    )
    assert {name for name in final if "tracked" not in name and name != "queue_ptr"} == set(g["names"].tolist())
    if isinstance(method, Moco):
        error["queue"] = float((method.queue.T - torch.from_numpy(g["queue"])).abs().max())
    return error


def pixels(rng: np.random.Generator, batch: int, size: int) -> NDArray[np.float32]:
    return rng.standard_normal((batch, 3, size, size)).astype(np.float32)


def view_group(pictures: list[NDArray[Any]], boxes: Tensor, flips: list[NDArray[np.bool_]]) -> Views:
    return Views(torch.from_numpy(np.stack(pictures)).double(), boxes, torch.from_numpy(np.stack(flips)))
