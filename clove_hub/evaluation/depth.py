"""A linear layer on frozen feature maps predicts the depth of each pixel: NYUv2, as in DINOv3's linear evaluation.

Siméoni et al., "DINOv3" (2025); the bins are AdaBins' (Bhat et al., CVPR 2021) with even widths. Only the layer is kept
in memory: every step reads and augments its images again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from clove_hub.data.depth import Distances, Pair, open_distances
from clove_hub.data.files import described
from clove_hub.geometry import upsampled

from ..weights.backbone import Backbone
from .kept import features_key, own_folder
from .processes import gather, share
from .progress import tracked
from .reading import batches, each_readable, in_threads, normalized, resized
from .result import Items, Outcome
from .scores import mean_and_deviation
from .unfinished import Training, state_in

VERSION = 1
RULE = "dinov3"
RANDOMNESS = "the probe"
PREPROCESSING = ("mean", "std")

BINS = 256
NEAREST = 0.001
"""Meters: the first bin, the least distance that is scored, and what logarithms are kept above."""
FIGURES = ("delta1", "delta2", "delta3", "RMSE", "abs-rel", "log10")
BORDER = (43, 45, 608, 472)
"""Of NYUv2's 640x480 pixels, what is learned from: x0, y0, x1, y1."""
EIGEN = (41, 45, 601, 471)
"""The same of what is scored (Eigen et al., NeurIPS 2014)."""
BETAS, BETA2, CLIP = (0.85, 0.95), 0.99, 35.0
WITHOUT_VARIANCE = 100
"""Steps at the beginning whose loss is the mean alone."""

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    levels: tuple[int, ...] = (-1,)
    """Feature levels, concatenated: -1 is the last, -2 the one before."""
    crop: tuple[int, int] = (416, 544)
    """Height and width of a training crop; scores are measured on whole images."""
    steps: int = 38_400
    """Training steps; the learning rate rises during the first third."""
    batch: int = 16
    """Images in a training step."""
    learning_rate: float = 3e-4
    """Initial value of the cosine that AdamW's learning rate follows."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    seeds: int = 1
    """Number of trainings, with the given seed and the following ones."""
    max_depth: float = 10.0
    """The last bin, in meters; pixels further away are not scored."""
    train: str = "train"
    """Name of the training split."""
    test: str = "test"
    """Name of the test split."""
    train_images: int | None = None
    """At most this many, spread evenly over the list; null for all."""
    test_images: int | None = None
    """Like `train_images`, for the test split."""

    def __post_init__(self) -> None:
        counts = (*self.crop, self.steps, self.batch, self.seeds, len(self.levels))
        limits = [limit for limit in (self.train_images, self.test_images) if limit is not None]
        if min(*counts, *limits) < 1 or self.learning_rate <= 0 or self.weight_decay < 0 or self.max_depth <= NEAREST:
            raise ValueError(f"{self}: all but weight_decay must be positive, with at least one level")


def evaluate(backbone: Backbone, data: Path, settings: Settings, seed: int) -> Outcome:
    """`delta1` to `delta3` (percent), `RMSE` (meters), `abs-rel`, `log10`: means over the test images, then over the seeds.

    Args:
        data: NYUv2 or your own data, in one of the layouts of `open_distances`.
    """
    train = open_distances(data, settings.train).spread(settings.train_images)
    test = open_distances(data, settings.test).spread(settings.test_images)
    read = backbone.preprocessing.reading

    def check(pair: Pair) -> bool:
        """Whether there is anything to learn; what is wrong should be said before the long part."""
        height, width = read.levels(pair[0]).shape[:2]
        x0, y0, x1, y1 = scaled(BORDER, height, width) if train.kinect else (0, 0, width, height)
        if y1 - y0 < settings.crop[0] or x1 - x0 < settings.crop[1]:
            raise ValueError(
                f"{pair[0]} has {x1 - x0}x{y1 - y0} pixels to learn from, fewer than crop={list(settings.crop)} (height, "
                f"width): set crop=[{min(y1 - y0, settings.crop[0])},{min(x1 - x0, settings.crop[1])}] or less"
            )
        return bool((train.meters(pair, (width, height)) > 0).any())

    known, kept, unread = each_readable(train.pairs, check, any, 64, data)
    if not any(known):
        raise ValueError(f"the maps of {data} ({settings.train}) hold only zeros: there is nothing to learn")
    train = train.of(kept)
    seeds = list(range(seed, seed + settings.seeds))

    def load(pair: Pair) -> tuple[Tensor, Map]:
        photo = read.levels(pair[0])
        truth = test.meters(pair, (photo.shape[1], photo.shape[0]))
        return normalized(photo, backbone.preprocessing.mean, backbone.preprocessing.std), truth

    def work(loaded: list[tuple[Tensor, Map]], probes: Sequence[nn.Module]) -> list[tuple[list[list[float]], int]]:
        """Of each image the figures by each probe, (seeds, 6), and the number of pixels that are scored."""
        found = []
        for pixels, truth in loaded:
            right = torch.from_numpy(truth).to(backbone.device)
            valid = scored(right, settings.max_depth, test.kinect)
            predicted = predict(backbone, probes, pixels, settings)
            found.append(([depth_scores(one, right, valid) for one in predicted], int(valid.sum())))
        return found

    files = [path for pair in train.pairs + test.pairs for path in pair]
    with own_folder(features_key(backbone, data, files, f"depth {settings} {seed} {train} {test}")) as folder:
        trained = gather(
            fit(backbone, train, settings, number, folder / f"{number}.unfinished").state_dict()
            for number in share(seeds)
        )
        probes = [probe_of(state, backbone.device) for state in trained]
        parts, tested, unread_tests = each_readable(
            test.pairs, load, lambda loaded: work(loaded, probes), 8, data, folder / "tested"
        )
    test = test.of(tested)
    rows = [(np.array(figures), count) for part in parts for figures, count in part]
    if not any(count for _, count in rows):
        raise ValueError(
            f"no pixel of {data} ({settings.test}) has a distance from {NEAREST} to {settings.max_depth} m"
        )
    means = np.nanmean(
        [figures for figures, _ in rows], axis=0
    )  # (seeds, 6); an image without a distance does not count
    metrics, deviations = mean_and_deviation([dict(zip(FIGURES, own, strict=True)) for own in means.tolist()])
    return Outcome(
        metrics,
        described(data, [path for pair in train.pairs + test.pairs for path in pair], len(test.pairs)),
        tuple(seeds),
        deviations,
        split=settings.test,
        items=by_image(data, test, rows),
        left_out=unread + unread_tests,
    )


def by_image(data: Path, test: Distances, rows: Sequence[tuple[NDArray[np.float64], int]]) -> Items:
    """The figures of each image, means over the seeds, and the number of pixels that are scored."""
    items: dict[str, dict[str, float]] = {}
    for (photo, _), (figures, count) in zip(test.pairs, rows, strict=True):
        if count:
            name = photo.relative_to(data).as_posix()
            items[name] = dict(zip(FIGURES, figures.mean(0).tolist(), strict=True)) | {"pixels": count}
    return {"image": items}


# ---- scores ----------------------------------------------------------------------------------------------------------


def scaled(box: tuple[int, int, int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """A box of NYUv2's 640x480 pixels in an image of another size."""
    x0, y0, x1, y1 = box
    return int(x0 / 640 * width), int(y0 / 480 * height), int(x1 / 640 * width), int(y1 / 480 * height)


