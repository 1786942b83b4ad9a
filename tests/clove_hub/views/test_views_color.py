"""What happens to the colors of a view: against Pillow, torchvision and the operations written out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as pillow_ops
from torchvision.transforms.v2 import functional as float_ops

from clove_hub.views import CropBatch, DeviceViews, Draw, Jitter, View, Views, ViewSpec, allocate, draw, write_sample
from clove_hub.views import color as color_module
from clove_hub.views.blur import box_bank, box_weights, gaussian_blur
from clove_hub.views.color import blend_, gray, turn_hue_

SUBSETS = ("bsds", "coco", "food", "imagenet", "sunhays", "urban100")
PLAIN = View(48, scale=(0.3, 1.0), flip=0.0, jitter=None, gray=0.0)


def clove_views(large: int, small: int) -> ViewSpec:
    """CLoVE's two global and, for its six, two local views."""
    jitter = Jitter(0.4, 0.4, 0.2, 0.1, probability=0.8)
    first = View(large, scale=(0.2, 1.0), jitter=jitter, blur=1.0)
    second = View(large, scale=(0.2, 1.0), jitter=jitter, blur=0.1, solarize=0.2)
    local = View(small, scale=(0.08, 0.3), jitter=jitter, blur=0.5)
    return ViewSpec((first, second, local, local))


def scene(seed: int, height: int, width: int) -> np.ndarray:
    """Colorful smooth shapes with a little noise, where no photo is needed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width][..., None] / 10.0
    waves = np.sin(x * rng.uniform(0.3, 2, 3) + y * rng.uniform(0.3, 2, 3) + rng.uniform(0, 6, 3))
    return (127 + 120 * waves + rng.normal(0, 5, (height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=["photos", "scenes"])
def images(request: pytest.FixtureRequest) -> list[np.ndarray]:
    """Twelve images, uint8 (H, W, 3): photos of several kinds and, wherever the tests run, made-up scenes."""
    if request.param == "scenes":
        return [scene(seed, 200 + 10 * seed, 320 - 10 * seed) for seed in range(12)]
    folder: Path = request.getfixturevalue("photos")
    paths = [path for subset in SUBSETS for path in sorted((folder / subset).iterdir())[:2]]
    return [np.array(Image.open(path).convert("RGB")) for path in paths]


def batch_of(spec: ViewSpec, images: list[np.ndarray], draws: list[Draw]) -> CropBatch:
    batch = allocate(spec, len(images))
    for position, (image, d) in enumerate(zip(images, draws, strict=True)):
        write_sample(batch, position, image, d)
    return batch


def draws_for(spec: ViewSpec, images: list[np.ndarray], first: int = 0) -> list[Draw]:
    return [draw(spec, 0, 0, first + i, *image.shape[:2]) for i, image in enumerate(images)]


def levels(views: Views, spec: ViewSpec) -> np.ndarray:
    """The normalized pixels back in 8-bit levels, (V, B, S, S, 3)."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    return ((views.pixels.float() * std + mean) * 255).movedim(2, 4).numpy()


