"""Batch norm over groups of images, whose size is a setting of training and not of the machine.

A group that is smaller than the batch of one forward pass is a part of it (ghost batch norm); a larger one spans
several processes, whose sums are added. Group j of a step always holds the images j*g to (j+1)*g of the global batch,
however they are distributed over processes, forward passes and devices. All views of an image that pass a layer in one
tensor belong to its group, as in the released trainers.

Running statistics are updated with every group of a step in the order of its images, as if each had been a separate
forward pass on one device. Layers keep their statistics until the step ends, and `settle_statistics` combines them; the
result is the same on all processes, and for any number of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True, eq=False)
class NormGroups:
    """How the images of a forward pass form groups."""

    images: int
    """Of a forward pass of this process."""
    group: int
    """Images that share statistics: a divisor of `images`, or a multiple."""
    rank: int
    """Of this process, and ..."""
    world: int
    """... the number of all."""
    processes: dist.ProcessGroup | None
    """Those that form a group together; None where a process has whole groups."""

    @property
    def parts(self) -> int:
        """Groups in a forward pass of this process; 1 also if it has only a part of one."""
        return max(1, self.images // self.group)

    @property
    def span(self) -> int:
        """Processes that form a group together."""
        return max(1, self.group // self.images)

    @property
    def in_pass(self) -> int:
        """Groups in a forward pass of all processes."""
        return self.images * self.world // self.group

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes of a group."""
        return x if self.processes is None else sum_over_processes(x, self.processes)

    def __deepcopy__(self, memo: dict[int, Any]) -> NormGroups:
        return self  # a process group cannot be copied


class GroupedBatchNorm(_BatchNorm):
    """A batch norm layer with the statistics of groups, which replaces `layer` and takes over its tensors.

    (V * B, C, ...) -> the same shape, with B images in each of V views, the images of a view one after the other. What
    timm's `BatchNormAct2d` does after the norm stays.
    """

    def __init__(self, layer: _BatchNorm, groups: NormGroups) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
        self.weight, self.bias, self.affine = layer.weight, layer.bias, layer.affine
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked, self.track_running_stats = layer.num_batches_tracked, layer.track_running_stats
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.train(layer.training)
        self.groups = groups
        self.taken: list[Tensor] = []
        """Mean and variance of each group, (parts, 2, C), of each call since the last step."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.by_group(x)
        else:
            running = self.running_mean, self.running_var
            x = F.batch_norm(x, *running, self.weight, self.bias, self.running_mean is None, 0.0, self.eps)
        for after in self.children():
            x = after(x)
        return x

    def by_group(self, x: Tensor) -> Tensor:
        groups = self.groups
        if len(x) % groups.images:
            raise ValueError(
                f"batch norm was given a tensor of {len(x)} views, but a forward pass has {groups.images} images: pass "
                "all images of one view, or of several views one after the other"
            )
        if groups.parts == 1:
            x, found = self.normalized(x)
            statistics = [found]
        else:
            pieces = torch.split(x, groups.group)  # V * parts, view by view
            own = [pieces[part :: groups.parts] for part in range(groups.parts)]
            done = [self.normalized(torch.cat(one) if len(one) > 1 else one[0]) for one in own]
            back = [torch.split(y, groups.group) for y, _ in done]  # parts times V
            x = torch.cat([part[view] for view in range(len(own[0])) for part in back])
            statistics = [found for _, found in done]
        if self.running_mean is not None:
            self.taken.append(torch.stack(statistics))
        return x

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One group, or this process's share of it, with its mean and unbiased variance, (2, C)."""
        weight, bias, processes = self.weight, self.bias, self.groups.processes
        kind = torch.promote_types(x.dtype, torch.float32)
        mean, variance = torch.zeros(2, x.shape[1], dtype=kind, device=x.device)
        if processes is None:
            x = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps)
            return x, torch.stack([mean, variance])
        if x.is_cuda:
            x = SyncBatchNormFunction.apply(x, weight, bias, mean, variance, self.eps, 1.0, processes, self.groups.span)
            return x, torch.stack([mean, variance])
        # torch has no synchronized batch norm for the CPU.
        values, over = x.to(kind), [0, *range(2, x.ndim)]
        mean = self.groups.total(values.mean(over, keepdim=True)) / self.groups.span
        centered = values - mean
        variance = self.groups.total(centered.square().mean(over, keepdim=True)) / self.groups.span
        out = centered * (variance + self.eps).rsqrt()
        if self.affine:
            shape = (-1, *(1 for _ in over[1:]))
            out = out * weight.view(shape) + bias.view(shape)
        count = x.numel() // x.shape[1] * self.groups.span
        return out.to(x.dtype), torch.stack([mean.flatten(), variance.flatten() * (count / (count - 1))]).detach()