def scored(truth: Tensor, max_depth: float, kinect: bool) -> Tensor:
    """Which pixels of a map (H, W) are scored: those with a distance in range, of NYUv2's in Eigen's crop."""
    valid = (truth > NEAREST) & (truth < max_depth)
    if kinect:
        x0, y0, x1, y1 = scaled(EIGEN, *truth.shape)
        inside = torch.zeros_like(valid)
        inside[y0:y1, x0:x1] = True
        valid &= inside
    return valid


def depth_scores(predicted: Tensor, truth: Tensor, valid: Tensor) -> list[float]:
    """`FIGURES` over the pixels that are scored, NaN where there is none.

    Args:
        predicted: meters, (H, W).
        truth: the same.
        valid: boolean, (H, W).
    """
    found, right = predicted[valid].double(), truth[valid].double()
    ratio = torch.maximum(found / right, right / found)
    return [
        *(100 * float((ratio < 1.25**power).double().mean()) for power in (1, 2, 3)),
        float((found - right).square().mean().sqrt()),
        float(((found - right).abs() / right).mean()),
        float((found.log10() - right.log10()).abs().mean()),
    ]


# ---- the layer -------------------------------------------------------------------------------------------------------


def distances(logits: Tensor, max_depth: float) -> Tensor:
    """The distance in each cell, a mean of the bins' distances: (B, BINS, h, w) -> (B, h, w)."""
    weights = logits.relu() + 0.1
    centers = torch.linspace(NEAREST, max_depth, BINS, device=logits.device)
    return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), centers)


