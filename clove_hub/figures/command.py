"""`clove-hub figures`: draw one kind of figure into a file."""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from types import ModuleType

from clove_hub.command import Command, Group, user_path

from . import FIGURES as KINDS
from .output import DPI, FORMATS, NARROWEST, WIDEST, WIDTH, require_format, save


def module_of(kind: str) -> ModuleType:
    return import_module(f".{kind.replace('-', '_')}", __package__)  # each needs different heavy libraries


def add_arguments(kind: str, parser: argparse.ArgumentParser) -> None:
    module = module_of(kind)
    parser.description = module.__doc__
    module.add_arguments(parser)
    parser.add_argument(
        "--out", required=True, type=user_path, metavar="FILE", help=f"the picture to write: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--dpi", type=int, default=DPI, help=f"pixels per inch of the parts drawn in pixels (default: {DPI})"
    )
    parser.add_argument(
        "--width", type=float, default=WIDTH, metavar="INCHES",
        help=f"width of the figure; text keeps its size (default: {WIDTH}; one column of two: 3.5)",
    )  # fmt: skip


def run(kind: str, options: argparse.Namespace) -> int:
    out, dpi = options.out, options.dpi
    require_format(out, "--out")
    if not 10 <= dpi <= 2400:
        raise ValueError(f"--dpi {dpi}: expected 10 to 2400 pixels per inch")
    if not NARROWEST <= options.width <= WIDEST:
        raise ValueError(f"--width {options.width:g}: expected {NARROWEST} to {WIDEST} inches")
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
