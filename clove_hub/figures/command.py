"""`clove-hub figures`: draws one kind of figure into a file."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from clove_hub.command import Command, Group, user_path

from . import FIGURES as KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def module_of(kind: str) -> ModuleType:
    return import_module(f".{kind.replace('-', '_')}", __package__)  # each needs others of the heavy libraries


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    module = module_of(kind)
    parser.description = module.__doc__
    module.add_arguments(parser)
    parser.add_argument(
        "--out", required=True, type=user_path, metavar="FILE", help=f"the picture to write: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--dpi", type=int, default=200, help="pixels per inch of what is drawn in pixels (default: 200)"
    )


def run(kind: str, options: argparse.Namespace) -> int:
    out, dpi = options.out, options.dpi
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out} does not say a format: let it end in one of {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if not 10 <= dpi <= 2400:
        raise ValueError(f"--dpi {dpi}: expected 10 to 2400 pixels per inch")
    save(module_of(kind).draw(options), out, dpi)
    print(f"-> {out}")
    return 0


FIGURES = Group(
    "Draw what a run did and what a backbone has learned.",
    "kind",
    {
        kind: (summary, Command(summary, partial(add_arguments, kind), partial(run, kind)))
        for kind, summary in KINDS.items()
    },
)


def save(figure: Figure, out: Path, dpi: int) -> None:
    """Writes the picture; the same figure always gives the same bytes."""
    from matplotlib import rc_context

    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[out.suffix.lower()]
    with rc_context({"svg.hashsalt": "clove-hub", "pdf.fonttype": 42}):  # printers refuse matplotlib's own Type 3
        try:
            figure.savefig(out, dpi=dpi, metadata=undated)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error}") from error