def seen(backbone: Backbone, pixels: Tensor, levels: Sequence[int]) -> tuple[Tensor, tuple[float, float]]:
    """The map of images (B, C, H, W), and the part of its height and width that they cover."""
    whole = backbone.padded(pixels)
    covered = pixels.shape[2] / whole.shape[2], pixels.shape[3] / whole.shape[3]
    return backbone.joined(whole, levels).float(), covered


def predict(backbone: Backbone, probes: Sequence[nn.Module], pixels: Tensor, settings: Settings) -> list[Tensor]:
    """The distances in an image (C, H, W) by each probe, (H, W): the mean of the image's and its mirror image's."""
    twins = torch.stack([pixels, pixels.flip(2)])
    features, covered = seen(backbone, twins, settings.levels)
    found = []
    for probe in probes:
        own = upsampled(distances(probe(features), settings.max_depth), (pixels.shape[1], pixels.shape[2]), covered)
        found.append(((own[0] + own[1].flip(1)) / 2).clamp(NEAREST, settings.max_depth))
    return found


def new_probe(channels: int, generator: torch.Generator) -> nn.Sequential:
    """Batch norm and a 1x1 convolution, in training mode."""
    norm, layer = nn.BatchNorm2d(channels), nn.Conv2d(channels, BINS, 1)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(norm, layer)


