"""AutoAugment, beside torchvision's. `test_views_released.py` has it beside the released code's."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import AutoAugment, AutoAugmentPolicy, _apply_op

from clove_hub.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DeviceViews,
    Jitter,
    View,
    ViewSpec,
    allocate,
    draw,
    write_sample,
)
from clove_hub.views.auto_augment import CHANCES, OPERATIONS, POLICY, auto_augment

NAMES = {"color": "Color", "autocontrast": "AutoContrast", "shear_x": "ShearX"}
THEIRS = AutoAugment(AutoAugmentPolicy.IMAGENET)
SPACE = THEIRS._augmentation_space(10, (96, 96))
JITTER = Jitter(probability=1.0)
SPEC = ViewSpec(
    views=(
        View(size=96, scale=(0.2, 1.0), jitter=JITTER, blur=0.5, solarize=0.2),
        View(size=96, scale=(0.2, 1.0), jitter=JITTER, blur=0.5, solarize=0.2, auto_augment=0.5),
    )
)


def theirs(name):
    return NAMES.get(name, name.capitalize())


@pytest.fixture(scope="module")
def crop(photos):
    image = Image.open(sorted(photos.rglob("*.jpg"))[7]).convert("RGB")
    return np.array(image.resize((96, 96)))


def test_the_policy_is_torchvisions():
    expected = [[(n, p, m or 0) for n, p, m in pair] for pair in THEIRS.policies]
    assert [[(theirs(n), p, m) for n, p, m in pair] for pair in POLICY] == expected


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"shear_x", "solarize"}))  # torchvision has changed these two
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", range(10))
def test_each_operation_is_torchvisions(crop, name, sign, magnitude):
    magnitudes, signed = SPACE[theirs(name)]
    value = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    value = sign * value if signed else value
    image = Image.fromarray(crop)
    ours = OPERATIONS[name](image, magnitude, sign)
    expected = _apply_op(image, theirs(name), value, InterpolationMode.NEAREST, None)
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_sub_policies_are_drawn_evenly_and_their_operations_with_their_probability():
    draws = [draw(SPEC, 0, 0, index, 100, 120) for index in range(20_000)]
    policies = np.array([d.policies for d in draws])
    assert (policies[:, 0] == -1).all()
    used = policies[:, 1] >= 0
    assert used.mean() == pytest.approx(0.5, abs=0.015)
    counts = np.bincount(policies[used, 1], minlength=25)
    assert len(counts) == 25
    assert np.abs(counts / used.sum() - 0.04).max() < 0.008
    applied = np.array([d.applied[1] for d in draws])[used]
    for policy in range(25):
        share = applied[policies[used, 1] == policy].mean(0)
        assert np.abs(share - CHANCES[policy]).max() < 0.11
    assert np.array([d.negative[1] for d in draws])[used].mean() == pytest.approx(0.5, abs=0.02)
    # It takes the place of all that changes colors.
    jittered = np.array([d.jittered for d in draws])
    assert jittered[:, 0].all()
    assert (jittered[:, 1] == ~used).all()
    for field, share in (("gray", 0.2), ("sigmas", 0.5), ("solarized", 0.2)):
        chosen = np.array([getattr(d, field) for d in draws]) > 0
        assert not chosen[used, 1].any(), field
        assert chosen[~used, 1].mean() == pytest.approx(share, abs=0.02), field


def test_nothing_else_of_a_draw_changes():
    plain = ViewSpec(views=(SPEC.views[0], SPEC.views[0]))
    for index in range(20):
        ours, without = (draw(spec, 0, 0, index, 100, 120) for spec in (SPEC, plain))
        for field in ("crops", "boxes", "flipped", "factors", "orders"):
            assert np.array_equal(getattr(ours, field), getattr(without, field)), field
        for field in ("gray", "sigmas", "solarized"):
            expected = np.where(ours.policies < 0, getattr(without, field), 0)
            assert np.array_equal(getattr(ours, field), expected), field


def test_crops_are_augmented_in_the_worker_and_nowhere_else(photos):
    image = np.array(Image.open(sorted(photos.rglob("*.jpg"))[3]).convert("RGB"))
    for index in range(30):
        drawn = draw(SPEC, 0, 0, index, *image.shape[:2])
        batch, plain = allocate(SPEC, 1), allocate(SPEC, 1)
        write_sample(batch, 0, image, drawn)
        without = draw(ViewSpec(views=(SPEC.views[0], SPEC.views[0])), 0, 0, index, *image.shape[:2])
        write_sample(plain, 0, image, without)
        crops, before = batch.crops[0].numpy(), plain.crops[0].numpy()
        assert np.array_equal(crops[0], before[0])
        if drawn.policies[1] < 0:
            assert np.array_equal(crops[1], before[1])
            continue
        # Flipped first, and nothing after it but the normalization.
        top, left, height, width = drawn.crops[1]
        picture = Image.fromarray(image).crop((left, top, left + width, top + height))
        picture = picture.resize((96, 96), Image.Resampling.BICUBIC)
        if drawn.flipped[1]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = np.asarray(auto_augment(picture, drawn.policies[1], drawn.applied[1], drawn.negative[1]))
        (views,) = DeviceViews(SPEC)(batch)
        found = views.pixels[1, 0].permute(1, 2, 0).numpy() * IMAGENET_STD + IMAGENET_MEAN
        assert np.abs(found * 255 - expected).max() < 1e-3


def test_it_is_a_probability():
    with pytest.raises(ValueError, match=r"View\.auto_augment is 1\.5"):
        View(size=8, scale=(0.1, 1.0), auto_augment=1.5)
