"""Crops that must have something in common with another one, against a sampler written as plainly as possible."""

import math
import random

import numpy as np
import pytest
from scipy.stats import ks_2samp

from clove_hub.views import Overlap, View, ViewSpec, draw

DRAWS = 100_000
HEIGHT, WIDTH = 300, 400
KEY = View(size=160, scale=(0.2, 1.0))
SMALL = View(size=96, scale=(0.05, 0.14), overlap=Overlap(view=1, share=0.1))
MOCO = ViewSpec(views=(KEY, KEY, SMALL, SMALL, SMALL, SMALL))
SLOTCON = ViewSpec(
    views=(View(size=224, scale=(0.08, 1.0)), View(size=224, scale=(0.08, 1.0), overlap=Overlap(0, 0.01)))
)


def naive_crop(rng, scale, constraint=None, share=0.0):
    """One crop, as the papers describe it: ten tries, the last resort a free one."""
    for _ in range(10):
        area = rng.uniform(*scale) * HEIGHT * WIDTH
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < w <= WIDTH and 0 < h <= HEIGHT):
            continue
        top, left = rng.randint(0, HEIGHT - h), rng.randint(0, WIDTH - w)
        if constraint is None or overlap((top, left, h, w), constraint) >= share:
            return top, left, h, w
    return naive_crop(rng, scale) if constraint else (0, 0, HEIGHT, WIDTH)


def overlap(crop, other):
    """The share of the first crop's area that lies within the second."""
    top, left, h, w = crop
    t, l, hh, ww = other  # noqa: E741
    down = max(0, min(top + h, t + hh) - max(top, t))
    across = max(0, min(left + w, l + ww) - max(left, l))
    return down * across / (h * w)


def shares(crops, others):
    """The same for arrays (N, 4)."""
    top, left, h, w = crops.T
    t, l, hh, ww = others.T  # noqa: E741
    down = np.minimum(top + h, t + hh) - np.maximum(top, t)
    across = np.minimum(left + w, l + ww) - np.maximum(left, l)
    return down.clip(0) * across.clip(0) / (h * w)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "constrained", "other"), [(MOCO, [2, 3, 4, 5], 1), (SLOTCON, [1], 0)], ids=["moco", "slotcon"]
)
def test_overlaps_and_scales_are_distributed_as_the_naive_samplers(spec, constrained, other):
    samples = DRAWS // len(constrained)
    crops = np.stack([draw(spec, 0, 0, index, HEIGHT, WIDTH).crops for index in range(samples)])  # (N, V, 4)
    ours = np.concatenate([shares(crops[:, view], crops[:, other]) for view in constrained])
    scales = np.concatenate([crops[:, view, 2] * crops[:, view, 3] for view in constrained]) / (HEIGHT * WIDTH)
    assert len(ours) == DRAWS

    rng = random.Random(1)
    view = spec.views[constrained[0]]
    naive, naive_scales = [], []
    for _ in range(20_000):
        key = naive_crop(rng, spec.views[other].scale)
        crop = naive_crop(rng, view.scale, key, view.overlap.share)
        naive.append(overlap(crop, key))
        naive_scales.append(crop[2] * crop[3] / (HEIGHT * WIDTH))
    # Four crops of one image share a key: their overlaps are tied, so a quarter of them is what the test may count.
    thin = slice(None, None, len(constrained))
    assert ks_2samp(ours[thin], naive).pvalue > 1e-3
    assert ks_2samp(scales[thin], naive_scales).pvalue > 1e-3
    failed, naive_failed = (np.mean(np.asarray(x) < view.overlap.share) for x in (ours, naive))
    assert failed == pytest.approx(naive_failed, abs=4 * math.sqrt((naive_failed + 1e-4) / 20_000))


def test_an_unconstrained_view_is_drawn_as_if_nothing_were_asked_of_the_others():
    free = ViewSpec(views=tuple(View(size=v.size, scale=v.scale) for v in MOCO.views))
    for index in range(50):
        with_overlap, without = (draw(spec, 3, 1, index, HEIGHT, WIDTH) for spec in (MOCO, free))
        assert np.array_equal(with_overlap.crops[:2], without.crops[:2])
        assert np.array_equal(with_overlap.flipped, without.flipped)
        assert np.array_equal(with_overlap.factors, without.factors)


def test_an_overlap_that_cannot_be_had_leaves_the_crop_free():
    """A large crop cannot lie within a small one."""
    spec = ViewSpec(views=(View(size=96, scale=(0.05, 0.05)), View(size=96, scale=(0.9, 1.0), overlap=Overlap(0, 0.5))))
    crops = draw(spec, 0, 0, 0, HEIGHT, WIDTH).crops
    free = ViewSpec(views=(View(size=96, scale=(0.05, 0.05)), View(size=96, scale=(0.9, 1.0))))
    assert np.array_equal(crops, draw(free, 0, 0, 0, HEIGHT, WIDTH).crops)


def test_a_full_overlap_lies_within():
    spec = ViewSpec(views=(View(size=96, scale=(0.9, 0.9)), View(size=96, scale=(0.01, 0.01), overlap=Overlap(0, 1.0))))
    inside = [draw(spec, 0, 0, index, HEIGHT, WIDTH).crops for index in range(200)]
    assert np.mean([shares(crops[1:], crops[:1])[0] == 1 for crops in inside]) > 0.99


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Overlap(-1, 0.1), r"Overlap\.view is -1"),
        (lambda: Overlap(0, 0.0), r"Overlap\.share is 0\.0"),
        (lambda: ViewSpec(views=(View(8, (0.1, 1.0), overlap=Overlap(0, 0.1)),)), "view 0 .* overlap with view 0"),
        (lambda: ViewSpec(views=(View(8, (0.1, 1.0), overlap=Overlap(3, 0.1)),)), "one of the 1 views"),
        (
            lambda: ViewSpec(views=(KEY, *(View(160, (0.1, 1.0), overlap=Overlap(i, 0.1)) for i in (0, 1)))),
            "and one without overlap",
        ),
    ],
)
def test_an_overlap_that_makes_no_sense_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
