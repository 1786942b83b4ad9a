"""`clove-hub methods`: what each method is, what it costs beside CLoVE, and which recipes there are of it."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from clove_hub import methods
from clove_hub.command import Command
from clove_hub.methods import METHODS as REGISTERED
from clove_hub.zoo.models import Paper, papers

from .recipe import SHIPPED

BESIDE = "clove"
"""The method whose cost the others' is told in."""


@dataclass(frozen=True)
class Cost:
    """What a step of a method takes, of what CLoVE's takes, with the views of its recipe and as many images."""

    speed: float
    """Images a second."""
    memory: float
    """The most that weights, optimizer, queues and one step hold at a time."""


@dataclass(frozen=True)
class Listed:
    name: str
    summary: str
    paper: Paper
    cost: Cost
    recipes: list[str]


def listed() -> list[Listed]:
    """Every registered method with what is known of it."""
    costs = measured()["methods"]
    paper = papers()
    shipped = recipes()
    return [
        Listed(name, entry.summary, paper[name], Cost(**costs[name]), shipped[name])
        for name, entry in REGISTERED.items()
    ]


def recipes() -> dict[str, list[str]]:
    """The names of the shipped recipes of each method, in the order of their epochs."""
    found: dict[str, list[tuple[float, str]]] = {}
    for file in SHIPPED.glob("*.yaml"):
        sections = yaml.safe_load(file.read_text())
        epochs = sections.get("schedule", {}).get("epochs", math.inf)
        found.setdefault(sections["method"]["name"], []).append((epochs, file.stem))
    return {method: [name for _, name in sorted(entries)] for method, entries in found.items()}


def measured() -> dict[str, dict[str, Any]]:
    """The figures that `python -m benchmarks.methods --ship` has left, as it wrote them."""
    figures: dict[str, dict[str, Any]] = json.loads((files(methods) / "costs.json").read_text())
    return figures


def where() -> str:
    """On what the figures were measured, and how."""
    how = measured()["setting"]
    return (
        f"Measured on {how['device']}: {how['backbone']}, {how['batch']} images a step with the views of each method's "
        f"recipe, {how['precision']}, torch {how['torch']} (python -m benchmarks.methods)."
    )


def text() -> str:
    lines = []
    for one in listed():
        lines += [
            f"{one.name:<10}{one.summary}",
            f"{'':10}{one.paper.title}, arXiv:{one.paper.arxiv}",
            f"{'':10}{one.cost.speed:.2f} x the images/s and {one.cost.memory:.2f} x the memory of {BESIDE}",
            f"{'':10}recipes: {', '.join(one.recipes)}",
            "",
        ]
    return "\n".join([*lines, where()])


def markdown() -> str:
    """The table of the README."""
    lines = ["| method | what it is | images/s | memory | recipes |", "|---|---|---|---|---|"]
    for one in listed():
        names = ", ".join(f"`{name}`" for name in one.recipes)
        link = f"[{one.paper.name}](https://arxiv.org/abs/{one.paper.arxiv})"
        lines.append(
            f"| `{one.name}` | {link}: {one.summary} | {one.cost.speed:.2f} | {one.cost.memory:.2f} | {names} |"
        )
    return "\n".join([*lines, "", f"Images a second and peak memory are relative to `{BESIDE}`. {where()}"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="as the table of the README")


def run(options: argparse.Namespace) -> int:
    print(markdown() if options.markdown else text())
    return 0


METHODS = Command("What each method is, what it costs beside CLoVE, and its recipes.", add_arguments, run)
