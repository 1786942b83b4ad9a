"""What a whole ImageNet run costs on one GPU and on many: `python -m benchmarks.scaling [--write]`.

The only place with the arithmetic. It reads what was measured from `benchmarks/results/`, takes design figures and
stated assumptions where nothing was, and prints the tables of `docs/scaling.md` (`--write` puts them there).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from clove_hub.backbones import create_backbone
from clove_hub.batch_norm import batch_norms
from clove_hub.methods import METHODS
from clove_hub.training.recipe import Recipe, load
from clove_hub.training.run.loader import PREFETCH

from .report import RESULTS, ROOT
from .setting import RECIPE, as_number

DOCUMENT = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python -m benchmarks.scaling --write -->", "<!-- end of tables -->"

IMAGENET = 1_281_167
"""Photos of ImageNet-1k's training set."""
PHOTO_BYTES = 115_000
"""Of one of them, on average: its archive of 147.9 GB over their number."""

CLUSTERS = {"1x": (1, 1), "4x": (1, 4), "8x": (1, 8), "8x8": (8, 8)}
"""Nodes, and GPUs in each."""

DESIGN = {
    "A100, design": 600.0,
    "H100, design": 665.0,
    "H200, design": 800.0,  # the middle of 665-930
    "H200, the aim": 1000.0,
}
"""Images/s of one GPU where none was at hand: derived from the step's arithmetic, not measured."""

# Assumed, not measured: what one node's GPUs and what a node's network move, and what a small collective costs.
NODE_BYTES = 300e9
NETWORK_BYTES = 50e9
NODE_LATENCY = 30e-6
NETWORK_LATENCY = 60e-6


@dataclass(frozen=True)
class Load:
    """What a run asks of the machines, whatever they are."""

    batch: int
    per_device: int
    gradient_bytes: int
    synchronized: int
    """Collectives of batch norm in one forward and backward pass; nothing goes on until each is done."""
    crop_bytes: int
    """One image's crops on their way to the device."""
    workers: int


def load_of(recipe: Recipe) -> Load:
    method: Any = METHODS[recipe.method_name].build(create_backbone(recipe.backbone.model), recipe.method)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)

    def norms(name: str) -> int:
        module: nn.Module = method.get_submodule(name)
        return sum(1 for _ in batch_norms(module))

    groups = len(method.view_spec.groups)
    return Load(
        batch=recipe.batch.total,
        per_device=as_number(recipe.batch.per_device),
        gradient_bytes=4 * trained,
        # The student sees each size of view in a pass of its own, forward and backward; the teacher goes forward once.
        synchronized=2 * groups * norms("student") + norms("teacher"),
        crop_bytes=sum(3 * view.size**2 for view in method.view_spec.views),
        workers=as_number(recipe.data.workers),
    )


def step_seconds(work: Load, rate: float, nodes: int, gpus: int) -> dict[str, float]:
    """Seconds of an optimizer step: computing, batch norm's collectives, and the gradients' that is not hidden.

    Args:
        rate: images/s of one GPU alone, from photos.
    """
    world = nodes * gpus
    share = work.batch / world
    passes = max(1, round(share / work.per_device))
    compute = share / rate
    if world == 1:
        return {"compute": compute, "batch norm": 0.0, "gradients": 0.0}
    latency = NETWORK_LATENCY if nodes > 1 else NODE_LATENCY
    ring = 2 * (world - 1) / world * work.gradient_bytes / (NETWORK_BYTES if nodes > 1 else NODE_BYTES)
    hidden = 0.5 * compute / passes  # the last backward pass, about half of a pass, is what they overlap with
    return {
        "compute": compute,
        "batch norm": passes * work.synchronized * latency,
        "gradients": max(0.0, ring - hidden),
    }


