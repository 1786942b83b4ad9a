"""What is drawn for a sample's views and how its crops are cut: against torchvision's and Pillow's own."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from clove_hub.views import CropBatch, Draw, Jitter, Purpose, View, ViewSpec, allocate, draw, stream, write_sample

SPEC = ViewSpec(
    (
        View(48, scale=(0.2, 1.0), jitter=Jitter(), blur=1.0),
        View(48, scale=(0.2, 1.0), jitter=Jitter(), blur=0.1, solarize=0.2),
        View(24, scale=(0.08, 0.3), jitter=Jitter(), blur=0.5),
    )
)


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def equal(a: Any, b: Any) -> bool:
    """Equal in every array of two draws or plans."""
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))


def many(spec: ViewSpec, height: int, width: int, samples: int) -> list[Draw]:
    return [draw(spec, 0, 0, index, height, width) for index in range(samples)]


# ---------------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View(0, scale=(0.2, 1.0)), "View.size is 0"),
        (lambda: View(8, scale=(0.5, 0.2)), r"View.scale is \(0.5, 0.2\)"),
        (lambda: View(8, scale=(0.2, 1.5)), "0 < low <= high <= 1"),
        (lambda: View(8, scale=(0.0, 1.0)), "View.scale"),
        (lambda: View(8, scale=(float("nan"), 1.0)), "View.scale"),
        (lambda: View(8, scale=(0.2, 1.0), ratio=(1.0, float("inf"))), "View.ratio"),
        (lambda: View(8, scale=(0.2, 1.0), blur_sigma=(2.0, 0.1)), "View.blur_sigma"),
        (lambda: View(8, scale=(0.2, 1.0), flip=1.5), "View.flip is 1.5"),
        (lambda: View(8, scale=(0.2, 1.0), solarize=-0.1), "View.solarize is -0.1"),
        (lambda: View(8, scale=(0.2, 1.0), interpolation="nearest"), "'nearest'; choose one of bicubic, bilinear"),
        (lambda: ViewSpec((View(8, (0.2, 1.0)),), boxes="corners"), "'corners'; choose one of centers, edges"),
        (lambda: Jitter(brightness=-0.4), "Jitter.brightness is -0.4"),
        (lambda: Jitter(hue=0.6), "Jitter.hue is 0.6"),
        (lambda: Jitter(probability=2), "Jitter.probability is 2"),
        (lambda: ViewSpec(()), "needs at least one view"),
        (lambda: ViewSpec((View(8, (0.2, 1)), View(4, (0.2, 1)), View(8, (0.2, 1)))), "must be adjacent"),
        (lambda: ViewSpec((View(8, (0.2, 1.0)),), std=(0.2, 0.0, 0.2)), "ViewSpec.std"),
        (lambda: ViewSpec((View(8, (0.2, 1.0)),), mean=(0.5, float("nan"), 0.5)), "ViewSpec.mean"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_neighboring_views_of_one_size_form_a_group() -> None:
    assert SPEC.groups == (slice(0, 2), slice(2, 3))


# ------------------------------------------------------------------------------------- streams and draws


def test_a_stream_can_be_opened_again_and_two_streams_share_no_number() -> None:
    arguments = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 2**63, 2)]
    numbers = [stream(*a).integers(0, 2**64, 5000, dtype=np.uint64) for a in arguments]
    again = [stream(*a).integers(0, 2**64, 5000, dtype=np.uint64) for a in arguments]
    assert np.array_equal(numbers, again)
    assert len(np.unique(numbers)) == 5000 * len(arguments)


def test_a_stream_advances_only_the_counter_words_that_hold_no_argument() -> None:
    generator = stream(3, 1, 7, Purpose.SUBSTITUTE)
    generator.random(100_000)
    counter = generator.bit_generator.state["state"]["counter"].tolist()
    assert counter[1:] == [0, 7, Purpose.SUBSTITUTE]
    assert counter[0] > 0


@pytest.mark.parametrize("bad", [{"seed": -1}, {"epoch": -2}, {"index": 2**64}, {"purpose": -1}])
def test_a_stream_without_a_whole_64_bit_number_is_refused(bad: dict[str, int]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        stream(**({"seed": 0, "epoch": 0, "index": 0, "purpose": 0} | bad))


def test_a_draw_depends_on_its_arguments_and_on_nothing_else() -> None:
    first = draw(SPEC, 1, 2, 3, 60, 80)
    np.random.seed(0)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(0)
    many(SPEC, 60, 80, 3)
    assert equal(first, draw(dataclasses.replace(SPEC), 1, 2, 3, 60, 80))
    for other in [(2, 2, 3, 60, 80), (1, 3, 3, 60, 80), (1, 2, 4, 60, 80), (1, 2, 3, 80, 60)]:
        assert not np.array_equal(first.crops, draw(SPEC, *other).crops)


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two empirical distribution functions (two-sample Kolmogorov-Smirnov)."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    return float(
        np.abs(np.searchsorted(a, at, side="right") / len(a) - np.searchsorted(b, at, side="right") / len(b)).max()
    )


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.2, 1.0)), (375, 500, (0.08, 0.3)), (200, 700, (0.3, 1.0)), (7, 5, (0.08, 1.0))],
)
def test_crops_are_distributed_like_those_of_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    samples, ratio = 5000, (3 / 4, 4 / 3)
    spec = ViewSpec((View(8, scale=scale),) * 5)
    ours = np.concatenate([d.crops for d in many(spec, height, width, samples // 5)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, list(scale), list(ratio)) for _ in range(samples)])

    def measures(crops: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = crops.astype(float).T
        return {
            "area": h * w,
            "aspect": w / h,
            "top": top,
            "left": left,
            "place down": top / np.maximum(height - h, 1),
            "place across": left / np.maximum(width - w, 1),
            "bottom": top + h,
            "right": left + w,
        }

    limit = 1.95 * np.sqrt(2 / samples)  # one test in a thousand passes it by chance
    for name, values in measures(ours).items():
        assert ks_distance(values, measures(theirs)[name]) < limit, name


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 20), (31, 30), (1, 50), (50, 1), (1, 1)])
def test_an_image_in_which_no_try_fits_gives_the_central_crop_of_torchvision(height: int, width: int) -> None:
    # The whole area at an aspect ratio that the image never has.
    ratio = (3 / 4, 4 / 3) if max(height, width) > 40 else (1.5, 2.0)
    spec = ViewSpec((View(8, scale=(1.0, 1.0), ratio=ratio),))
    expected = torchvision.transforms.RandomResizedCrop.get_params(
        torch.empty(3, height, width), [1.0, 1.0], list(ratio)
    )
    assert tuple(draw(spec, 0, 0, 0, height, width).crops[0]) == tuple(expected)


def test_a_central_crop_keeps_a_pixel_where_torchvision_has_none_left() -> None:
    spec = ViewSpec((View(8, scale=(1.0, 1.0), ratio=(2.5, 3.0)),))
    assert draw(spec, 0, 0, 0, 9, 1).crops.tolist() == [[4, 0, 1, 1]]


def test_every_probability_and_range_is_kept() -> None:
    spec = ViewSpec(
        (
            View(8, (0.2, 1.0), flip=0.5, jitter=Jitter(), gray=0.2, blur=0.3, solarize=0.1),
            View(8, (0.2, 1.0), flip=0.0, jitter=None, gray=0.0, blur=0.0, solarize=0.0),
            View(8, (0.2, 1.0), flip=1.0, jitter=Jitter(1.5, 0, 0, 0.5, 1.0), gray=1.0, blur=1.0, solarize=1.0),
        )
    )
    samples = 6000
    draws = many(spec, 30, 40, samples)
    some, none, every = (
        {name: np.stack([getattr(d, name)[view] for d in draws]) for name in Draw.__dataclass_fields__}
        for view in range(3)
    )
    for name, probability in (("flipped", 0.5), ("jittered", 0.8), ("gray", 0.2), ("solarized", 0.1)):
        assert abs(some[name].mean() - probability) < 0.025
        assert not none[name].any()
        assert every[name].all()
    assert abs((some["sigmas"] > 0).mean() - 0.3) < 0.025
    assert not none["sigmas"].any()
    assert every["sigmas"].min() >= np.float32(0.1)
    assert every["sigmas"].max() <= 2.0

    codes, counts = np.unique(some["orders"] @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(codes) == 24
    assert np.abs(counts - samples / 24).max() < 5 * np.sqrt(samples / 24)
    uniform = (np.arange(samples) + 0.5) / samples
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert ks_distance((some["factors"][:, column] - low) / (high - low), uniform) < 0.025
    assert every["factors"][:, 0].min() >= 0  # strength 1.5 would reach -0.5
    assert ks_distance(every["factors"][:, 0] / 2.5, uniform) < 0.025
    assert (every["factors"][:, 1:3] == 1).all()
    assert ks_distance((every["sigmas"] - 0.1) / 1.9, uniform) < 0.025
    # Nothing is coupled: that a view is flipped says nothing about what else happens to it.
    for name in ("jittered", "gray", "solarized", "sigmas"):
        assert abs(np.corrcoef(some["flipped"], some[name] > 0)[0, 1]) < 0.06


def test_boxes_are_the_pixel_centers_as_fractions_with_x_swapped_on_a_flip() -> None:
    height, width = 37, 53
    flips = 0
    for index in range(40):
        d = draw(SPEC, 0, 0, index, height, width)
        for (top, left, h, w), box, flipped in zip(d.crops.tolist(), d.boxes, d.flipped, strict=True):
            x0, x1 = left / (width - 1), (left + w - 1) / (width - 1)
            y0, y1 = top / (height - 1), (top + h - 1) / (height - 1)
            expected = [x1, y0, x0, y1] if flipped else [x0, y0, x1, y1]
            np.testing.assert_allclose(box, expected, rtol=1e-6)
            assert min(box) >= 0
            assert max(box) <= 1
            flips += flipped
    assert 30 < flips < 90


@pytest.mark.parametrize(("height", "width"), [(1, 40), (40, 1), (1, 1), (2, 2)])
def test_a_side_of_one_pixel_gives_finite_boxes(height: int, width: int) -> None:
    d = draw(SPEC, 0, 0, 0, height, width)
    assert np.isfinite(d.boxes).all()
    assert d.boxes.min() >= 0
    assert d.boxes.max() <= 1
    assert (d.crops[:, 2:] >= 1).all()
    assert (d.crops[:, 0] + d.crops[:, 2] <= height).all()
    assert (d.crops[:, 1] + d.crops[:, 3] <= width).all()
    write_sample(allocate(SPEC, 1), 0, noise(0, height, width), d)  # and can be cut


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="image 5 has 0 x 10 pixels"):
        draw(SPEC, 0, 0, 5, 0, 10)


# ----------------------------------------------------------------------------------------------- crops


def test_crops_are_those_of_pillow(photos: Path) -> None:
    spec = ViewSpec((View(224, (0.2, 1.0)), View(224, (0.2, 1.0)), View(96, (0.08, 0.3)), View(96, (0.08, 0.3))))
    direct, stepwise = [], []  # differences in 8-bit levels, one array for each crop
    for index, subset in enumerate(("bsds", "coco", "food", "imagenet", "sunhays", "urban100")):
        image = Image.open(sorted((photos / subset).iterdir())[0]).convert("RGB")
        d = draw(spec, 0, 0, index, image.height, image.width)
        batch = allocate(spec, 1)
        write_sample(batch, 0, np.asarray(image), d)
        ours = [crop[0].numpy() for crops in batch.crops for crop in crops]
        for crop, (top, left, h, w) in zip(ours, d.crops.tolist(), strict=True):
            size = len(crop)
            region = image.crop((left, top, left + w, top + h))
            rows = region.resize((size, h), Image.Resampling.BICUBIC)
            for differences, start in ((direct, region), (stepwise, rows)):
                pillow = np.asarray(start.resize((size, size), Image.Resampling.BICUBIC))
                differences.append(np.abs(crop.astype(int) - pillow.astype(int)))
    # The two passes in our order: along the rows, then along the columns.
    assert max(difference.mean() for difference in stepwise) < 0.01
    assert max(difference.max() for difference in stepwise) <= 2
    # Pillow may swap them where that is cheaper; what is rounded between the passes then differs.
    assert np.mean([difference.mean() for difference in direct]) < 0.05
    assert max(difference.mean() for difference in direct) < 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_crops_are_to_the_bit_those_of_interpolate_and_touch_nothing_beside_them(shared: bool) -> None:
    """Each crop is resized right into its place, by vector instructions that write more than one pixel at a time."""
    sizes = [*np.random.default_rng(0).integers(1, 120, (40, 2)).tolist(), [1, 1], [33, 1], [1, 33]]
    for size in (1, 5, 17, 32):
        spec = ViewSpec((View(size, (0.05, 1.0)), View(size, (0.05, 1.0))))
        for index, (height, width) in enumerate(sizes):
            image, d = noise(index, height, width), draw(spec, 0, 0, index, height, width)
            batch = allocate(spec, 3, shared)
            assert batch.crops[0].is_shared() == shared
            batch.crops[0].fill_(77)
            write_sample(batch, 1, image, d)
            for view, (top, left, h, w) in enumerate(d.crops.tolist()):
                region = torch.from_numpy(image[top : top + h, left : left + w]).permute(2, 0, 1)[None]
                expected = F.interpolate(region, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
                assert torch.equal(batch.crops[0][view, 1], expected)
            assert (batch.crops[0][:, ::2] == 77).all()


def test_a_sample_is_bit_identical_in_any_batch_at_any_position() -> None:
    image = noise(0, 70, 90)
    d = draw(SPEC, 0, 0, 11, 70, 90)
    alone, crowd = allocate(SPEC, 1), allocate(SPEC, 5)
    write_sample(alone, 0, image, d)
    for position in (4, 0, 3, 1, 2):  # in another order, among others
        other = position != 3
        write_sample(
            crowd,
            position,
            noise(position + 1, 50, 40) if other else image,
            draw(SPEC, 0, 0, position, 50, 40) if other else d,
        )
    for group in range(2):
        assert torch.equal(crowd.crops[group][:, 3], alone.crops[group][:, 0])
        assert torch.equal(crowd.boxes[group][:, 3], alone.boxes[group][:, 0])
        assert torch.equal(crowd.flipped[group][:, 3], alone.flipped[group][:, 0])
        for field in dataclasses.fields(alone.color[group]):
            ours, theirs = (getattr(batch.color[group], field.name) for batch in (crowd, alone))
            np.testing.assert_array_equal(ours[:, 3], theirs[:, 0])


def test_a_batch_holds_each_group_with_its_boxes_and_flips() -> None:
    batch = allocate(SPEC, 2)
    draws = many(SPEC, 33, 44, 2)
    for position, d in enumerate(draws):
        write_sample(batch, position, noise(position, 33, 44), d)
    assert [tuple(crops.shape) for crops in batch.crops] == [(2, 2, 48, 48, 3), (1, 2, 24, 24, 3)]
    assert all(crops.dtype == torch.uint8 for crops in batch.crops)
    for group, views in enumerate(SPEC.groups):
        for position, d in enumerate(draws):
            np.testing.assert_array_equal(batch.boxes[group][:, position], d.boxes[views])
            np.testing.assert_array_equal(batch.flipped[group][:, position], d.flipped[views])
            np.testing.assert_array_equal(batch.color[group].orders[:, position], d.orders[views])


@pytest.mark.filterwarnings("error")
def test_an_image_that_may_not_be_written_or_lies_mirrored_in_memory_is_cut_all_the_same() -> None:
    image = noise(0, 40, 50)
    d = draw(SPEC, 0, 0, 0, 40, 50)
    batches = []
    locked = image.copy()
    locked.flags.writeable = False
    for variant in (image, locked, image[:, ::-1].copy()[:, ::-1]):
        batches.append(allocate(SPEC, 1))
        write_sample(batches[-1], 0, variant, d)
    for batch in batches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(batch.crops, batches[0].crops, strict=True))


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)],
)
def test_an_image_that_is_not_rgb_bytes_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
        write_sample(allocate(SPEC, 1), 0, image, draw(SPEC, 0, 0, 0, 4, 4))


def test_a_batch_of_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="samples is 0; a batch has at least one"):
        allocate(SPEC, 0)


class Batches(Dataset[CropBatch]):
    """Item i is the batch of the samples 2 i and 2 i + 1."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> CropBatch:
        batch = allocate(SPEC, 2)
        for position in range(2):
            index = 2 * item + position
            write_sample(batch, position, noise(index, 40, 50), draw(SPEC, 0, 0, index, 40, 50))
        return batch


def test_a_batch_comes_out_of_a_worker_as_it_was_made() -> None:
    there = list(DataLoader(Batches(), batch_size=None, num_workers=1))
    for batch, here in zip(there, (Batches()[0], Batches()[1]), strict=True):
        for name in ("crops", "boxes", "flipped"):
            assert all(torch.equal(a, b) for a, b in zip(getattr(batch, name), getattr(here, name), strict=True))
        assert all(equal(a, b) for a, b in zip(batch.color, here.color, strict=True))


def test_moving_a_batch_moves_its_tensors_and_leaves_the_plan_on_the_host() -> None:
    batch = Batches()[0]
    moved = batch.to("meta")
    tensors = [*moved.crops, *moved.boxes, *moved.flipped]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.color is batch.color
    assert all(
        isinstance(getattr(plan, field.name), np.ndarray) for plan in batch.color for field in dataclasses.fields(plan)
    )
    # Workers send batches so.
    assert equal(pickle.loads(pickle.dumps(batch)).color[0], batch.color[0])
