"""`clove-hub inspect`: what a file of weights is, found out without running or writing anything."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clove_hub.command import WRONG, Command
from clove_hub.runs import sha256
from clove_hub.weights import SOURCE, Weights, load
from clove_hub.weights.files import identify
from clove_hub.weights.source import find_source
from clove_hub.zoo.checks import counted, not_finite, printable, require_finite
from clove_hub.zoo.facts import facts, is_short, options
from clove_hub.zoo.models import released_as
from clove_hub.zoo.resnets import family
from clove_hub.zoo.tensors import file_kind, read_contents

KINDS = {
    "safetensors": "safetensors",
    "zip": "PyTorch checkpoint",
    "pickle": "pickle (PyTorch before 1.6, or NumPy's arrays)",
}
NOT_TRAINED = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Inspection:
    """What was found in a file or a folder; what was not found out is None or empty."""

    path: str
    what: str
    """In words: `a CLoVE checkpoint`."""
    refused: str | None = None
    """Why no backbone can be taken from it."""
    size: int | None = None
    """Bytes."""
    sha256: str | None = None
    kind: str | None = None
    format: str | None = None
    """Of a file the method whose authors' code wrote it, or `resnet` for a network alone; else the kind of source."""
    architecture: str | None = None
    """The backbone's name in timm."""
    encoders: tuple[str, ...] = ()
    exported: str | None = None
    """The encoder that is taken, unless a card says otherwise."""
    model: str | None = None
    """That of the zoo of whose released file this is the sha256."""
    heads: tuple[str, ...] = ()
    """Names of the tensors outside the backbones."""
    tensors: int | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other arguments of `timm.create_model`."""
    fingerprint: str | None = None
    """Of the backbone, as results record it."""
    notes: tuple[str, ...] = ()
    """What was left out or assumed, in sentences."""
    parameters: int | None = None
    """Of one backbone: what training adjusts."""
    values: int | None = None
    """Numbers in all tensors together."""
    dtypes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Tensors of each type."""
    not_finite: tuple[str, ...] = ()
    """Names of the tensors with an infinity or a value that is no number."""
    says: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else the file says, of one number or a short text each: `zoo.facts.FACTS` first."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Those of the training's command line or configuration, likewise."""


def inspect_source(source: str | Path) -> Inspection:
    """Inspect any source of weights. Its faults are reported, not raised."""
    found = Inspection(path=str(source), what="unknown")
    try:
        place = find_source(source)
        if place.kind == "file":
            _inspect_file(place.path, found)
        else:
            weights = load(source)
            found.format = weights.kind
            _count(weights.tensors, found)
            _describe_weights(weights, found)
    except ValueError as error:
        found.refused = str(error)
    return found


def _inspect_file(path: Path, found: Inspection) -> None:
    try:
        if path.is_file():
            found.size, found.sha256 = path.stat().st_size, sha256(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    known = released_as(found.sha256 or "")
    found.model = known.name if known else None
    found.kind = KINDS[file_kind(path)]
    found.what = f"a {found.kind} that could not be read"
    contents = read_contents(path)
    tensors, rest, _ = contents
    first = ", ".join(printable(name) for name in list(tensors)[:3])
    found.what = family(tensors) or f"tensors of an unknown network ({first})"
    found.says = facts(rest) | _short(rest)
    found.options = _short(options(rest))
    _count(tensors, found)
    weights = identify(path, str(path), contents)
    _describe_weights(weights, found)
    origin = weights.origin
    found.what, found.format, found.exported = origin["title"], origin["format"], origin["exported"]
    found.encoders, found.heads = tuple(origin["encoders"]), tuple(origin["heads"])
    require_finite(weights.tensors, weights.what)


def _short(told: Mapping[str, Any]) -> dict[str, Any]:
    return {printable(key): value for key, value in told.items() if is_short(value)}


def _describe_weights(weights: Weights, found: Inspection) -> None:
    found.what, found.architecture, found.notes = weights.what, weights.architecture, weights.notes
    found.model_args, found.fingerprint = weights.model_args, weights.fingerprint
    found.parameters = sum(t.numel() for name, t in weights.tensors.items() if not name.endswith(NOT_TRAINED))


def _count(tensors: Mapping[str, Tensor], found: Inspection) -> None:
    found.tensors = len(tensors)
    found.values = sum(tensor.numel() for tensor in tensors.values())
    found.dtypes = dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()))
    found.not_finite = tuple(map(printable, not_finite(tensors)))


def describe(found: Inspection) -> str:
    """The same in lines for people."""
    arguments = "".join(f", {key}={value}" for key, value in found.model_args.items())
    taken = [f"{encoder} (used)" if encoder == found.exported else encoder for encoder in found.encoders]
    lines = {
        "is": found.what,
        "file": f"{found.kind}, {found.size:,} bytes" if found.kind and found.size is not None else None,
        "sha256": f"{found.sha256}, that of {found.model}" if found.model else found.sha256,
        "architecture": found.architecture and f"{found.architecture}{arguments}, {found.parameters:,} parameters",
        "backbones": ", ".join(taken),
        "other": counted("tensor", list(found.heads)) if found.heads else None,
        "tensors": f"{found.tensors:,} with {found.values:,} values" if found.tensors is not None else None,
        "types": ", ".join(f"{count} of {dtype}" for dtype, count in found.dtypes.items()),
        "not finite": counted("tensor", list(found.not_finite)) if found.not_finite else None,
        "records": ", ".join(f"{key} {value}" for key, value in list(found.says.items())[:12]),
        "options": " ".join(f"--{key} {value}" for key, value in list(found.options.items())[:60]),
        "fingerprint": found.fingerprint,
        "note": " ".join(found.notes),
        "refused": found.refused,
    }
    return f"{found.path}\n" + "\n".join(f"  {key:<14}{text}" for key, text in lines.items() if text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(options: argparse.Namespace) -> int:
    """Exits with 2 if no backbone can be taken from what was found."""
    found = inspect_source(options.source)
    print(json.dumps(dataclasses.asdict(found), indent=2) if options.json else describe(found))
    return WRONG if found.refused else 0


INSPECT = Command("Say what a file of weights is, without running or writing anything.", add_arguments, run)
