"""Where a part runs, with which data, and the small recipes and photos that the parts share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from clove_hub.batch_norm import batch_norms, group_batch_norms
from clove_hub.training.recipe import Recipe, load
from clove_hub.training.step import TrainState, assemble, prepare

from ..curves import RECIPE
from ..setting import make_accelerator
from ..small import small

DISTINCT = 64
"""Photos that are drawn; the others are the same ones under other names."""


@dataclass(frozen=True)
class Place:
    """Device, data and sizes of a part."""

    device: torch.device
    rehearse: bool
    """Small enough for two CPU cores."""
    work: Path
    """A folder for runs and made photos, which the parts share."""
    photos: Path | None = None
    """To learn from."""
    segmentation: Path | None = None
    """Images with masks, as CamVid's."""
    detection: Path | None = None
    """In COCO's layout."""
    reference: Path | None = None
    """A clone of the released CLoVE code."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def learned_from(self) -> Path:
        """The photos to learn from; made ones where none were given."""
        return self.photos or made_photos(self.work / "photos", 64 if self.rehearse else 1024)


def made_photos(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> Path:
    """JPEG files of clouds of color in several scales, as many bytes as photos have, in a folder of one class."""
    one = folder / "one"
    if one.is_dir():
        return folder
    one.mkdir(parents=True)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(min(count, DISTINCT)):
        total = np.zeros((size[1], size[0], 3))
        for cells, strength in ((4, 1.0), (16, 0.5), (64, 0.3), (300, 0.35)):
            noise = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
            total += strength * (np.asarray(noise.resize(size, Image.Resampling.BICUBIC), dtype=np.float64) - 128)
        drawn.append(Image.fromarray((128 + total).clip(0, 255).astype(np.uint8)))
    for number in range(count):
        path = one / f"{number:05d}.jpg"
        if number < len(drawn):
            drawn[number].save(path, quality=90)
        else:
            path.write_bytes((one / f"{number % len(drawn):05d}.jpg").read_bytes())
    return folder


def recipe_of(method: str, place: Place, *changes: str) -> Recipe:
    """The method's recipe in a size that a check takes: a real ResNet on a GPU, timm's smallest in a rehearsal."""
    sizes: dict[str, object] = {"data__path": place.learned_from(), "run__output": place.work / "unused"}
    if not place.rehearse:
        sizes |= {"backbone__model": "resnet18", "batch__total": 32, "batch__per_device": 32, "batch__norm_group": 16}
    return load(RECIPE[method], [*small(method, **sizes), *changes])


def grouped(recipe: Recipe, accelerator: Accelerator) -> TrainState:
    """What the training loop steps with: batch norm in groups, wrapped."""
    train_state = assemble(recipe, accelerator)
    if any(batch_norms(train_state.method)):
        group_batch_norms(train_state.method, recipe.batch.norm_group or recipe.batch.total, recipe.batch.total)
    prepare(train_state)
    return train_state


def built(method: str, place: Place, *changes: str, device: str | None = None) -> TrainState:
    recipe = recipe_of(method, place, *changes)
    return grouped(recipe, make_accelerator(recipe, device or place.device.type))


def options(place: Place, overrides: Sequence[str] = ()) -> argparse.Namespace:
    """What `setting.sized` takes: the paper's sizes on a GPU, tiny ones in a rehearsal."""
    tiny = small("clove", data__workers=1) if place.rehearse else []
    data = made_photos(place.work / "photos500", 64 if place.rehearse else 4096)
    return argparse.Namespace(device=place.device.type, data=str(data), overrides=[*tiny, *overrides])
