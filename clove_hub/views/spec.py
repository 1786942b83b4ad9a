"""The specification of a method's random views of an image."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Interpolation = Literal["bicubic", "bilinear"]
Depth = Literal[8, 16]
Boxes = Literal["centers", "edges"]


@dataclass(frozen=True)
class Jitter:
    """Color jitter: brightness, contrast, saturation and hue, each drawn anew and applied in a random order.

    The first three are strengths: with strength s the factor is uniform in [max(0, 1 - s), 1 + s]. `hue` is
    the largest turn in either direction, as a fraction of the color circle.

    Raises:
        ValueError: a strength is negative, `hue` is outside [0, 0.5] or `probability` outside [0, 1].
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    probability: float = 0.8

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            strength = getattr(self, name)
            if not (math.isfinite(strength) and strength >= 0):
                raise ValueError(f"Jitter.{name} is {strength}; it must be zero (off) or a positive number")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"Jitter.hue is {self.hue}; it is a fraction of the color circle, from 0 (off) to 0.5")
        _check_probability("Jitter.probability", self.probability)


@dataclass(frozen=True)
class Overlap:
    """A crop that must overlap with that of another view.

    At least `share` of its own area must lie within the crop of view number `view`, counted from 0 in
    `ViewSpec.views`. Ten draws of size and place are tried; if none fits and overlaps enough, the crop is free.

    Raises:
        ValueError: `view` is negative or `share` outside (0, 1].
    """

    view: int
    share: float

    def __post_init__(self) -> None:
        if self.view < 0:
            raise ValueError(f"Overlap.view is {self.view}; views are counted from 0")
        if not 0 < self.share <= 1:
            raise ValueError(f"Overlap.share is {self.share}; a share of the crop's area is above 0 and at most 1")


@dataclass(frozen=True)
class View:
    """One random view: a crop resized to `size` x `size` pixels, and what happens to it after that.

    `scale` is the range of the crop's area as a fraction of the image, `ratio` the range of its width / height (drawn
    uniformly in the logarithm), `flip`, `gray`, `blur` and `solarize` are probabilities, `blur_sigma` is the range of
    the blur's standard deviation in pixels of the view. The order is fixed: crop, flip, jitter, gray, blur, solarize.
    `interpolation` is the crop's, with antialiasing. `auto_augment` is the probability with which AutoAugment's
    ImageNet policy replaces everything after the flip. It may rotate and shear; `boxes` then no longer say exactly what
    the cells show, so it is not for methods that match cells.

    Raises:
        ValueError: a range is empty or reversed, or a value lies outside what it can be.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: Jitter | None = None
    gray: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    overlap: Overlap | None = None
    auto_augment: float = 0.0
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"View.size is {self.size}; a view has at least one pixel per side")
        for name, highest in (("scale", 1.0), ("ratio", math.inf), ("blur_sigma", math.inf)):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not (0 < bounds[0] <= bounds[1] <= highest) or math.isinf(bounds[1]):
                limit = "" if math.isinf(highest) else f" <= {highest:g}"
                raise ValueError(f"View.{name} is {bounds}; it must be (low, high) with 0 < low <= high{limit}")
        for name in ("flip", "gray", "blur", "solarize", "auto_augment"):
            _check_probability(f"View.{name}", getattr(self, name))
        _check_choice("View.interpolation", self.interpolation, Interpolation)


@dataclass(frozen=True)
class ViewSpec:
    """All views of an image, in the order in which a method receives them, and the normalization of colors.

    Views of one size form a group, which is stored and processed as one tensor; they must be adjacent. `mean` and `std`
    have a number for each band, red, green and blue where there are three, in units where white is 1. `boxes` says
    where a box begins and ends: at the centers of its first and last pixel as fractions of the image's (i / (H - 1)),
    or at their outer edges (i / H). `depth` is the bits of a value that crops keep: 8, or 16 for images that may have
    either.

    Raises:
        ValueError: there is no view, views of one size are apart, mean and std are not usable numbers or not as many,
            `boxes` is not a convention, or a view asks for what has no meaning for these bands (see `for_bands`).
    """

    views: tuple[View, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    boxes: Boxes = "centers"
    depth: Depth = 8

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("ViewSpec.views is empty; a method needs at least one view")
        sizes = [view.size for view in self.views]
        if len(list(itertools.groupby(sizes))) != len(set(sizes)):
            raise ValueError(f"ViewSpec.views has the sizes {sizes}; views of the same size must be adjacent")
        for number, view in enumerate(self.views):
            if view.overlap is None:
                continue
            other = view.overlap.view
            if other >= len(self.views) or other == number or self.views[other].overlap:
                raise ValueError(
                    f"view {number} of ViewSpec.views has overlap with view {other}; that must be another one of the "
                    f"{len(self.views)} views, and one without overlap"
                )
        if not self.mean or not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"ViewSpec.mean is {self.mean}; it must be a finite number for each band")
        if len(self.std) != len(self.mean) or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"ViewSpec.std is {self.std}; it must be a positive number for each of {self.bands} bands")
        if self.depth not in get_args(Depth):
            raise ValueError(f"ViewSpec.depth is {self.depth}; choose 8 or 16")
        if without := meaningless(self.views, self.bands, self.depth):
            raise ValueError(
                f"ViewSpec.views has {', '.join(without)}, which has no meaning for {self.bands} bands of {self.depth} bits; "
                "`for_bands` makes a spec without it"
            )
        _check_choice("ViewSpec.boxes", self.boxes, Boxes)

    @property
    def bands(self) -> int:
        """Of an image."""
        return len(self.mean)

    @property
    def groups(self) -> tuple[slice, ...]:
        """The views of each size, in order, as slices of `views`."""
        sizes = [view.size for view in self.views]
        return tuple(slice(sizes.index(size), sizes.index(size) + sizes.count(size)) for size in dict.fromkeys(sizes))


def meaningless(views: Sequence[View], bands: int, depth: Depth) -> list[str]:
    """The operations of views that have a meaning only for colors, or only for photos of 8 bits."""
    asked = {
        "saturation": any(view.jitter and view.jitter.saturation for view in views),
        "hue": any(view.jitter and view.jitter.hue for view in views),
        "gray": any(view.gray for view in views),
        "solarize": any(view.solarize for view in views),
        "auto_augment": any(view.auto_augment for view in views),
    }
    needs = {"auto_augment": (bands, depth) != (3, 8)}
    return [name for name, used in asked.items() if used and needs.get(name, bands != 3)]


def for_bands(
    spec: ViewSpec, mean: Sequence[float], std: Sequence[float], depth: Depth = 8
) -> tuple[ViewSpec, list[str]]:
    """The same views for images with other bands, and the operations left out because they have no meaning there.

    Brightness and contrast stay: one factor for all bands of an image, contrast about each band's own mean. Saturation,
    hue and gray need three bands; so does solarizing, which inverts values above half of white, which other sensors
    seldom reach. AutoAugment is defined on photos of 8 bits.

    Args:
        spec: of photos.
        mean: a number for each band, where white is 1.
        std: the same.
        depth: as in `ViewSpec`.
    """
    without = meaningless(spec.views, len(mean), depth)
    zero = dict.fromkeys(without, 0.0)
    in_jitter = {name: zero.pop(name) for name in ("saturation", "hue") if name in zero}
    views = tuple(
        replace(view, **zero, jitter=view.jitter and replace(view.jitter, **in_jitter))  # type: ignore[arg-type]
        for view in spec.views
    )
    return replace(spec, views=views, mean=tuple(mean), std=tuple(std), depth=depth), without


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; a probability is between 0 and 1")


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