def as_planes(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float().contiguous()


def crops_of(batch: CropBatch, spec: ViewSpec) -> list[np.ndarray]:
    """The uint8 crops (B, S, S, 3) of each view."""
    return [crop.numpy() for crops in batch.crops for crop in crops]


# ------------------------------------------------------------------------------------------------ blur


@pytest.mark.parametrize("size", [96, 224])
def test_blur_is_that_of_pillow(images: list[np.ndarray], size: int) -> None:
    sigmas = np.array([0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.4142, 1.5, 1.8, 1.99, 2.0], dtype=np.float32)
    squares = [np.array(Image.fromarray(image).resize((size, size))) for image in images]
    bank = box_bank(size, 2.0)
    weights = torch.from_numpy(box_weights(sigmas, len(bank)))
    ours = gaussian_blur(torch.cat([as_planes(square) for square in squares]), weights, bank)
    errors = []
    for square, sigma, blurred in zip(squares, sigmas, ours, strict=True):
        pillow = Image.fromarray(square).filter(ImageFilter.GaussianBlur(float(sigma)))
        errors.append(np.abs(blurred.permute(1, 2, 0).numpy() - np.asarray(pillow)))
    assert np.mean([error.mean() for error in errors]) < 0.5
    assert max(error.max() for error in errors) < 4


@pytest.mark.parametrize(("size", "sigma"), [(7, 0.3), (20, 1.0), (60, 2.0), (130, 3.7), (9, 6.0), (1, 1.0)])
def test_blur_is_three_boxes_with_a_repeated_border(size: int, sigma: float) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (size, size))
    length = np.sqrt(12 * sigma**2 / 3 + 1)  # of the box with a third of the variance, were it a whole number
    whole = int((length - 1) // 2)
    # The fraction of a pixel at either end that makes the variance of one box sigma^2 / 3.
    inside = sum(d * d for d in range(-whole, whole + 1))
    third = sigma**2 / 3
    part = (third * (2 * whole + 1) - inside) / (2 * ((whole + 1) ** 2 - third))

    def box(line: np.ndarray) -> np.ndarray:
        total = 2 * whole + 1 + 2 * part
        result = np.zeros_like(line)
        for i in range(len(line)):
            for distance in range(-whole - 1, whole + 2):
                weight = part if abs(distance) > whole else 1.0
                result[i] += weight / total * line[min(max(i + distance, 0), len(line) - 1)]
        return result

    expected = image
    for axis in (1, 0):
        for _ in range(3):
            expected = np.apply_along_axis(box, axis, expected)
    bank = box_bank(size, max(sigma, 2.0))
    weights = torch.from_numpy(box_weights(np.array([sigma], dtype=np.float32), len(bank)))
    ours = gaussian_blur(torch.from_numpy(image).float().expand(1, 3, size, size), weights, bank)
    np.testing.assert_allclose(ours[0, 1].numpy(), expected, atol=2e-3)


# -------------------------------------------------------------------------------------- jitter, gray


FLOAT_OPS = (
    float_ops.adjust_brightness,
    float_ops.adjust_contrast,
    float_ops.adjust_saturation,
    float_ops.adjust_hue,
)
PILLOW_OPS = (
    pillow_ops.adjust_brightness,
    pillow_ops.adjust_contrast,
    pillow_ops.adjust_saturation,
    pillow_ops.adjust_hue,
)


# The middle and the ends of CLoVE's ranges, and half a turn of the hue.
FACTORS = (
    (0.6, 0.83, 1.0, 1.17, 1.4),
    (0.6, 0.83, 1.0, 1.17, 1.4),
    (0.8, 0.91, 1.0, 1.07, 1.2),
    (-0.5, -0.1, -0.037, 0.0, 0.05, 0.1),
)


def adjusted(image: np.ndarray, operation: int, factor: float, rounded: bool) -> np.ndarray:
    """One jitter operation of ours on one image, (H, W, 3) in levels."""
    x = as_planes(image)
    one = torch.full((1, 1, 1, 1), factor)
    if operation == 0:
        blend_(x, one, None, None, rounded)
    elif operation == 1:
        blend_(x, one, None, torch.ones_like(one), rounded)
    elif operation == 2:
        blend_(x, one, torch.ones_like(one), None, rounded)
    else:
        turn_hue_(x, one[0], rounded)
    return x[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_operation_is_that_of_torchvision(images: list[np.ndarray], operation: int) -> None:
    for image, factor in itertools.product(images[::2], FACTORS[operation]):
        expected = FLOAT_OPS[operation](torch.from_numpy(image).permute(2, 0, 1) / 255, factor)
        ours = adjusted(image, operation, factor, rounded=False)
        assert np.abs(ours - 255 * expected.permute(1, 2, 0).numpy()).max() < 0.01


@pytest.mark.parametrize("operation", range(3), ids=["brightness", "contrast", "saturation"])
def test_rounded_blends_equal_those_of_pillow(images: list[np.ndarray], operation: int) -> None:
    for image, factor in itertools.product(images[::2], FACTORS[operation]):
        expected = np.asarray(PILLOW_OPS[operation](Image.fromarray(image), factor))
        np.testing.assert_array_equal(adjusted(image, operation, factor, rounded=True), expected)


def test_rounded_hue_is_that_of_pillow(images: list[np.ndarray]) -> None:
    for image, turn in itertools.product(images[::2], FACTORS[3]):
        expected = np.asarray(pillow_ops.adjust_hue(Image.fromarray(image), turn)).astype(int)
        difference = np.abs(adjusted(image, 3, turn, rounded=True) - expected)
        assert difference.mean() < 0.01
        assert difference.max() <= 6  # the step from one to the next of Pillow's 256 hues


def test_every_color_at_every_hue_is_turned_right() -> None:
    values = torch.arange(0, 256, 15)
    cube = torch.cartesian_prod(values, values, values).to(torch.uint8).numpy()[:, None]  # every 15th level
    for factor in (-0.5, -1 / 3, -1 / 6, -0.05, 0.0, 0.09, 1 / 6, 1 / 3, 0.5):
        expected = float_ops.adjust_hue(torch.from_numpy(cube).permute(2, 0, 1) / 255, factor)
        ours = adjusted(cube, 3, factor, rounded=False)
        assert np.abs(ours - 255 * expected.permute(1, 2, 0).numpy()).max() < 0.01


def test_rounded_gray_is_pillows_mode_l(images: list[np.ndarray]) -> None:
    for image in images:
        expected = np.asarray(Image.fromarray(image).convert("L"))
        np.testing.assert_array_equal(gray(as_planes(image), rounded=True)[0, 0].numpy(), expected)


# ------------------------------------------------------------------------------------- the whole chain


def pillow_chain(crop: np.ndarray, d: Draw, view: int) -> np.ndarray:
    """What the released transform does to a crop: flip, jitter, gray, blur, solarize, all in Pillow."""
    image = Image.fromarray(crop)
    if d.flipped[view]:
        image = ImageOps.mirror(image)
    if d.jittered[view]:
        for operation in d.orders[view]:
            image = PILLOW_OPS[operation](image, float(d.factors[view][operation]))
    if d.gray[view]:
        image = image.convert("L").convert("RGB")
    if d.sigmas[view] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(d.sigmas[view])))
    if d.solarized[view]:
        image = ImageOps.solarize(image)
    return np.asarray(image)


