"""`clove-hub models`: the models of the zoo, and where their weights are."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clove_hub.command import Command
from clove_hub.weights.hub import explain

from .models import Model, models
from .places import confirmed, confirmed_file, hub_id, namespace, weights_of

log = logging.getLogger(__name__)

RELEASED = "by the authors, to be adopted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "`clove-hub adopt FILE --as MODEL` turns what the authors released into a bundle; FILE may be an address, too.\n"
        "With CLOVE_HUB_NAMESPACE, weights are looked for on the Hub under that user or organization: `acme` for the\n"
        "newest, `acme@v1.0.0` for the models at one tag, branch or commit."
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all information as JSON, for programs")
    form.add_argument("--markdown", action="store_true", help="print the table of the documentation")
    parser.add_argument("--check", action="store_true", help="ask the Hub which of the namespace's copies exist")


def run(options: argparse.Namespace) -> int:
    table = list(models().values())
    published = check(table) if options.check else None
    if published is not None:
        remember(table, published)
        if not published and (chosen := namespace()) and chosen.revision:
            log.warning("%s has none of these at %s: leave out @%s for the newest", *chosen, chosen.revision)
    rows = [row(model, published) for model in table]
    if options.json:
        print(json.dumps(rows, indent=2))
    elif options.markdown:
        print(markdown(table))
    else:
        print(text(rows))
    return 0


MODELS = Command("List the models of the zoo: what each is, and where its weights are.", add_arguments, run)


def row(model: Model, published: set[str] | None = None) -> dict[str, Any]:
    """Everything known about a model, as plain data; `weights` states where they are and how certain that is."""
    found = weights_of(model)
    weights: dict[str, Any]
    if isinstance(found, Path):
        weights = {"where": "here", "path": str(found.parent)}
    elif found and (published is None or found in published):
        name, _, revision = found.partition("@")
        weights = {
            "where": "hub",
            "id": name,
            "revision": revision or None,
            "checked": bool(published) or found in confirmed(),
        }
    else:
        weights = {"where": "released"}
    return {
        "name": model.name,
        "method": model.method,
        "exported": model.exported,
        "data": model.data.name,
        "images": model.data.images,
        "epochs": model.epochs,
        "license": model.paper.license,
        "paper": f"arXiv:{model.paper.arxiv}",
        "recipe": model.recipe,
        "input_size": model.input_size,
        "weights": weights,
        "released": {"page": model.paper.code, "link": model.weights, "sha256": list(model.sha256)},
        "results": [
            {"protocol": result.protocol, "source": result.source, "url": result.url, "figures": dict(result.metrics)}
            for result in model.results
        ],
    }


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Fixed columns for a terminal."""

    def where(row: dict[str, Any]) -> str:
        weights, released = row["weights"], row["released"]
        if weights["where"] == "hub":
            at = f"@{weights['revision']}" if weights["revision"] else ""
            return f"hf-hub:{weights['id']}{at}{'' if weights['checked'] else ' (not checked)'}"
        return weights.get("path") or f"{RELEASED}: {released['link'] or released['page']}"

    cells = [("model", "trained on", "epochs", "license", "weights")]
    cells += [(r["name"], r["data"], str(r["epochs"]), r["license"], where(r)) for r in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def markdown(table: Sequence[Model]) -> str:
    """The documentation's table, the same on every machine."""

    def figures(model: Model) -> str:
        best = {result.protocol: result.metrics for result in reversed(model.results)}
        shown = [
            f"{title} {best[protocol][metric]}"
            for protocol, metric, title in HEADLINES
            if metric in best.get(protocol, {})
        ]
        return ", ".join(shown[:3]) or "-"

    lines = [
        "| model | method | trained on | epochs | license | figures its authors or others printed | released |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{m.name}` | [{m.paper.name}](https://arxiv.org/abs/{m.paper.arxiv}) | {m.data.name} | {m.epochs} | "
        f"{m.paper.license} | {figures(m)} | [page]({m.paper.code}){f', [weights]({m.weights})' if m.weights else ''} |"
        for m in table
    ]
    return "\n".join(lines)


HEADLINES = (
    ("coco_fpn", "APbb", "COCO FPN APbb"),
    ("coco_c4", "APbb", "COCO C4 APbb"),
    ("voc_c4", "APbb", "VOC AP"),
    ("voc07_svm", "mAP", "VOC07 SVM"),
    ("voc_segmentation", "mIoU", "VOC mIoU"),
    ("davis", "J&F", "DAVIS J&F"),
)
"""The figures in the short table: the first three that a model has."""


def check(table: Sequence[Model]) -> set[str]:
    """The `hub_id`s of the chosen namespace that have weights on the Hub.

    Raises:
        ValueError: no namespace was chosen, or the Hub cannot be reached.
    """
    if namespace() is None:
        raise ValueError("--check asks the Hub for the copies of a namespace: set CLOVE_HUB_NAMESPACE to its name")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    api = HfApi()

    def has_weights(found: str) -> bool:
        name, _, revision = found.partition("@")
        try:
            return api.file_exists(name, "model.safetensors", revision=revision or None)
        except GatedRepoError:  # it exists, with access granted by its owner
            return True

    try:
        return {found for found in map(hub_id, table) if found and has_weights(found)}
    except Exception as error:  # the client raises its libraries' errors, and these change
        raise ValueError(f"the Hub cannot be reached: {explain(error)}") from None


def remember(table: Sequence[Model], published: set[str]) -> None:
    """Store the result of `check`, so that timm lists only these of the models as pretrained from now on."""
    known = (confirmed() - set(map(hub_id, table))) | published
    file = confirmed_file()
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(sorted(known), indent=2) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        log.warning("%s cannot be written (%s): timm will not list these models as pretrained", file, error.strerror)
