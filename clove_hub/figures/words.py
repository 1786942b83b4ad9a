"""How much room words take, and where they break."""

from __future__ import annotations

import re

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

TITLE, SMALL = 8.5, 7.5
"""Points."""


def printed_width(text: str, points: float = SMALL, bold: bool = False) -> float:
    """Inches that the longest of some lines takes."""
    font = FontProperties(size=points, weight="bold" if bold else "normal")
    lines = (text_to_path.get_text_width_height_descent(line, font, ismath=False) for line in text.split("\n"))
    return max(float(width) for width, _, _ in lines) / 72


def printed_height(text: str, points: float = SMALL) -> float:
    """Inches that lines of print take, with some air; none for no words."""
    return ((text.count("\n") + 1) * 1.2 * points + 2.5) / 72 if text else 0


def wrapped(text: str, inches: float, points: float = SMALL, lines: int = 3, bold: bool = False) -> str:
    """Broken into lines that fit in the width, between words or behind what parts a name; the rest is an ellipsis."""
    done, line = [], ""
    for part in re.findall(r"[^\s_\-/.:@,]+[\s_\-/.:@,]*|[\s_\-/.:@,]+", text):
        if line and printed_width((line + part).rstrip(), points, bold) > inches:
            done.append(line.rstrip())
            line = ""
        line += part
        while printed_width(line.rstrip(), points, bold) > inches:  # one word, that is longer than a line
            fits = next(
                (end for end in range(len(line) - 1, 1, -1) if printed_width(line[:end], points, bold) <= inches), 1
            )
            done.append(line[:fits])
            line = line[fits:]
    done.append(line.rstrip())
    if len(done) > lines:
        last = done[lines - 1]
        while last and printed_width(last + "…", points, bold) > inches:
            last = last[:-1]
        done[lines - 1 :] = [last + "…"]
    return "\n".join(done)
