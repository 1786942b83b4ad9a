"""The ResNets whose weights several frameworks share, told apart by names and shapes of tensors alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .families import family
from .tensors import differences, printable


@dataclass(frozen=True)
class ResNet:
    """A ResNet (He et al. 2016) with the stride in the 3x3 convolution, as timm and torchvision build it."""

    depth: int
    blocks: tuple[int, int, int, int]
    """Residual blocks of each stage."""
    bottleneck: bool
    groups: int = 1
    width: int = 64
    """Channels of each group in the first stage's 3x3 convolutions."""

    @property
    def channels(self) -> int:
        """Of the last feature map."""
        return 2048 if self.bottleneck else 512

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the headless network, by its name in timm and torchvision."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        def layer(conv: str, norm: str, out: int, into: int, side: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield f"{conv}.weight", (out, into, side, side)
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                yield f"{norm}.{leaf}", (out,)
            yield f"{norm}.num_batches_tracked", ()

        yield from layer("conv1", "bn1", 64, 3, 7)
        channels = 64
        for stage, count in enumerate(self.blocks):
            planes = 64 * 2**stage
            out = planes * 4 if self.bottleneck else planes
            middle = planes * self.width // 64 * self.groups
            for block in range(count):
                at = f"layer{stage + 1}.{block}"
                if self.bottleneck:
                    yield from layer(f"{at}.conv1", f"{at}.bn1", middle, channels, 1)
                    yield from layer(f"{at}.conv2", f"{at}.bn2", middle, middle // self.groups, 3)
                    yield from layer(f"{at}.conv3", f"{at}.bn3", out, middle, 1)
                else:
                    yield from layer(f"{at}.conv1", f"{at}.bn1", planes, channels, 3)
                    yield from layer(f"{at}.conv2", f"{at}.bn2", planes, planes, 3)
                if channels != out:
                    yield from layer(f"{at}.downsample.0", f"{at}.downsample.1", out, channels, 1)
                channels = out


RESNETS = {
    "resnet18": ResNet(18, (2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNet(34, (3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNet(50, (3, 4, 6, 3), bottleneck=True),
    "resnet101": ResNet(101, (3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNet(152, (3, 8, 36, 3), bottleneck=True),
    "resnext50_32x4d": ResNet(50, (3, 4, 6, 3), bottleneck=True, groups=32, width=4),
    "resnext101_32x8d": ResNet(101, (3, 4, 23, 3), bottleneck=True, groups=32, width=8),
    "wide_resnet50_2": ResNet(50, (3, 4, 6, 3), bottleneck=True, width=128),
    "wide_resnet101_2": ResNet(101, (3, 4, 23, 3), bottleneck=True, width=128),
}
"""By the name that timm and torchvision give them."""


def closest_resnet(tensors: Mapping[str, Tensor]) -> str:
    """Which of RESNETS these tensors come closest to."""
    # As many tensors in place as possible; of several such, the one that misses fewest.
    return max(RESNETS, key=lambda name: (_fitting(tensors, name), -len(RESNETS[name].shapes)))


def find_resnet(tensors: Mapping[str, Tensor], what: str) -> str:
    """Which of RESNETS these tensors are, under the names of timm and torchvision and without a classifier.

    Raises:
        ValueError: none of them. The message names what was found, or, if one comes close, what it lacks.
    """
    best = closest_resnet(tensors)
    problems = differences(tensors, RESNETS[best].shapes)
    if not problems:
        return best
    if _fitting(tensors, best) * 2 < len(RESNETS[best].shapes):
        raise not_a_resnet(tensors, what)
    raise ValueError(
        f"{what} is not a complete ResNet; it comes closest to {best}, but has {'; '.join(problems)}. "
        "Every tensor must have its place."
    )


def not_a_resnet(tensors: Mapping[str, Tensor], what: str) -> ValueError:
    """The error that says what these tensors are instead, as far as that is known."""
    kind = family(tensors)
    return ValueError(
        f"{what} is {f'{kind}, ' if kind else ''}not a ResNet: found {len(tensors)} tensors such as "
        f"{', '.join(map(printable, list(tensors)[:3]))}; expected one of {', '.join(RESNETS)}"
    )


def _fitting(tensors: Mapping[str, Tensor], architecture: str) -> int:
    """How many of the tensors are in their place."""
    shapes = RESNETS[architecture].shapes
    return sum(name in shapes and tuple(tensor.shape) == shapes[name] for name, tensor in tensors.items())
