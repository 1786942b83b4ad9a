"""The facts about its training that a checkpoint holds beside its weights, by their names in the methods' code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

OPTIONS = ("args", "opt", "config", "cfg", "hyper_parameters", "hparams")
"""Keys under which a checkpoint may have its command-line options or its configuration."""
FACTS: Mapping[str, tuple[str, ...]] = {
    "epoch": ("epoch",),
    "epochs": ("epochs", "max_epochs", "num_epochs"),
    "dataset": ("dataset", "dataset_name"),
    "images": ("num_instances",),
    "batch_size": ("batch_size", "batch_size_per_gpu"),
    "processes": ("world_size",),
    "accumulation": ("grad_accumulation_steps",),
    "prototypes": ("num_prototypes", "nmb_prototypes"),
    "learning_rate": ("base_lr", "base_learning_rate", "lr", "learning_rate"),
}
"""Each fact and its possible names; the first that is found counts."""
LONGEST = 80
"""Maximum characters of a value."""


def options(rest: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a training was started with.

    Args:
        rest: all other content of a file, as in `read_contents`.
    """
    return next((dict(rest[key]) for key in OPTIONS if isinstance(rest.get(key), Mapping) and rest[key]), {})


def facts(rest: Mapping[str, Any]) -> dict[str, Any]:
    """The FACTS in the file: at its top level, in `meta` (mmcv), or among its options and their sections."""
    told = options(rest)
    sections = [value for value in told.values() if isinstance(value, Mapping)]
    places: list[Mapping[str, Any]] = [
        rest,
        *(m for m in (rest.get("meta"),) if isinstance(m, Mapping)),
        told,
        *sections,
    ]

    def values(names: tuple[str, ...]) -> Iterator[Any]:
        yield from (place[name] for place in places for name in names if name in place and is_short(place[name]))

    found = {fact: next(values(names), None) for fact, names in FACTS.items()}
    return {fact: value for fact, value in found.items() if value not in (None, "")}


def is_short(value: object) -> bool:
    """Whether it is a number or a short text."""
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) < LONGEST and value.isprintable())
