"""The file of a figure, whose extension sets the format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clove_hub.documents import reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
DPI = 200
WIDTH = 7.2
"""Inches; that of a page with two columns, of which one is 3.5."""
NARROWEST, WIDEST = 3.0, 20.0


def require_format(out: Path, option: str) -> None:
    """Refuses a file that a figure cannot be written to.

    Args:
        option: that gave the file, for the message.

    Raises:
        ValueError: its ending is no format, or its folder is not there.
    """
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"{option} {out}: expected a name that ends in {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ValueError(f"{option} {out}: the folder {out.parent} does not exist; create it first")


def save(figure: Figure, out: Path, dpi: int = DPI, option: str = "--out") -> None:
    """Write the picture; the same figure always gives the same bytes.

    A PDF embeds its fonts as TrueType, because publishers refuse matplotlib's default, Type 3. An SVG has text as
    outlines, so it looks the same where the font is missing.

    Args:
        figure: of any of the kinds.
        out: ends in one of `FORMATS`.
        dpi: pixels per inch of what is drawn in pixels.
        option: that gave the file, for the message.

    Raises:
        ValueError: as `require_format`, or the file cannot be written.
    """
    from matplotlib import rc_context

    require_format(out, option)
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[out.suffix.lower()]
    with rc_context({"svg.hashsalt": "clove-hub", "svg.fonttype": "path", "pdf.fonttype": 42}):
        try:
            figure.savefig(out, dpi=dpi, metadata=undated)
        except OSError as error:
            raise ValueError(f"{option} {out} cannot be written: {reason(error)}") from error
