"""The report of a suite, as a page and as Markdown: the results, their comparisons, and what was not measured."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .collected import Row, Table, described, figure_of, in_markdown, shown_metrics, tables
from .result import in_digits, now, write_text

COUNTS = ("pixels", "images", "pairs", "points", "frames")
"""Figures of an item that say how much they are an average over."""
_MOST = 200
"""Rows in a table of single classes or clips."""


class Part(NamedTuple):
    """A section of the report: sentences, then tables, then pictures, then collapsed tables."""

    title: str
    words: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str]] = ()
    """File below the report's folder, and what it shows."""
    details: Sequence[Table] = ()


def write_report(
    out: Path,
    suite: str,
    rows: Sequence[Row],
    unmeasured: Sequence[str],
    pictures: Sequence[tuple[str, str]],
) -> None:
    """Write `report.md` and `report.html` into the folder.

    Args:
        suite: its name.
        rows: of all results.
        unmeasured: what has no result and why, in sentences.
        pictures: as in `Part`.
    """
    groups = tables(rows)
    parts = [Part("Summary", _words(suite, rows), [_summary(groups)])]
    if pictures:
        parts.append(Part("Features", pictures=list(pictures)))
    parts += [_protocol(table) for table in groups]
    if unmeasured:
        parts.append(Part("Not measured", [f"{one}." if not one.endswith(".") else one for one in unmeasured]))
    title = f"Evaluation: the suite {suite}"
    write_text(out / "report.md", _markdown(title, parts))
    write_text(out / "report.html", _page(title, parts))


def _words(suite: str, rows: Sequence[Row]) -> list[str]:
    newest = max(rows, key=lambda row: row.record.date).record
    known = [f"{name} {version}" for name, version in newest.versions.items() if version]
    return [
        f"Written {now()} by `clove-hub evaluate --suite {suite}`. Percent unless a unit is named. A deviation (±) is the "
        "sample standard deviation over what the column `seeds` names: seeds of a probe are not seeds of pre-training.",
        f"Measured with {', '.join(known)}.",
    ]


def _summary(groups: Sequence[Sequence[Row]]) -> Table:
    """The first figure of each protocol, a row for each model."""
    models = list(dict.fromkeys(row.record.model for table in groups for row in table))
    columns = []
    for table in groups:
        record, name = table[0].record, shown_metrics(table)[0]
        own = {row.record.model: figure_of(row, name) for row in table}  # of several settings the last
        columns.append((f"{record.protocol} on {record.data.name}: {name}", own))
    rows = [[model, *(figures.get(model, "-") for _, figures in columns)] for model in models]
    return Table("", ["model", *(title for title, _ in columns)], rows, [])


def _protocol(table: Sequence[Row]) -> Part:
    first, whole = table[0].record, described(table)
    settings = ", ".join(
        f"{key}={value}" for key, value in table[0].settings.items() if not key.startswith("preprocessing.")
    )
    seconds = ", ".join(
        f"{row.record.model} {row.record.seconds:.1f}" for row in table if row.record.seconds is not None
    )
    words = [f"Settings: {settings}." if settings else "", f"Seconds: {seconds}." if seconds else ""]
    details = [_items(table, kind) for kind in (first.items or {})]
    return Part(whole.title, [word for word in words if word], [whole._replace(title="")], [], details)


def _items(table: Sequence[Row], kind: str) -> Table:
    """The figures of single classes, objects or images, side by side for the models."""
    found = [(row.record.model, (row.record.items or {}).get(kind, {})) for row in table]
    names = list(dict.fromkeys(name for _, items in found for name in items))
    figures = list(dict.fromkeys(figure for _, items in found for one in items.values() for figure in one))
    counts = [figure for figure in figures if figure in COUNTS]
    shown = [figure for figure in figures if figure not in counts]
    header = [kind, *counts, *(f"{model}: {figure}" for model, _ in found for figure in shown)]
    rows = []
    for name in names[:_MOST]:
        any_one = next(items[name] for _, items in found if name in items)
        cells = [f"{any_one.get(count, 0):.0f}" for count in counts]
        for _, items in found:
            cells += [
                in_digits(figure, items[name][figure]) if figure in items.get(name, {}) else "-" for figure in shown
            ]
        rows.append([name, *cells])
    more = [f"{len(names) - _MOST} more are in the results' files."] if len(names) > _MOST else []
    return Table(f"By {kind}", header, rows, more)


# ---- output ----------------------------------------------------------------------------------------------------------


def _markdown(title: str, parts: Sequence[Part]) -> str:
    lines = [f"# {title}"]
    for part in parts:
        lines.append(f"## {part.title}")
        lines += part.words
        lines += [in_markdown(table) for table in part.tables]
        lines += [f"![{words}]({file})" for file, words in part.pictures]
        lines += [in_markdown(table) for table in part.details]
    return "\n\n".join(lines) + "\n"


def _page(title: str, parts: Sequence[Part]) -> str:
    body = []
    for part in parts:
        body.append(f"<h2>{html.escape(part.title)}</h2>")
        body += [f"<p>{_inline(words)}</p>" for words in part.words]
        body += map(_table, part.tables)
        body += [
            f'<figure><img src="{html.escape(file)}" alt="{html.escape(words)}"><figcaption>{html.escape(words)}</figcaption></figure>'
            for file, words in part.pictures
        ]
        body += [
            f"<details><summary>{html.escape(table.title)} ({len(table.rows)})</summary>{_table(table)}</details>"
            for table in part.details
        ]
    return _FRAME.format(title=html.escape(title), body="\n".join(body))


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}'


def _inline(words: str) -> str:
    """`code` as code."""
    pieces = html.escape(words).split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))


_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ vertical-align: bottom; }}
figure {{ margin: 1rem 0; }} img {{ max-width: 100%; background: white; }}
figcaption, summary {{ opacity: .8; }} summary {{ cursor: pointer; margin: .6rem 0; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
