"""`clove-hub figures`: draws one kind of figure into a file."""

from __future__ import annotations

import argparse
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from . import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def figures_main(arguments: list[str], program: str = "clove-hub figures") -> int:
    """Runs the command; the exit code is 0, or 2 for input that is refused."""
    width = max(map(len, FIGURES))
    parser = argparse.ArgumentParser(
        prog=program,
        description="Draw what a run did and what a backbone has learned.",
        epilog="kinds (KIND --help says what each needs):\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, text in FIGURES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=FIGURES, metavar="KIND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the kind's own arguments")
    chosen = parser.parse_args(arguments)
    kind, rest = chosen.kind, chosen.arguments
    module = import_module(f".{kind.replace('-', '_')}", __package__)  # each needs others of the heavy libraries

    parser = argparse.ArgumentParser(
        prog=f"{program} {kind}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help=f"the picture to write: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--dpi", type=int, default=200, help="pixels per inch of what is drawn in pixels (default: 200)"
    )
    options = parser.parse_intermixed_args(rest)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        check(options.out, options.dpi)
        save(module.draw(options), options.out, options.dpi)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"-> {options.out}")
    return 0


def check(out: Path, dpi: int) -> None:
    """Raises ValueError where a picture cannot be written so; said before the work is done."""
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out} does not say a format: let it end in one of {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    if not 10 <= dpi <= 2400:
        raise ValueError(f"--dpi {dpi}: expected 10 to 2400 pixels per inch")


def save(figure: Figure, out: Path, dpi: int) -> None:
    """Writes the picture; the same figure always gives the same bytes."""
    from matplotlib import rc_context

    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[out.suffix.lower()]
    with rc_context({"svg.hashsalt": "clove-hub", "pdf.fonttype": 42}):  # printers refuse matplotlib's own Type 3
        try:
            figure.savefig(out, dpi=dpi, metadata=undated)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written: {error}") from error
