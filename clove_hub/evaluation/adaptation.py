"""Whether continued pre-training has helped: a run's evaluations compared with those of its starting weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TOLERANCE = 0.02
"""Fraction of the starting value by which a figure may be lower without counting as worse."""


class Adaptation(NamedTuple):
    """One figure over training; for all protocols, higher is better."""

    protocol: str
    data: str
    """The folder's name."""
    metric: str
    """The protocol's first."""
    before: float
    """Of the starting weights."""
    after: float
    """At the last step that was evaluated."""
    step: int
    """This step."""
    best: float
    best_step: int

    @property
    def hurt(self) -> bool:
        return self.after < self.before - TOLERANCE * abs(self.before)

    @property
    def verdict(self) -> str:
        """In one word, for tables."""
        return "hurt" if self.hurt else "helped" if self.after > self.before else "no change"

    def __str__(self) -> str:
        return (
            f"{self.protocol} on {self.data}: {self.metric} {self.before:.2f} with the starting weights, {self.after:.2f} after "
            f"step {self.step}, best {self.best:.2f} after step {self.best_step}"
        )


def adaptations(rows: Iterable[Mapping[str, Any]], until: int | None = None) -> list[Adaptation]:
    """One entry for each evaluation that was made before the first step too.

    Args:
        rows: of a run's evaluations.jsonl.
        until: the step up to which they count.
    """
    found: dict[tuple[str, str], list[tuple[int, str, float]]] = {}
    for row in rows:
        if until is None or row["step"] <= until:
            metric, value = next(iter(row["record"]["metrics"].items()))
            key = row["asked"]["protocol"], Path(row["asked"]["data"]).name
            found.setdefault(key, []).append((row["step"], metric, value))
    told = []
    for (protocol, data), points in found.items():
        (first, metric, before), (last, _, after) = points[0], points[-1]
        best_step, _, best = max(points, key=lambda point: point[2])
        if first == 0 < last:
            told.append(Adaptation(protocol, data, metric, before, after, last, best, best_step))
    return told


def markdown(told: Iterable[Adaptation]) -> str:
    """A table for a card."""
    lines = ["| measured by | starting weights | these weights | continued training |", "|---|---|---|---|"]
    lines += [
        f"| {one.protocol} on {one.data}, {one.metric} | {one.before:.2f} | {one.after:.2f} | {one.verdict} |"
        for one in told
    ]
    return "\n".join(lines)
