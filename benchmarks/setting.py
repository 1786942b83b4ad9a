"""What is measured: a recipe with sizes that fit the device, photos, and made-up crops."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from clove_hub.training.recipe import Recipe, load
from clove_hub.training.sources import Source, Stream, open_source
from clove_hub.views import CropBatch, ViewSpec, allocate, draw, write_sample

from .report import RESULTS

RECIPE = "clove_r50_in1k_200ep"


def arguments(name: str, description: str, *, data: bool) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--data", metavar="PHOTOS", required=data, help="a folder of photos")
    parser.add_argument(
        "--reference", type=Path, metavar="CLONE", help="a clone of the released CLoVE code, to compare"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON file goes")
    parser.add_argument("--name", default=name, help="of the JSON file, where several are kept (default: %(default)s)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=f"changes to the recipe {RECIPE}, as in batch.total=64 data.workers=4",
    )
    return parser


def command(main: Callable[[list[str] | None], None]) -> None:
    """Runs a benchmark as a program; what the user got wrong is one line and exit code 2."""
    try:
        main(None)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def sized(options: argparse.Namespace, *sizes: str, recipe: str = RECIPE) -> Recipe:
    """The recipe in the paper's sizes on a GPU, smaller on a CPU, with the user's changes on top of both.

    Args:
        sizes: what a benchmark changes itself.
        recipe: another than the usual one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "cuda": ["batch.total=256", "run.precision=bf16", f"data.workers={min(8, cores)}"],
        "cpu": ["batch.total=8", "run.precision=fp32", f"data.workers={min(2, cores)}"],
    }
    changes = [*defaults[options.device], *sizes, f"data.path={options.data or '.'}", "run.output=unused"]
    return load(recipe, [*changes, *options.overrides])


def as_number(setting: int | str) -> int:
    """A setting that is a number, as those of a benchmark are.

    Raises:
        ValueError: it is a word.
    """
    if isinstance(setting, str):
        raise ValueError(
            f"{setting!r} is resolved when a run starts: set data.workers and batch.per_device for a benchmark"
        )
    return setting


def make_accelerator(recipe: Recipe, device: str) -> Accelerator:
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision={"fp32": "no"}.get(recipe.run.precision, recipe.run.precision),
    )


def photos(recipe: Recipe) -> tuple[Source, dict[str, Any]]:
    """The photos, and what they are like (of up to 200 of them)."""
    source = open_source(recipe.data)
    if isinstance(source, Stream):
        raise ValueError("a benchmark needs photos that can be read again: leave data.streaming out")
    chosen = [source.read(i).data for i in range(0, len(source), max(1, len(source) // 200))]
    sizes = [Image.open(BytesIO(data)).size for data in chosen]
    return source, {
        "photos": len(source),
        "median_width": statistics.median(width for width, _ in sizes),
        "median_height": statistics.median(height for _, height in sizes),
        "mean_bytes": statistics.mean(map(len, chosen)),
    }


def made_crops(spec: ViewSpec, samples: int) -> CropBatch:
    """Crops of made-up pictures of 500x375, drawn as those of photos are."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)
    batch = allocate(spec, samples)
    for index in range(samples):
        write_sample(batch, index, np.roll(picture, index, axis=1), draw(spec, 0, 0, index, 375, 500))
    return batch


def settings(recipe: Recipe, spec: ViewSpec, **more: Any) -> dict[str, Any]:
    """The sizes that a result belongs to."""
    return {
        "backbone": recipe.backbone.model,
        "views": [f"{group.stop - group.start}x{spec.views[group.start].size}" for group in spec.groups],
        "batch": recipe.batch.total,
        "precision": recipe.run.precision,
        "channels_last": recipe.run.channels_last,
        "compile": recipe.run.compile,
        **more,
    }


def positive(values: Sequence[tuple[str, int]]) -> None:
    for name, value in values:
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
