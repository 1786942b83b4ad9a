"""The README and the pages of the documentation: their blocks of code, their commands, their links."""

import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(text: str, language: str) -> list[str]:
    """The blocks in a language, also those in tabs, in their order."""
    return [textwrap.dedent(body) for _, kind, body in BLOCK.findall(text) if kind == language]


def commands(text: str) -> list[str]:
    """What is typed, a line each; continued lines joined, comments left out."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def own_commands(text: str) -> list[list[str]]:
    """The words of each of our commands, in blocks of bash and in indented lines; schemes with `[...]` left out."""
    indented = [line.split(" #")[0] for line in re.findall(r"^    (clove-hub .*)$", text, re.MULTILINE)]
    words = [shlex.split(line) for line in [*commands(text), *indented] if line.startswith("clove-hub ")]
    return [one for one in words if not any(re.match(r"\[[-A-Zk]", word) for word in one)]


def links(text: str) -> list[str]:
    """The targets within the repository, without anchors."""
    return [link.partition("#")[0] for link in LINK.findall(text) if not re.match(r"\w+:|#", link)]
