"""Pre-training from Python: `clove_hub.pretrain("demo", ...)` does what `clove-hub pretrain demo ...` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from clove_hub.global_state import kept_environment, kept_generators
from clove_hub.runs import read_rows

from .loop import train
from .recipe import NAMES, parse, read_sections
from .run.stopping import FINISHED


@dataclass(frozen=True)
class RunResult:
    """The state of a run after `pretrain`."""

    folder: Path
    """The run's folder, which `clove_hub.export_run`, `evaluate` and `load_backbone` take."""
    finished: bool
    steps: int
    """Optimizer steps done."""
    metrics: dict[str, Any]
    """The last row of metrics.jsonl."""


@kept_generators()
def pretrain(recipe: str | Path, **overrides: Any) -> RunResult:
    """Train a recipe to its end, or resume the run in its folder.

    Args:
        recipe: the name of a shipped recipe, or the path of a YAML file.
        overrides: a section with the keys to change, `batch={"total": 512}`; `**{"batch.total": 512}` is the same.

    Raises:
        ValueError: wrong input, found before the first step.
        FloatingPointError: the loss was not finite.

    Examples:
        >>> import clove_hub
        >>> result = clove_hub.pretrain(
        ...     "demo",
        ...     data={"path": photos, "workers": 0},
        ...     run={"output": folder / "run", "precision": "fp32"},
        ...     schedule={"steps": 2, "warmup_epochs": 0},
        ...     backbone={"model": "test_resnet"},
        ...     batch={"total": 4, "per_device": 4},
        ...     method={"global_size": 64, "local_views": 0, "hard_negatives": 3},
        ... )
        >>> result.finished, result.steps, "loss" in result.metrics
        (True, 2, True)
    """
    sections = read_sections(str(recipe))
    for name, value in overrides.items():
        section, dot, key = name.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
        elif isinstance(value, Mapping):
            sections[section] = {**sections.get(section, {}), **value}
        elif section == "evaluate":
            sections[section] = value
        else:
            raise ValueError(
                f"pretrain({name}={value!r}): give a section with the keys to change, as in batch={{'total': 512}}; "
                f"there are {', '.join(NAMES)}"
            )
    typed = parse(sections)
    with kept_environment(), own_accelerator():
        finished = train(typed) == FINISHED
    folder = Path(typed.run.output)
    rows = read_rows(folder / "metrics.jsonl")
    return RunResult(folder, finished, rows[-1]["step"] if rows else 0, rows[-1] if rows else {})


@contextmanager
def own_accelerator() -> Iterator[None]:
    """Use other settings of Accelerate, which holds them once per process, within the context."""
    states: list[Any] = [AcceleratorState, GradientState, PartialState]
    before = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)