class MaskedBatchNorm(nn.Module):
    """Batch norm with the statistics of the rows that count: (N, dim), boolean (N,) -> (N, dim).

    Equals `SyncBatchNorm` of x[counts], without a data-dependent shape, which would need a host-device synchronization;
    it also runs on a CPU. The other rows are normalized in the same way. A group with fewer than two such rows does not
    change the running statistics.

    Rows of all processes are one group, unless there are `groups`; the rows of an image are then adjacent.
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        self.groups: NormGroups | None = None
        self.taken: list[Tensor] = []
        """As those of `GroupedBatchNorm`."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        rows = x.to(self.weight.dtype)  # autocast leaves them in half precision
        parts = self.groups.parts if self.groups and self.training else 1
        rows, counts = rows.reshape(parts, -1, rows.shape[1]), counts.reshape(parts, -1)  # (parts, R, dim), (parts, R)
        mean, variance = self.statistics(rows, counts) if self.training else (self.running_mean, self.running_var)
        rows = (rows - mean) * (self.weight * (variance + self.eps).rsqrt()) + self.bias
        return rows.view_as(x).to(x.dtype)

    def statistics(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each part, (parts, 1, dim)."""
        total = self.groups.total if self.groups else sum_over_processes
        weights = counts.to(rows.dtype).unsqueeze(2)  # (parts, R, 1)
        sums = total(torch.cat([(rows * weights).sum(1, keepdim=True), weights.sum(1, keepdim=True)], 2))
        count = sums[..., -1:]
        mean = sums[..., :-1] / count.clamp(min=1)
        variance = total(((rows - mean).square() * weights).sum(1, keepdim=True)) / count.clamp(min=1)
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            running = torch.stack([self.running_mean, self.running_var])
            found = torch.where(count > 1, torch.cat([mean, unbiased], 1), running)  # (parts, 2, dim)
            if self.groups:
                self.taken.append(found)
            else:
                self.running_mean.lerp_(found[0, 0], self.momentum)
                self.running_var.lerp_(found[0, 1], self.momentum)
                self.num_batches_tracked += (count > 1).squeeze()
        return mean, variance


def batch_norms(module: nn.Module) -> Iterator[_BatchNorm]:
    """The layers whose result depends on the other images of a batch; those of frozen layers are in eval mode."""
    return (m for m in module.modules() if isinstance(m, _BatchNorm) and m.training)


def groups_in_pass(module: nn.Module) -> int:
    """The number of batch-norm groups in a forward pass of all processes; 0 where nothing normalizes over a batch."""
    for norm in batch_norms(module):
        return norm.groups.in_pass if isinstance(norm, GroupedBatchNorm) else processes()
    return 0


def group_batch_norms(module: nn.Module, group: int, images: int, minutes: float = 30.0) -> None:
    """Give each batch norm layer of the module the statistics of groups; all processes call this together.

    A layer whose forward pass in one process is a group needs no change.

    Args:
        group: images that share statistics.
        images: of a forward pass of this process.
        minutes: timeout of a process that waits for another one.

    Examples:
        >>> import clove_hub
        >>> from clove_hub.batch_norm import GroupedBatchNorm, batch_norms, group_batch_norms
        >>> method = clove_hub.create_method("moco", "test_resnet", global_size=64)
        >>> group_batch_norms(method, group=16, images=64)  # and settle_statistics(method, 1) after each step
        >>> all(isinstance(norm, GroupedBatchNorm) for norm in batch_norms(method))
        True
    """
    world = processes()
    assert images % group == 0 or (group % images == 0 and world % (group // images) == 0), (group, images, world)
    if world == 1 and group == images:
        return
    together = None
    if (span := group // images) > 1:
        of_some = span < world
        together = dist.new_subgroups(span, timeout=timedelta(minutes=minutes))[0] if of_some else dist.group.WORLD
    groups = NormGroups(images, group, dist.get_rank() if world > 1 else 0, world, together)
    grouped = {norm: GroupedBatchNorm(norm, groups) for norm in batch_norms(module)}
    for parent in list(module.modules()):
        if isinstance(parent, MaskedBatchNorm):
            parent.groups = groups
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and child in grouped:
                parent.add_module(name, grouped[child])


@torch.no_grad()
def settle_statistics(module: nn.Module, passes: int) -> None:
    """Update the running statistics after a step; all processes call this together.

    Args:
        passes: forward passes of the step, in each process.
    """
    norms = [m for m in module.modules() if isinstance(m, GroupedBatchNorm | MaskedBatchNorm) and m.taken]
    if not norms:
        return
    shares = [_share(norm, passes) for norm in norms]
    if processes() > 1:
        flat = torch.cat([share.flatten() for share in shares])
        dist.all_reduce(flat)
        shares = [one.view(2, -1) for one in torch.split(flat, [share.numel() for share in shares])]
    for norm, share in zip(norms, shares, strict=True):
        assert norm.groups is not None
        assert norm.momentum is not None
        times = len(norm.taken) * norm.groups.in_pass
        for running, more in zip((norm.running_mean, norm.running_var), share, strict=True):
            assert running is not None
            running.mul_((1 - norm.momentum) ** times).add_(more)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(times)
        norm.taken.clear()


def _share(norm: GroupedBatchNorm | MaskedBatchNorm, passes: int) -> Tensor:
    """What this process's groups add to the running statistics, (2, C): momentum * (1 - momentum)^k of each, k later ones."""
    groups, momentum = norm.groups, norm.momentum
    assert groups is not None
    assert momentum is not None, "batch norm over groups needs a momentum"
    taken = torch.stack(norm.taken)
    taken = taken.view(passes, -1, *taken.shape[1:])  # (passes, calls, parts, 2, C)
    if groups.rank % groups.span:  # the first process of a group counts it
        return torch.zeros_like(taken[0, 0, 0])
    calls, parts = taken.shape[1:3]
    numbers = [torch.arange(size, device=taken.device) for size in (passes, calls, parts)]
    first = groups.rank * groups.images // groups.group
    group = numbers[0][:, None, None] * groups.in_pass + first + numbers[2]  # (passes, 1, parts)
    later = passes * groups.in_pass * calls - 1 - (group * calls + numbers[1][:, None])  # (passes, calls, parts)
    weights = momentum * (1 - momentum) ** later.to(taken.dtype)
    return torch.einsum("pcg,pcgsd->sd", weights, taken)


def processes() -> int:
    """The processes that compute together."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


_alone = False  # per process, not per thread: the backward pass runs in other threads


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the context, this process computes as if it were the only one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def sum_over_processes(x: Tensor, together: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of the tensors of all processes. The gradient of one is that of the sum of all processes' losses.

    Args:
        together: those whose tensors are summed, where it is not all.
    """
    total: Tensor = _SumOverProcesses.apply(x, together)
    return total


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, together: dist.ProcessGroup | None) -> Tensor:
        ctx.together = together
        total = x.clone(memory_format=torch.contiguous_format)
        if processes() > 1:
            dist.all_reduce(total, group=together)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over_processes(gradient, ctx.together), None