def test_rounded_views_are_those_of_the_pillow_transform(images: list[np.ndarray]) -> None:
    spec = clove_views(224, 96)
    draws = draws_for(spec, images)
    batch = batch_of(spec, images, draws)
    ours = [view for v in DeviceViews(spec, round_like_pillow=True)(batch) for view in levels(v, spec)]
    errors = []
    for view, (crops, pixels) in enumerate(zip(crops_of(batch, spec), ours, strict=True)):
        for d, crop, own in zip(draws, crops, pixels, strict=True):
            errors.append(np.abs(own - pillow_chain(crop, d, view)))
    assert np.mean([error.mean() for error in errors]) < 0.5
    assert max(error.max() for error in errors) < 10


def test_in_all_24_orders_jitter_is_torchvisions_in_float() -> None:
    spec = ViewSpec((dataclasses.replace(PLAIN, jitter=Jitter(0.4, 0.4, 0.4, 0.2, probability=1.0)),))
    images = [scene(seed, 60, 70) for seed in range(24)]
    orders = np.array(list(itertools.permutations(range(4))), dtype=np.int8)
    draws = [
        dataclasses.replace(d, orders=order[None]) for d, order in zip(draws_for(spec, images), orders, strict=True)
    ]
    batch = batch_of(spec, images, draws)
    ours = levels(DeviceViews(spec)(batch)[0], spec)[0]
    for d, crop, own in zip(draws, crops_of(batch, spec)[0], ours, strict=True):
        x = torch.from_numpy(crop).permute(2, 0, 1) / 255
        for operation in d.orders[0]:
            x = FLOAT_OPS[operation](x, float(d.factors[0][operation]))
        # torchvision's gray weights add up to 0.9999, by which four operations drift apart by hundredths.
        assert np.abs(own - 255 * x.permute(1, 2, 0).numpy()).max() < 0.05


def test_solarize_inverts_from_128_on() -> None:
    spec = ViewSpec((dataclasses.replace(PLAIN, solarize=1.0),))
    images = [scene(0, 60, 70)]
    batch = batch_of(spec, images, draws_for(spec, images))
    expected = ImageOps.solarize(Image.fromarray(crops_of(batch, spec)[0][0]))
    np.testing.assert_allclose(levels(DeviceViews(spec)(batch)[0], spec)[0, 0], np.asarray(expected), atol=1e-3)


def test_a_flipped_view_is_the_mirrored_view_with_its_box_mirrored() -> None:
    seen, mirrored = (clove_views(48, 24) for _ in range(2))
    seen, mirrored = (
        ViewSpec(tuple(dataclasses.replace(view, flip=flip) for view in spec.views))
        for spec, flip in ((seen, 0.0), (mirrored, 1.0))
    )
    images = [scene(seed, 60, 70) for seed in range(6)]
    outputs = [DeviceViews(spec)(batch_of(spec, images, draws_for(spec, images))) for spec in (seen, mirrored)]
    for straight, flipped in zip(*outputs, strict=True):
        torch.testing.assert_close(flipped.pixels, straight.pixels.flip(-1), atol=1e-4, rtol=0)
        assert torch.equal(flipped.boxes[..., [2, 1, 0, 3]], straight.boxes)
        assert flipped.flipped.all()
        assert not straight.flipped.any()


