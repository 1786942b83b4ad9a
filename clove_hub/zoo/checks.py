"""Checks of tensors for finite values, names and shapes, and their messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

LARGEST_FLOAT = torch.finfo(torch.float32).max
COMPUTED = ("weight", "bias", "running_mean", "running_var")
"""Endings of the names of tensors that a network computes with; the others may be counters and tables."""
LONGEST_NAME = 120
"""Maximum characters of a displayed name."""


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that the values of `what` are plausible after training.

    Raises:
        ValueError: naming the tensors with non-finite values, with negative variances, or with integers where a network
            computes with floating-point numbers.
    """
    way_out = "these weights come from a training that diverged or from a damaged file: use an earlier checkpoint"
    if broken := not_finite(tensors):
        raise ValueError(f"{what}: {counted('tensor', broken)} with non-finite values in float32; {way_out}")
    variances = {name: tensor for name, tensor in tensors.items() if name.endswith("running_var")}
    if negative := [name for name, tensor in variances.items() if tensor.numel() and tensor.min() < 0]:
        raise ValueError(f"{what}: {counted('tensor', negative)} with variances below zero; {way_out}")
    if whole := [name for name, t in tensors.items() if name.endswith(COMPUTED) and not t.is_floating_point()]:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in whole}))
        raise ValueError(
            f"{what}: {counted('tensor', whole)} of {kinds}, which are not weights without their scales; expected float32, "
            "float16 or the like: use the file from before it was quantized"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with infinities or NaN, in the float32 that models compute with.

    No tensor is copied.
    """

    def finite(tensor: Tensor) -> bool:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return True
        low, high = (float(bound) for bound in tensor.aminmax())  # either is NaN if any value is
        return low >= -LARGEST_FLOAT and high <= LARGEST_FLOAT

    return [name for name, tensor in tensors.items() if not finite(tensor)]


def require_names_and_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]], what: str) -> None:
    """Raise ValueError unless `tensors` has exactly the names of `expected`, each with its shape."""
    problems = differences(tensors, expected)
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}. All names and shapes must match.")


def differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Iterable[int]]) -> list[str]:
    """The differences of `tensors` from `expected`, in words; empty if there are none."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    misshaped = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tuple(tensor.shape) != tuple(expected[name])
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("mis-shaped", misshaped))
    return [counted(f"{kind} tensor", names) for kind, names in kinds if names]


def counted(noun: str, names: list[str], shown: int = 3) -> str:
    """`4 missing tensors (a, b, c and 1 more)`."""
    listed = ", ".join(map(printable, names[:shown]))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''} ({listed}{more})"


def printable(name: str) -> str:
    """A name from a file, safe for a terminal: of bounded length, without control characters."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
