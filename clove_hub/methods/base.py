"""The interface of a method, and the few functions that methods share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from clove_hub.batch_norm import groups_in_pass, processes
from clove_hub.views import Interpolation, Jitter, View, Views, ViewSpec

Logs = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


class Method(Protocol):
    """A pre-training method. It is an `nn.Module`; the loop, the checkpoints and the export use only this interface.

    Its children `student` and, where it has one, `teacher` each hold the timm model as `backbone`.
    """

    view_spec: ViewSpec
    exported: str
    """The encoder that export writes: `student` or `teacher`."""

    def __call__(self, views: Sequence[Views]) -> tuple[Tensor, Logs]:
        """One group of views for each resolution -> the loss (a scalar) and scalars to log.

        A batch-norm layer may be given one view (B, ...), or several at once, (V * B, ...) view by view: then they share
        statistics (see `clove_hub.batch_norm`). A mean over images makes the loss, so that processes can share them.
        The logs hold `embedding_spread` (see the function of this name), by which the loop sees a collapse.
        """

    def begin_step(self, momentum: float, epoch: float) -> None:
        """Moves the teacher toward the student; called once before each step's forward passes.

        Args:
            momentum: the teacher's.
            epoch: completed passes over the images, for methods that change with the epoch.
        """


def frozen_copy(module: M) -> M:
    """A copy that no gradient reaches; it stays in training mode, as a momentum teacher's batch norm does."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def move_toward(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for the parameters that both have, in one call.

    Buffers are left alone: each network keeps the batch norm statistics of what it saw itself.
    """
    students = dict(student.named_parameters())
    pairs = [(parameter, students[name]) for name, parameter in teacher.named_parameters()]
    if pairs:
        torch._foreach_lerp_([t for t, _ in pairs], [s.detach() for _, s in pairs], 1 - momentum)


def full_precision(x: Tensor) -> Tensor:
    """float32 for what autocast left in half precision; wider types stay (the golden numbers are float64)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """Unit length over the last dimension, in full precision."""
    return F.normalize(full_precision(x), dim=-1)


@torch.no_grad()
def embedding_spread(embeddings: Tensor) -> Tensor:
    """How far unit-length embeddings are from having collapsed into a point: (..., C) -> scalar in [0, 1].

    The root of the mean squared distance to their mean: 1 for directions spread evenly, 0 when all are the same.
    """
    mean = embeddings.flatten(0, -2).mean(0)
    return (1 - mean.square().sum()).clamp(min=0).sqrt()  # E|e|^2 - |E e|^2, with |e| = 1


@torch.no_grad()
def gather_batch(x: Tensor) -> Tensor:
    """The tensors of all processes, in the order of their ranks, along the first dimension. No gradient."""
    if processes() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(processes())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def own_share(x: Tensor) -> Tensor:
    """This process's part of what belongs to all, in the order of their ranks: the inverse of `gather_batch`."""
    return x.chunk(processes())[dist.get_rank() if processes() > 1 else 0]


def shuffled(
    teacher: nn.Module, pixels: Tensor, embed: Callable[[Tensor], tuple[Tensor, ...]], otherwise: str
) -> tuple[Tensor, ...]:
    """The teacher's outputs for images shuffled over the batch norm groups of all processes (MoCo, section 3.3).

    A query and its key are then normalized with different images, so the statistics do not reveal which belong
    together.

    Args:
        pixels: (B, 3, S, S).
        embed: (B, 3, S, S) -> tensors of B rows, by the teacher.
        otherwise: the alternative if all images are one group, for the warning.
    """
    if groups_in_pass(teacher) == 1:
        warnings.warn(
            "all queries and keys of a forward pass share batch-norm statistics, which reveal which belong together: "
            "lower batch.norm_group (clove_hub.batch_norm.group_batch_norms in a loop of your own) to half of a "
            f"forward pass or less{otherwise}",
            stacklevel=2,
        )
    everyone = gather_batch(pixels)
    order = torch.randperm(len(everyone), device=pixels.device)
    if processes() > 1:
        dist.broadcast(order, 0)
    found = embed(everyone[own_share(order)])
    back = own_share(order.argsort())
    return tuple(gather_batch(one)[back] for one in found)


@torch.no_grad()
def advance(start: Tensor, count: int, size: int) -> Tensor:
    """The places of the next `count` entries of a queue of `size`, over the oldest ones: (count,), integers.

    Args:
        start: the place of the oldest entry, a scalar buffer of the method; it moves behind the new ones.
    """
    places = (start + torch.arange(count, device=start.device)) % size
    start.copy_((start + count) % size)
    return places


BYOL_JITTER = Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8)


def byol_views(size: int, scale: tuple[float, float], interpolation: Interpolation) -> tuple[View, View]:
    """The two large views of BYOL's protocol (Grill et al. 2020, appendix B), which the dense methods took over."""
    first = View(size=size, scale=scale, jitter=BYOL_JITTER, gray=0.2, blur=1.0, interpolation=interpolation)
    return first, replace(first, blur=0.1, solarize=0.2)