# --------------------------------------------------------------------------------------- the module


SPEC = clove_views(40, 24)


@pytest.fixture(scope="module")
def batch() -> CropBatch:
    images = [scene(seed, 60, 70) for seed in range(12)]
    return batch_of(SPEC, images, draws_for(SPEC, images))


def test_views_come_as_channels_last_groups_with_boxes_and_flips(batch: CropBatch) -> None:
    groups = DeviceViews(SPEC)(batch)
    assert [tuple(views.pixels.shape) for views in groups] == [(2, 12, 3, 40, 40), (2, 12, 3, 24, 24)]
    for views, boxes, flipped in zip(groups, batch.boxes, batch.flipped, strict=True):
        assert views.pixels.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert views.pixels.dtype == torch.float32
        assert torch.equal(views.boxes, boxes)
        assert torch.equal(views.flipped, flipped)


def test_a_batch_is_not_changed_by_being_viewed(batch: CropBatch) -> None:
    before = [crops.clone() for crops in batch.crops]
    module = DeviceViews(SPEC)
    first = module(batch)
    assert all(torch.equal(a, b) for a, b in zip(batch.crops, before, strict=True))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, module(batch), strict=True))


@pytest.mark.parametrize("pixels", [1, 5 * 24 * 24, 10**9])
def test_chunks_of_any_size_give_the_same_views(batch: CropBatch, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    expected = DeviceViews(SPEC)(batch)
    monkeypatch.setattr(color_module, "_CPU_PIXELS", pixels)
    for a, b in zip(DeviceViews(SPEC)(batch), expected, strict=True):
        torch.testing.assert_close(a.pixels, b.pixels, atol=1e-4, rtol=0)


def test_a_sample_looks_the_same_in_any_batch(batch: CropBatch) -> None:
    together = DeviceViews(SPEC)(batch)
    for index in (0, 7):
        image = scene(index, 60, 70)
        alone = DeviceViews(SPEC)(batch_of(SPEC, [image], draws_for(SPEC, [image], first=index)))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a.pixels[:, 0], b.pixels[:, index], atol=1e-4, rtol=0)


def test_float16_stays_within_a_level_of_float32(batch: CropBatch) -> None:
    groups = zip(DeviceViews(SPEC, torch.float16)(batch), DeviceViews(SPEC)(batch), strict=True)
    for half, single in groups:
        assert half.pixels.dtype == torch.float16
        difference = np.abs(levels(half, SPEC) - levels(single, SPEC))
        assert difference.mean() < 0.15
        assert difference.max() < 2


def test_autocast_does_not_reach_the_views(batch: CropBatch) -> None:
    expected = DeviceViews(SPEC)(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = DeviceViews(SPEC)(batch)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(inside, expected, strict=True))


def test_the_plan_is_all_that_the_host_reads(batch: CropBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors on the meta device have no values: asking for one, which would stall an accelerator, raises.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    groups = DeviceViews(SPEC).to("meta")(batch.to("meta"))
    assert [tuple(views.pixels.shape) for views in groups] == [(2, 12, 3, 40, 40), (2, 12, 3, 24, 24)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.2), (torch.float16, 2.0)])
def test_cuda_shows_the_same_views_and_is_never_waited_for(batch: CropBatch, dtype: torch.dtype, limit: float) -> None:
    expected = DeviceViews(SPEC)(batch)
    module, there = DeviceViews(SPEC, dtype).cuda(), batch.pin_memory().to("cuda", non_blocking=True)
    module(there)  # the first call may set up its libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        groups = module(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for views, reference in zip(groups, expected, strict=True):
        assert views.pixels.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        here = views._replace(pixels=views.pixels.cpu())
        assert np.abs(levels(here, SPEC) - levels(reference, SPEC)).max() < limit


def test_there_is_nothing_to_train_or_save() -> None:
    module = DeviceViews(SPEC)
    assert not list(module.parameters())
    assert not module.state_dict()


def test_a_batch_on_another_device_is_refused(batch: CropBatch) -> None:
    with pytest.raises(ValueError, match="the crops are on meta, but DeviceViews on cpu"):
        DeviceViews(SPEC)(batch.to("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_a_type_that_cannot_hold_the_colors_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"use torch.float16 or torch.float32"):
        DeviceViews(SPEC, dtype)
