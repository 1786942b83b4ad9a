"""The figures in a card: those that others published for a model, those measured with these weights, and how."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clove_hub.evaluation.result import UNITS, with_unit
from clove_hub.zoo.models import Model, papers, protocols

PRINTED = {
    ("paper", True): "from the paper",
    ("page", True): "from the authors' page",
    ("paper", False): "from another paper",
    ("page", False): "from another paper's page",
}
"""The card's label of a figure, by where it was published and whether by the authors of the weights."""
BASELINES = {"supervised": "supervised", "random": "random weights"}
"""The baselines that figures are compared with, by their names in `Protocol.baselines`."""
COMPARED = (
    "The columns `supervised` and `random weights` are a ResNet-50 pre-trained with the labels of ImageNet and one without "
    "pre-training, from the same source."
)
AP = (
    "AP is averaged over thresholds of 0.5 to 0.95 unless its name says 50 or 75 (bb: boxes, mk: masks, kp: keypoints, "
    "gps: dense poses, gpsm: dense poses with masks)."
)
SIZES = "APs, APm and APl are those of small, medium and large objects."
CHANGED = "A protocol with `rule changed` was measured with settings other than its own."
"""For figures of the rule `changed`."""


def results_of(provenance: Mapping[str, Any], model: Model | None) -> Iterator[dict[str, Any]]:
    """The results of the model's card, then those measured with this bundle.

    Each states which it is, and whether it belongs to these weights (`own`): published figures belong to the authors'
    weights.
    """
    for result in model.results if model else ():
        how = protocols()[result.protocol]
        yield {
            "protocol": how.name,
            "task": how.task,
            "dataset": how.dataset,
            "dataset_type": how.dataset_type,
            "split": how.split,
            "settings": how.settings,
            "baselines": how.baselines if how.baselines.get("paper") == result.by else {},
            "metrics": result.metrics,
            "kind": PRINTED[result.printed, result.by == papers()[provenance["method"]].released_by],
            "source": result.source,
            "url": result.url,
            "own": provenance["origin"]["kind"] == "adopted",
        }
    here = {"kind": "reproduced", "source": "measured with these weights by clove-hub", "url": None, "own": True}
    for measured in provenance["results"]:
        yield {**measured, "baselines": {}, **here}


def evaluation_section(results: Sequence[Mapping[str, Any]]) -> str:
    """A table for each source, followed by how the figures were measured."""
    if not results:
        return "No results are recorded for these weights."
    by_source: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        told = f"[{result['source']}]({result['url']})" if result["url"] else result["source"]
        whose = "" if result["own"] else ", for the weights that its authors released and **not for these**"
        by_source[f"{result['kind'].capitalize()}{whose}: {told}."].append(result)
    blocks = [f"{source}\n\n{_figures(rows)}" for source, rows in by_source.items()]
    measured = dict.fromkeys((result["protocol"], result["settings"]) for result in results)
    notes = [f"- {protocol}: {settings}." for protocol, settings in measured]
    return "\n\n".join([*blocks, f"{explained(results)} How they were measured:", "\n".join(notes)])


def explained(results: Sequence[Mapping[str, Any]]) -> str:
    """What the figures of some results are, in sentences."""
    names = dict.fromkeys(name for result in results for name in result["metrics"])
    others = ", ".join(name for name in names if name in UNITS)
    said = [f"All figures are in percent{f' except {others}' if others else ''}."]
    if any(name.startswith("AP") for name in names):
        said.append(AP)
    if any(re.fullmatch(r"AP[sml](bb|mk|kp)", name) for name in names):
        said.append(SIZES)
    if any(result.get("baselines") for result in results):
        said.append(COMPARED)
    if any("rule changed" in result["protocol"] for result in results):
        said.append(CHANGED)
    return " ".join(said)


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table that includes a ResNet-50 with supervised and one with random weights, if the same source has them."""
    compared = [key for key in BASELINES if any(key in row["baselines"] for row in rows)]
    lines = [["protocol", "figures", *(BASELINES[key] for key in compared)], ["---"] * (2 + len(compared))]
    for row in rows:
        columns = [row["metrics"]]
        for key in compared:
            others = row["baselines"].get(key, {})
            columns.append({name: value for name, value in others.items() if name in row["metrics"]})
        told = (
            ", ".join(f"{with_unit(metric)} {value}" for metric, value in column.items()) or "-" for column in columns
        )
        lines.append([row["protocol"], *told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
