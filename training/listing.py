"""`clove-hub methods`: each method, its cost relative to CLoVE, and its recipes."""

from __future__ import annotations

import argparse
import json
import math
from importlib.resources import files
from typing import Any

import yaml

from clove_hub import methods
from clove_hub.command import Command
from clove_hub.methods import METHODS as REGISTERED
from clove_hub.zoo.models import papers

from .recipe import recipe_files

BESIDE = "clove"
"""The method that costs are relative to."""


def recipes() -> dict[str, list[str]]:
    """The names of the shipped recipes of each method, in the order of their epochs."""
    found: dict[str, list[tuple[float, str]]] = {}
    for name, file in recipe_files().items():
        sections = yaml.safe_load(file.read_text())
        epochs = sections.get("schedule", {}).get("epochs", math.inf)
        found.setdefault(sections["method"]["name"], []).append((epochs, name))
    return {method: [name for _, name in sorted(entries)] for method, entries in found.items()}


def measured() -> dict[str, dict[str, Any]]:
    """The figures that `python -m benchmarks.methods --ship` has left, as it wrote them."""
    figures: dict[str, dict[str, Any]] = json.loads((files(methods) / "costs.json").read_text())
    return figures


def table(markdown: bool = False) -> str:
    """Every registered method with its cost, relative to that of `BESIDE`.

    Speed (images a second) and peak memory (weights, optimizer, queues and one step) with the views of its recipe and as many
    images.
    """
    found, shipped, paper = measured(), recipes(), papers()
    lines = ["| method | what it is | images/s | memory | recipes |", "|---|---|---|---|---|"] if markdown else []
    for name, entry in REGISTERED.items():
        cost, own, names = found["methods"].get(name), paper.get(name), shipped.get(name, [])
        speed, memory = (f"{cost['speed']:.2f}", f"{cost['memory']:.2f}") if cost else ("-", "-")
        if markdown:
            what = f"[{own.name}](https://arxiv.org/abs/{own.arxiv}): {entry.summary}" if own else entry.summary
            lines.append(f"| `{name}` | {what} | {speed} | {memory} | {', '.join(f'`{one}`' for one in names)} |")
        else:
            lines += [
                f"{name:<10}{entry.summary}",
                *([f"{'':10}{own.title}, arXiv:{own.arxiv}"] if own else []),
                f"{'':10}{speed} x the images/s and {memory} x the memory of {BESIDE}"
                if cost
                else f"{'':10}not measured",
                f"{'':10}recipes: {', '.join(names) or 'none'}",
                "",
            ]
    how = found["setting"]
    where = (
        f"Measured on {how['device']}: {how['backbone']}, {how['batch']} images a step with the views of each method's "
        f"recipe, {how['precision']}, torch {how['torch']} (python -m benchmarks.methods)."
    )
    lines += ["", f"Images a second and peak memory are relative to `{BESIDE}`. {where}"] if markdown else [where]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print the table of the documentation")


def run(options: argparse.Namespace) -> int:
    print(table(options.markdown))
    return 0


METHODS = Command("What each method is, what it costs beside CLoVE, and its recipes.", add_arguments, run)