def tables(results: Path) -> str:
    """The tables as Markdown."""
    work = load_of(load(RECIPE, ["data.path=imagenet", "run.output=unused"]))
    rates = measured_rates(results) | DESIGN
    steps = IMAGENET // work.batch
    lines = [
        "| GPU | images/s each | GPUs | step, ms | of which collectives | 200 epochs, h | 400 epochs, h | GPU hours, 200 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rate in rates.items():
        for cluster, (nodes, gpus) in CLUSTERS.items():
            parts = step_seconds(work, rate, nodes, gpus)
            step = sum(parts.values())
            hours = 200 * steps * step / 3600
            lines.append(
                f"| {name} | {rate:.0f} | {cluster} | {1000 * step:.0f} | {100 * (1 - parts['compute'] / step):.0f} % "
                f"| {hours:.1f} | {2 * hours:.1f} | {hours * nodes * gpus:.0f} |"
            )
    core, released, where = worker_rate(results)
    queue = work.per_device * PREFETCH * work.workers * work.crop_bytes / 1e9
    lines += [
        "",
        f"A step is {work.batch} images, an epoch {steps} steps. Gradients: {work.gradient_bytes / 1e6:.0f} MB. Batch norm: "
        f"{work.synchronized} collectives in each forward and backward pass.",
        "",
        "| what a node needs, at 1000 images/s a GPU | 1 GPU | 4 GPUs | 8 GPUs |",
        "|---|---|---|---|",
        needs("cores that decode and crop", [1000 * n / core for n in (1, 4, 8)], ".1f"),
        needs("  with the released transform", [1000 * n / released for n in (1, 4, 8)], ".1f"),
        needs("shared memory for waiting batches, GB", [queue * n for n in (1, 4, 8)], ".1f"),
        needs("read from storage, MB/s", [1000 * PHOTO_BYTES * n / 1e6 for n in (1, 4, 8)], ".0f"),
        needs("files opened a second (none with tar shards)", [1000.0 * n for n in (1, 4, 8)], ".0f"),
        needs("copied to the GPUs, GB/s", [1000 * work.crop_bytes * n / 1e9 for n in (1, 4, 8)], ".2f"),
        "",
        f"A core decodes and crops {core:.0f} images/s, and makes {released:.0f} with the released transform ({where}).",
    ]
    return "\n".join(lines)


def needs(what: str, values: list[float], form: str) -> str:
    return f"| {what} | " + " | ".join(f"{value:{form}}" for value in values) + " |"


def measured_rates(results: Path) -> dict[str, float]:
    """Images/s from photos on the GPU that was measured, if one was."""
    for path in (results / "end_to_end_cuda.json", results / "gpu_speed.json"):
        if path.is_file():
            record = json.loads(path.read_text())
            return {f"{record['hardware']['gpu'].removeprefix('NVIDIA ')}, measured": _from_photos(record)}
    return {}


def _from_photos(record: dict[str, Any]) -> float:
    if "rows" in record:
        return row(record, "from photos")["ours"]
    rates: list[float] = [
        item["result"]["images_per_second"]
        for name, item in record["items"].items()
        if name.startswith("from photos") and item["ok"]
    ]
    return max(rates)


def worker_rate(results: Path) -> tuple[float, float, str]:
    """Images/s that a core makes ready, ours and the released transform's; the largest photos that were measured."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("pipeline*.json"))]
    rows = [(one, row(one, "  for each second")) for one in records]
    compared = [(one, found) for one, found in rows if found["released"]]
    if not compared:
        return 250.0, 50.0, "design figures"
    record, found = max(
        compared, key=lambda one: one[0]["settings"]["median_width"] * one[0]["settings"]["median_height"]
    )
    size = f"{record['settings']['median_width']:.0f}x{record['settings']['median_height']:.0f}"
    return found["ours"], found["released"], f"measured, {record['hardware']['cpu']}, photos of {size}"


def row(record: dict[str, Any], begins: str) -> dict[str, float]:
    """The row whose name begins so."""
    return next(one for one in record["rows"] if one["name"].startswith(begins))


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="What a whole run costs.")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the measured figures are"
    )
    parser.add_argument("--write", action="store_true", help=f"put the tables into {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args(given)
    made = tables(options.results)
    print(made)
    if options.write:
        text = DOCUMENT.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
