"""Views beside what the released transforms made of the same random numbers: crops, boxes, pixels."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from clove_hub.geometry import shared_region
from clove_hub.views import IMAGENET_MEAN, IMAGENET_STD, DeviceViews, Overlap, View, ViewSpec, allocate, write_sample
from clove_hub.views.auto_augment import POLICY, auto_augment
from clove_hub.views.draw import Draw, _crops, _overlapping, _sizes, _table, crop_boxes

Recording = Mapping[str, NDArray]
INTERPOLATIONS = {"clove": "bicubic", "slotcon": "bicubic", "pixpro": "bilinear", "revisiting": "bilinear"}


def photo(seed: int, number: int, height: int, width: int) -> NDArray[np.uint8]:
    """The picture that was recorded: sums of waves, and noise."""
    rng = np.random.default_rng([seed, 2000 + number])
    y, x = np.mgrid[:height, :width]
    channels = []
    for _ in range(3):
        total = np.zeros((height, width), np.int64)
        for _ in range(3):
            a, b, phase = rng.integers(-9, 10), rng.integers(-9, 10), rng.integers(0, 512)
            total += np.abs((a * x + b * y + phase) % 512 - 256)
        channels.append(total // 3)
    noise = rng.integers(-12, 13, (height, width, 3))
    return (np.stack(channels, -1) + noise).clip(0, 255).astype(np.uint8)


# ---- boxes -----------------------------------------------------------------------------------------------------------


def recorded_boxes(g: Recording, convention: str) -> NDArray[np.float64]:
    """(2, 200, 4)."""
    crops, flips = g["crops"].astype(np.int64), g["flips"]
    boxes = [crop_boxes(crops[:, i], flips[:, i], int(h), int(w), convention) for i, (w, h) in enumerate(g["size"])]
    return np.stack(boxes, 1)


@pytest.mark.parametrize("method", ["clove", "pixpro"])
def test_boxes_by_centers_are_cloves_and_pixpros(method: str, golden: Mapping[str, Recording]) -> None:
    g = golden["boxes"]
    assert np.abs(recorded_boxes(g, "centers") - g[f"{method}_boxes"]).max() <= 1e-6


def test_regions_of_boxes_by_edges_are_slotcons(golden: Mapping[str, Recording]) -> None:
    g = golden["boxes"]
    boxes = torch.from_numpy(recorded_boxes(g, "edges").astype(np.float32))
    regions, shared = shared_region(boxes, boxes.flip(0))
    # A flipped view is walked from right to left here.
    flipped = torch.from_numpy(g["flips"]).unsqueeze(-1)
    regions = torch.where(flipped, regions[..., [2, 1, 0, 3]], regions).numpy()
    meet = g["slotcon_intersection"] > 0
    assert np.array_equal(shared[0].numpy(), meet)
    assert np.abs(regions - g["slotcon_regions"])[:, meet].max() <= 1e-6


SEARCHES = {
    "clove_global": (0.2, 1.0),
    "clove_local": (0.08, 0.3),
    "pixpro": (0.08, 1.0),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_crops_are_found_as_in_the_released_code(name: str, golden: Mapping[str, Recording]) -> None:
    g = golden["boxes"]
    tries = np.random.default_rng([int(g["seed"]), 5000]).random((len(g["size"]), 50, 4))
    table = _table(ViewSpec((View(8, SEARCHES[name]),)))
    for i, (width, height) in enumerate(g["size"].tolist()):
        assert np.array_equal(free_crop(table, tries[i, :10], height, width)[0], g[f"{name}_search"][i])


def free_crop(table, tries: NDArray[np.float64], height: int, width: int) -> NDArray[np.int64]:
    """(1, 4) from ten tries, each with a place of its own; ours draws one place for the try that fits."""
    area, ratio, down, across = tries.T
    _, _, fits = _sizes(table.area[:, :1], table.ratio[:, :1], area[None], ratio[None], height, width)
    first = fits[0].argmax()
    return _crops(table, np.concatenate([area, ratio])[None], np.array([[down[first], across[first]]]), height, width)


@pytest.mark.parametrize(
    ("name", "scales", "share"), [("slotcon", [(0.08, 1.0)] * 2, 0.01), ("revisiting", [(0.2, 1.0), (0.05, 0.14)], 0.1)]
)
def test_constrained_crops_are_found_as_in_the_released_code(
    name: str, scales: list[tuple[float, float]], share: float, golden: Mapping[str, Recording]
) -> None:
    g = golden["boxes"]
    tries = np.random.default_rng([int(g["seed"]), 5000]).random((len(g["size"]), 50, 4))
    alone = [_table(ViewSpec((View(8, scale),))) for scale in scales]
    table = _table(ViewSpec((View(8, scales[0]), View(8, scales[1], overlap=Overlap(0, share)))))
    for i, (width, height) in enumerate(g["size"].tolist()):
        own, other = (free_crop(t, tries[i, at : at + 10], height, width) for t, at in zip(alone, (0, 20), strict=True))
        crops = np.concatenate([own, other])
        found = _overlapping(table, tries[i, 10:20].T[None], crops, height, width)
        assert np.array_equal(np.concatenate([own, found]), g[f"{name}_search"][:, i]), i


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_all_sub_policies_are_the_released_ones_bit_for_bit(golden: Mapping[str, Recording]) -> None:
    g = golden["pixels"]
    size = g["auto_augment"].shape[2]
    picture = photo(int(g["seed"]), 6, size, size)
    number = np.arange(size * size).reshape(size, size)
    picture[..., 0] = number * 256 // size**2
    picture[..., 1] = 30 + number.T * 170 // size**2
    both = np.ones(2, dtype=np.bool_)
    for policy in range(len(POLICY)):
        for sign, negative in enumerate((~both, both)):
            found = np.asarray(auto_augment(Image.fromarray(picture), policy, both, negative))
            assert np.array_equal(found, g["auto_augment"][policy, sign]), (policy, sign)


@pytest.mark.parametrize("method", INTERPOLATIONS)
def test_views_are_the_released_ones_within_the_levels_of_rounding(
    method: str, golden: Mapping[str, Recording]
) -> None:
    """Auto-augmented ones bit for bit. The resize of the others rounds a few pixels to a neighboring level."""
    g = golden["pixels"]
    expected = [g[f"{method}_large"]] + ([g[f"{method}_small"]] if f"{method}_small" in g else [])
    sizes = [group.shape[2] for group in expected for _ in range(group.shape[1])]
    how = INTERPOLATIONS[method]
    spec = ViewSpec(tuple(View(size, (0.1, 1.0), blur=1.0, interpolation=how) for size in sizes))
    fields = set(Draw.__dataclass_fields__) - {"gray", "boxes", "interpolations"}
    for picture, (height, width) in enumerate(g["image_sizes"].tolist()):
        drawn = {field: g[f"{method}_{field}"][picture] for field in fields}
        drawn |= {"gray": g[f"{method}_grey"][picture], "boxes": np.zeros((len(sizes), 4), np.float32)}
        batch = allocate(spec, 1)
        write_sample(
            batch, 0, photo(int(g["seed"]), picture, height, width), Draw(**drawn, interpolations=(how,) * len(sizes))
        )
        for rounded, most in ((True, 0.7), (False, 2.2)):
            groups = DeviceViews(spec, torch.float64, round_like_pillow=rounded)(batch)
            views = [levels(view[0]) for group in groups for view in group.pixels]
            recorded = [view for group in expected for view in group[picture]]
            for number, (found, view) in enumerate(zip(views, recorded, strict=True)):
                difference = np.abs(found - view)
                if drawn["policies"][number] >= 0:
                    assert difference.max() < 1e-6, (picture, number)
                else:
                    assert difference.mean() < most, (picture, number)
                    assert picture > 1 or difference.max() < 1.001, (picture, number)


def levels(view: torch.Tensor) -> NDArray[np.float64]:
    """Normalized pixels (3, S, S) as levels (S, S, 3)."""
    return (view.permute(1, 2, 0).double().numpy() * IMAGENET_STD + IMAGENET_MEAN) * 255
