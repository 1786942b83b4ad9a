"""Evaluation during a run: the protocols that the recipe asks for, on the backbone that export writes.

    RUN/evaluations.jsonl      one row for each evaluation: its step, what was asked for, and the whole record

The first evaluation is before the first step: it says what random weights reach, and finds what is wrong with the data
before anything is trained on. Nothing here leaves a trace in the run.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from clove_hub.evaluation.result import Record, plain
from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.runs import read_rows
from clove_hub.weights import Preprocessing
from clove_hub.weights.architectures import checked_model_args
from clove_hub.weights.weights import architecture_of

from .recipe import Evaluation
from .run.folder import RunFolder

ROWS = "evaluations.jsonl"


def check(evaluations: Sequence[Evaluation]) -> None:
    """Raises ValueError where one of them cannot be carried out, as far as that is known without doing it."""
    for number, one in enumerate(evaluations):
        try:
            make_settings(one.protocol, one.settings)
        except ValueError as error:
            raise ValueError(f"evaluate[{number}]: {error}") from error
        if not Path(one.data).expanduser().is_dir():
            raise ValueError(f"evaluate[{number}].data={one.data!r} is not a folder")
    labels = [label(one) for one in evaluations]
    if twice := {name for name in labels if labels.count(name) > 1}:
        raise ValueError(
            f"evaluate asks twice for {', '.join(sorted(twice))}: a protocol can be asked for once on a folder of a name"
        )


def due(evaluations: Sequence[Evaluation], step: int, steps: int) -> list[Evaluation]:
    """Those to carry out after `step` of `steps` steps: every so many, before the first, and after the last."""
    return [one for one in evaluations if step % one.every == 0 or step == steps]


def missing(evaluations: Sequence[Evaluation], run: Path, step: int, steps: int) -> list[Evaluation]:
    """Those that are due after `step`, but of which the run has no row."""
    there = [row["asked"] for row in read_rows(run / ROWS) if row["step"] == step]
    return [one for one in due(evaluations, step, steps) if asked(one) not in there]


def results(
    evaluations: Sequence[Evaluation],
    method: Any,
    preprocessing: Preprocessing,
    model_args: Mapping[str, Any],
    folder: RunFolder,
    step: int,
) -> Iterator[tuple[str, Record]]:
    """Carries them out, one after the other, and writes each one's row; all processes take part and get all records.

    Yields:
        The label and the record.

    Raises:
        ValueError: something is wrong with an evaluation's data.
    """
    if not evaluations:
        return
    backbone: nn.Module = copy.deepcopy(getattr(method, method.exported)["backbone"])
    args = checked_model_args(model_args, architecture_of(backbone), "backbone.args")
    for one in evaluations:
        what = f"{folder.path} (step {step})"
        record = run_protocol(one.protocol, backbone, preprocessing, one.data, one.settings, one.seed, what, args)
        folder.append(ROWS, {"step": step, "asked": asked(one), "record": plain(record)})
        yield label(one), record


def asked(evaluation: Evaluation) -> dict[str, Any]:
    """What makes it this evaluation and no other."""
    return {key: value for key, value in dataclasses.asdict(evaluation).items() if key != "every"}


def label(evaluation: Evaluation) -> str:
    return f"{evaluation.protocol}/{Path(evaluation.data).name}"
