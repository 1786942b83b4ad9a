"""What mkdocs builds besides the pages as they stand: the reference of commands, recipes and settings, from the code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints
from unittest import mock

from latex2mathml.converter import convert as mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from clove_hub.cli import COMMANDS
from clove_hub.command import Group, execute
from clove_hub.evaluation import PROTOCOLS
from clove_hub.evaluation.run import find_protocol
from clove_hub.methods import METHODS
from clove_hub.settings import kind_in_words, notes
from clove_hub.training.recipe import SHIPPED, Recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
MATH = re.compile(r"(?<![\w$\\])\$(?=[^\s$])([^$\n]+?)(?<=\S)\$(?![\w$])")
LABEL = re.compile(r"(Paper|Command|Other weights|Cost|Expected|Why these values): +(.*)")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {"commands": commands(), "recipes": recipes(), "settings": settings()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draws formulas as MathML, which needs no script, and mends links.

    One that leaves the documentation leads to the repository, or where no address of it is known nowhere.
    """
    parts = CODE.split(markdown)
    markdown = "".join(
        part if number % 2 else MATH.sub(lambda m: mathml(m[1]), part) for number, part in enumerate(parts)
    )

    def inside(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[2]))
        if target.startswith("docs/"):
            return match[0]
        return f"[{match[1]}]({config.repo_url}/blob/main/{target})" if config.repo_url else match[1]

    return OUTSIDE.sub(inside, markdown)


# ---- the pages -------------------------------------------------------------------------------------------------------


def commands() -> str:
    parts = [
        "# Commands\n\nWhat `--help` prints. Exit codes are 0 done, 1 failed, 2 wrong input, 75 saved after a signal, "
    ]
    parts.append("130 after Ctrl-C.\n")
    for words in members(COMMANDS, []):
        title = "`clove-hub " + " ".join(words) + "`"
        parts.append(f"\n## {title}\n\n```text\n{helped(words)}\n```\n")
    return "".join(parts)


def members(group: Group, words: list[str]) -> Iterator[list[str]]:
    for name, (_, member) in group.members.items():
        if isinstance(member, Group):
            yield from members(member, [*words, name])
        else:
            yield [*words, name]


def helped(words: list[str]) -> str:
    said = io.StringIO()
    with (
        mock.patch.dict("os.environ", {"COLUMNS": "86", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        execute(COMMANDS, [*words, "--help"], "clove-hub")
    return said.getvalue().strip()


def recipes() -> str:
    parts = [
        "# Recipes\n\nThe shipped recipes. Your own recipe is a file like these; give its path instead of a name.\n"
    ]
    for name in shipped_recipes():
        head, body = headed((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
        parts.append(f"\n## {name}\n\n{head}\n\n```yaml\n{body}\n```\n")
    return "".join(parts)


def headed(text: str) -> tuple[str, str]:
    """A recipe's comment at the top, as a list of what its lines say, and the rest."""
    lines = text.splitlines()
    count = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    title, *said = [line.removeprefix("# ") for line in lines[:count]]
    items: list[str] = []
    for line in said:
        if line.startswith(" "):
            items[-1] += " " + line.strip()
        else:
            items.append(line)
    return "\n".join([title, "", *map(item, items)]), "\n".join(lines[count:]).strip()


def item(line: str) -> str:
    """A label in bold, and a command as code."""
    match = LABEL.match(line)
    if not match:
        return f"- {line[0].upper()}{line[1:]}"
    label, text = match.groups()
    return f"- **{label}:** " + (f"`{text}`" if label == "Command" else text)


def settings() -> str:
    parts = [
        "# Settings\n\nFor a recipe: `clove-hub pretrain RECIPE section.key=value`. Each method and each evaluation protocol has "
    ]
    parts.append("its own settings: `clove-hub evaluate PROTOCOL key=value`.\n")
    sections: Mapping[str, Any] = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(kind := sections[field.name]):
            parts.append(f"\n## {field.name}\n\n{table(kind, field.name)}")
    parts.append("\n# Settings of methods\n")
    for name, entry in METHODS.items():
        parts.append(f"\n## method.name={name}\n\n{table(entry.settings, 'method')}")
    parts.append("\n# Settings of protocols\n")
    for name in PROTOCOLS:
        parts.append(f"\n## evaluate {name}\n\n{table(find_protocol(name).Settings, '')}")
    return "".join(parts)


def table(kind: type, section: str) -> str:
    hints, said = get_type_hints(kind, include_extras=True), dict(notes(kind))
    rows = ["| key | type | default | meaning |\n|---|---|---|---|\n"]
    for field in dataclasses.fields(kind):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if default is dataclasses.MISSING else f"`{'null' if default is None else default}`"
        key = f"{section}.{field.name}" if section else field.name
        cells = [f"`{key}`", kind_in_words(hints[field.name]), shown, said.get(field.name, "")]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(rows)
