"""Steps of training as the released trainers took them, recorded in float64, and the same steps with our methods."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clove_hub.training.optimizer import LARS, parameter_groups
from clove_hub.views import Views
from clove_hub.zoo.formats import FORMATS

Recording = Mapping[str, NDArray[Any]]


def released_names(method: nn.Module, kind: str) -> dict[str, str]:
    """Our name of each tensor of a full state -> the released one, without `module.`.

    Args:
        kind: whose code wrote the names; MoCo-kNN has MoCo's and one more.
    """
    row = next(row for row in FORMATS if row.name == kind and row.ours)
    beginnings = {ours: theirs for theirs, ours in row.ours.items()} | {"queue_features": "queue_backbone"}
    found = {}
    for name in method.state_dict():
        start = max((start for start in beginnings if name.startswith(start)), key=len)
        found[name] = beginnings[start] + name.removeprefix(start)
    return found


def golden_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A tensor that a recording began with, by its released name and shape."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith(("num_batches_tracked", "queue_ptr")):
        return torch.zeros((), dtype=torch.long)
    if len(shape) > 1:
        value = rng.standard_normal(tuple(shape)) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("running_mean"):
        value = np.zeros(shape)
    elif name.endswith("running_var"):
        value = np.ones(shape)
    elif name.endswith("weight"):
        value = rng.uniform(0.5, 1.5, tuple(shape))
    else:
        value = rng.standard_normal(tuple(shape)) * 0.1
    return torch.from_numpy(value.astype(np.float32)).double()


def begin(method: nn.Module, names: Mapping[str, str], seed: int) -> None:
    """Gives a method the weights that a recording began with; `names` are those of `released_names`."""
    state = {}
    for ours, tensor in method.state_dict().items():
        theirs, shape = names[ours], tuple(tensor.shape)
        if ours.startswith("teacher."):
            state[ours] = state[ours.replace("teacher.", "student.")]
        elif theirs in ("queue", "queue_backbone"):  # a column each there, a row here
            columns = golden_weight(theirs, shape[::-1], seed)
            state[ours] = (columns / columns.norm(dim=0)).T
        elif theirs == "value_transform.weight":  # a 1x1 convolution there
            state[ours] = golden_weight(theirs, (*shape, 1, 1), seed).flatten(1)
        else:
            state[ours] = golden_weight(theirs, shape, seed)
    method.load_state_dict(state)


def follow(
    method: Any, g: Recording, views: Callable[[np.random.Generator, int], list[Views]], steps: int, **groups: Any
) -> list[float]:
    """Takes recorded steps, the last without its update where it is not the recording's last; the losses.

    Args:
        method: in float64, with the weights that the recording began with.
        views: makes those of a step from its random generator and its number.
        groups: `eps` of LARS, and what `parameter_groups` takes.
    """
    eps = groups.pop("eps", 1e-8)
    optimizer = LARS(parameter_groups(method, float(g["weight_decay"]), **groups), lr=0.0, eps=eps)
    losses = []
    for step in range(steps):
        method.begin_step(float(g["momentum"][step]), epoch=step / int(g["steps_per_epoch"]))
        last = step + 1 == steps < len(g["lr"])
        with torch.set_grad_enabled(not last):
            loss, _ = method(views(np.random.default_rng([int(g["seed"]), 1000 + step]), step))
        losses.append(float(loss.detach()))
        if not last:
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = float(g["lr"][step])
            optimizer.step()
    return losses


def assert_final_state(method: nn.Module, names: Mapping[str, str], g: Recording) -> None:
    """The norm and mean of every tensor, and how many batches each batch norm has seen, are the recorded ones."""
    final = {names[ours]: tensor for ours, tensor in method.state_dict().items()}
    tracked = dict(zip(g["batches_names"].tolist(), g["batches_tracked"].tolist(), strict=True))
    assert {name: int(tensor) for name, tensor in final.items() if name.endswith("num_batches_tracked")} == tracked
    assert set(final) - set(tracked) - {"queue_ptr"} == set(g["names"].tolist())
    for name, norm, mean in zip(g["names"].tolist(), g["norm"].tolist(), g["mean"].tolist(), strict=True):
        tensor = final[name]
        assert abs(float(tensor.norm()) - norm) <= 1e-7 * norm, name
        assert abs(float(tensor.mean()) - mean) <= 1e-7 * norm / tensor.numel() ** 0.5, name


def random_pixels(rng: np.random.Generator, batch: int, size: int) -> NDArray[np.float32]:
    return rng.standard_normal((batch, 3, size, size)).astype(np.float32)


def view_group(pixels: list[NDArray[Any]], boxes: Any, flipped: list[NDArray[np.bool_]]) -> Views:
    """Views in float64 from one array for each."""
    boxes = torch.from_numpy(np.asarray(boxes, dtype=np.float64))
    return Views(torch.from_numpy(np.stack(pixels)).double(), boxes, torch.from_numpy(np.stack(flipped)))