def probe_of(state: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A trained layer, in eval mode."""
    probe = new_probe(len(state["0.weight"]), torch.Generator())
    probe.load_state_dict(state)
    return probe.eval().to(device)


def fit(backbone: Backbone, part: Distances, settings: Settings, seed: int, kept: Path | None = None) -> nn.Module:
    """Train the layer and return it on the CPU; the seed determines its initial weights, the images' order and crops.

    Args:
        part: images that can be read.
        kept: where the state of the training is saved, to resume from.
    """
    generator = torch.Generator().manual_seed(seed)

    def begun(channels: int) -> Training:
        probe = new_probe(channels, generator).to(backbone.device)
        return Training(probe, torch.optim.AdamW(probe.parameters(), weight_decay=settings.weight_decay), generator)

    state = state_in(kept)
    training = begun(len(state["layer"]["0.weight"])) if state else None
    done = training.restore(state) if training and state else 0
    order = in_order(len(part.pairs), settings.steps * settings.batch, seed)
    how = backbone.preprocessing

    def load(place: int) -> tuple[Tensor, Tensor]:
        pair = part.pairs[order[place]]
        photo = how.reading.levels(pair[0])
        truth = part.meters(pair, (photo.shape[1], photo.shape[0]))
        image, truth = varied(photo, truth, part.kinect, settings.crop, np.random.default_rng([seed, place]))
        return normalized(image, how.mean, how.std), torch.from_numpy(truth)

    steps = in_threads(load, batches(range(len(order)), settings.batch)[done:])
    for step, loaded in enumerate(tracked(steps, f"training, seed {seed}", settings.steps - done), done):
        pixels, truth = (torch.stack(column).to(backbone.device) for column in zip(*loaded, strict=True))
        features, covered = seen(backbone, pixels, settings.levels)
        training = training or begun(features.shape[1])
        learn(training, features, truth, covered, step, settings)
        training.keep(kept, step + 1, step + 1 == settings.steps)
    assert training is not None, "there are no steps"
    return training.layer.cpu()


def learn(
    training: Training, features: Tensor, truth: Tensor, covered: tuple[float, float], step: int, settings: Settings
) -> None:
    """One step. Nothing happens where there is no distance, or no variance.

    Args:
        features: (B, C, h, w).
        truth: meters, 0 where there is no distance: (B, H, W).
        covered: the part of the height and of the width of the features that the truth covers.
    """
    probe, optimizer, known = training.layer, training.optimizer, truth > 0
    if int(known.sum()) < 2:
        return
    for group in optimizer.param_groups:
        group["lr"], beta1 = schedule(step, settings.steps, settings.learning_rate)
        group["betas"] = (beta1, BETA2)
    with torch.enable_grad():
        found = upsampled(distances(probe(features), settings.max_depth), settings.crop, covered)
        warming = step < min(WITHOUT_VARIANCE, settings.steps // 3)
        loss = sig_loss(found.masked_select(known), truth.masked_select(known), not warming)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(probe.parameters(), CLIP)
    optimizer.step()


def sig_loss(predicted: Tensor, truth: Tensor, variance: bool) -> Tensor:
    """The scale-invariant loss in logarithms (Eigen et al., NeurIPS 2014) as AdaBins has it: (N,) and (N,), N >= 2.

    Args:
        variance: whether the variance counts; the mean always does.
    """
    difference = (predicted + NEAREST).log() - (truth + NEAREST).log()
    square = 0.15 * difference.mean().square()
    # Without a lower bound, the root would have no gradient at a perfect prediction.
    return (square + difference.var() if variance else square).clamp(min=1e-12).sqrt()


def schedule(step: int, steps: int, peak: float) -> tuple[float, float]:
    """The learning rate of a step, and AdamW's first beta, as DINOv3's program has them.

    The rate is a cosine over all steps that falls to peak / 25000; over its first third it is multiplied by a ramp. The
    beta is 0 during the ramp (a side effect of that program), then rises along a cosine.
    """
    ramp = steps // 3
    if step < ramp:
        return peak / 1000 + peak * (1 + math.cos(math.pi * step / steps)) / 2 * step / ramp, 0.0
    low, high = BETAS
    beta1 = high + (low - high) / 2 * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp)))
    floor = peak / 25_000
    return floor + (peak - floor) / 2 * (1 + math.cos(math.pi * (step + 1) / steps)), beta1


# ---- the images of training ------------------------------------------------------------------------------------------


def in_order(images: int, count: int, seed: int) -> NDArray[np.int64]:
    """The numbers of the images that are seen one after the other: all in a random order, then all in another one, ..."""
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(images) for _ in range(math.ceil(count / images))]
    return np.concatenate(passes)[:count]


def varied(
    photo: NDArray[Any], truth: Map, kinect: bool, crop: tuple[int, int], rng: np.random.Generator
) -> tuple[NDArray[np.float32], Map]:
    """A photo and its map as a step of training sees them.

    Without NYUv2's border; half of them turned by up to 2.5 degrees; half mirrored; a random crop; half with other gamma,
    brightness and color.

    Args:
        photo: (H, W, C), of which 255 is white.
        truth: meters, (H, W).
        crop: height and width.

    Returns:
        The same of `crop`, where what was turned out of sight is black and of unknown distance.
    """
    if kinect:
        x0, y0, x1, y1 = scaled(BORDER, *truth.shape)
        photo, truth = photo[y0:y1, x0:x1], truth[y0:y1, x0:x1]
    if rng.random() < 0.5:
        angle = rng.uniform(-2.5, 2.5)
        photo = resized(np.ascontiguousarray(photo), lambda whole: whole.rotate(angle, Image.Resampling.BILINEAR))
        truth = np.array(Image.fromarray(np.ascontiguousarray(truth)).rotate(angle, Image.Resampling.NEAREST))
    if rng.random() < 0.5:
        photo, truth = photo[:, ::-1], truth[:, ::-1]
    top, left = (int(rng.integers(0, have - want + 1)) for have, want in zip(truth.shape, crop, strict=True))
    inside = np.s_[top : top + crop[0], left : left + crop[1]]
    image, truth = photo[inside].astype(np.float32), truth[inside].copy()
    if rng.random() < 0.5:
        image = image ** rng.uniform(0.9, 1.1) * rng.uniform(0.75, 1.25) * rng.uniform(0.9, 1.1, image.shape[2])
    return image.clip(0, 255).astype(np.float32), truth
