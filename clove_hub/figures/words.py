"""The size of text, and its line breaks."""

from __future__ import annotations

import re

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

TITLE, SMALL = 8.5, 7.5
"""Points."""
HINTED = 1.05
"""How much wider letters may become that are drawn with few pixels."""
PARTS = re.compile(r"(?:[^\s_\-/.:@,]|(?<=\d)[.,](?=\d))+[\s_\-/.:@,]*|[\s_\-/.:@,]+")
"""Words and parts of names, each with what ends it; a number is not broken at its point."""


def printed_width(text: str, points: float = SMALL, bold: bool = False) -> float:
    """Inches that the longest of some lines takes, where it takes most: with few pixels, letters become wider."""
    font = FontProperties(size=points, weight="bold" if bold else "normal")
    lines = (text_to_path.get_text_width_height_descent(line, font, ismath=False) for line in text.split("\n"))
    return max(float(width) for width, _, _ in lines) / 72 * HINTED


def printed_height(text: str, points: float = SMALL) -> float:
    """Inches that lines of print take, with some air; none for no words."""
    return ((text.count("\n") + 1) * 1.2 * points + 2.5) / 72 if text else 0


def wrapped(text: str, inches: float, points: float = SMALL, lines: int = 3, bold: bool = False) -> str:
    """Broken into lines that fit in the width, between words or behind what parts a name; the rest is an ellipsis."""

    def fits(part: str) -> bool:
        return printed_width(part, points, bold) <= inches

    done: list[str] = []
    line = ""
    for part in PARTS.findall(text):
        if len(done) > lines:
            break
        if line and not fits((line + part).rstrip()):
            done.append(line.rstrip())
            line = ""
        line += part
        while not fits(line.rstrip()) and len(done) <= lines:  # one word, that is longer than a line
            end = next((end for end in range(1, len(line)) if not fits(line[: end + 1])), 1)
            done.append(line[:end])
            line = line[end:]
    done.append(line.rstrip())
    if len(done) > lines:
        last = done[lines - 1]
        while last and not fits(last + "…"):
            last = last[:-1]
        done[lines - 1 :] = [last + "…"]
    return "\n".join(done)
