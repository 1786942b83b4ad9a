"""The front matter of a model card, checked before anyone uploads it: neither the Hub's client nor timm does.

What it may hold is the Hub's model card specification as of 2026.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from clove_hub.zoo.models import front_matter

LICENSES = frozenset(
    """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl
apple-amlr mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license unknown
""".split()  # noqa: SIM905
)
"""Ids of licenses as the Hub spells them; not `other`, which says nothing without a name and a link."""

TASKS = frozenset(
    """
image-feature-extraction image-classification object-detection image-segmentation keypoint-detection
mask-generation depth-estimation video-classification zero-shot-image-classification
""".split()  # noqa: SIM905
)
"""Pipeline tags of vision."""

RESULT_TASKS = TASKS | {"instance-segmentation", "semantic-segmentation", "video-segmentation"}
"""What a result may be of: these three are finer than the Hub's pipeline tags."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def require_license(license: str) -> None:
    """Raises ValueError unless this is the id of a license on the Hub; the message names those that come close."""
    if license not in LICENSES:
        near = difflib.get_close_matches(license.lower(), sorted(LICENSES), n=1)
        raise ValueError(
            f"{license!r} is no license id of the Hub{f' (did you mean {near[0]!r}?)' if near else ''}; they read like "
            "mit, apache-2.0 or cc-by-nc-4.0"
        )


def check_metadata(card: str) -> None:
    """Holds a model card's front matter to what the Hub understands.

    Args:
        card: the whole card, Markdown.

    Raises:
        ValueError: naming the first key that is missing or wrong. A license is required.
    """
    front, _ = front_matter("this bundle", card)
    if not front.get("license"):
        raise ValueError(
            "the card names no license, and weights without one may be used by nobody: "
            "export again with --license mit, apache-2.0, cc-by-nc-4.0, ..."
        )
    require_license(str(front["license"]))
    if front.get("library_name") != "timm":
        raise ValueError(f"the card's library_name is {front.get('library_name')!r}, expected 'timm'")
    if front.get("pipeline_tag") not in TASKS:
        raise ValueError(f"the card's pipeline_tag is {front.get('pipeline_tag')!r}, expected one of {sorted(TASKS)}")
    for key in ("tags", "datasets"):
        values = front.get(key, [])
        if not isinstance(values, list) or not all(isinstance(v, str) and _ID.fullmatch(v) for v in values):
            raise ValueError(f"the card's {key} are {values!r}, expected a list of ids such as ILSVRC/imagenet-1k")
    for entry in _list(front.get("model-index", []), "model-index"):
        if not isinstance(entry.get("name"), str):
            raise ValueError("an entry of the card's model-index has no name")
        for result in _list(entry.get("results"), "results of model-index"):
            _check_result(result)


def _check_result(result: Mapping[str, Any]) -> None:
    # Without a source the Hub takes a result as its uploader's own; the Hub's client refuses one that has no url.
    wanted = {"task": ("type",), "dataset": ("type", "name")} | (
        {"source": ("name", "url")} if "source" in result else {}
    )
    for key, parts in wanted.items():
        value = result.get(key)
        if not isinstance(value, dict) or not all(isinstance(value.get(part), str) for part in parts):
            raise ValueError(f"a result of the card's model-index has {key} {value!r}, expected {' and '.join(parts)}")
    if result["task"]["type"] not in RESULT_TASKS:
        raise ValueError(
            f"a result of the card's model-index is of the task {result['task']['type']!r}, expected one of "
            f"{', '.join(sorted(RESULT_TASKS))}"
        )
    metrics = _list(result.get("metrics"), "metrics of model-index")
    if not metrics:
        raise ValueError(f"a result of the card's model-index has no metrics: {dict(result)!r}")
    for metric in metrics:
        if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
            raise ValueError(f"a metric of the card's model-index is {metric!r}, expected a type and a number")


def _list(value: Any, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"the card's {what} is {value!r}, expected a list of keys and values")
    return value
