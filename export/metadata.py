"""The front matter of a model card: made by huggingface_hub's own classes, and checked against the Hub's rules.

Results are in `model-index` only. The Hub's newer `.eval_results/*.yaml` accepts data sets that are registered as
benchmarks with it; COCO, LVIS, Cityscapes, VOC, DAVIS, ImageNet and a user's own images are not among them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from clove_hub.zoo.models import front_matter

from .license import require_license

TASKS = frozenset(
    """
image-feature-extraction image-classification object-detection image-segmentation keypoint-detection
mask-generation depth-estimation video-classification zero-shot-image-classification
""".split()  # noqa: SIM905
)
"""Pipeline tags of vision."""
RESULT_TASKS = TASKS | {"instance-segmentation", "semantic-segmentation", "video-segmentation"}
"""What a result may be of: these three are finer than the Hub's pipeline tags."""


def eval_results(results: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The Hub's form of a card's results, one entry for each figure.

    Args:
        results: each a mapping with `protocol`, `task`, `dataset`, `dataset_type`, `split`, `metrics` (figures by name),
            `kind` (where they come from, in words), `source` and `url`; `url` is None for what was measured here, which
            the Hub then shows as self-reported.
    """
    return [
        EvalResult(
            task_type=result["task"],
            task_name=result["protocol"],
            dataset_type=result["dataset_type"],
            dataset_name=result["dataset"],
            dataset_split=result["split"] or None,
            metric_type=metric,
            metric_value=value,
            metric_name=f"{metric} ({result['kind']})",
            source_name=result["source"] if result["url"] else None,
            source_url=result["url"],
        )
        for result in results
        for metric, value in result["metrics"].items()
    ]


def metadata(name: str, results: Sequence[EvalResult], **fields: Any) -> ModelCardData:
    """The front matter of a card.

    Args:
        name: of the model, for `model-index`.
        results: in the order of the card; neighbors that share all but the metric become one entry.
        fields: other fields of `ModelCardData`.
    """
    found = ModelCardData(**fields)
    # `ModelCardData(eval_results=...)` groups by task and data alone and keeps the first source and protocol of a group:
    # figures of a paper would be shown as measured here. One call for each group keeps them apart.
    entries = [
        entry
        for _, group in itertools.groupby(results, key=_one_entry)
        for model in eval_results_to_model_index(name, list(group))
        for entry in model["results"]
    ]
    if entries:
        found["model-index"] = [{"name": name, "results": entries}]
    return found


def _one_entry(result: EvalResult) -> tuple[Any, ...]:
    """What figures of one entry of `model-index` share."""
    return (*result.unique_identifier, result.task_name, result.dataset_name, result.source_name, result.source_url)


def check_metadata(card: str, library: str = "timm") -> None:
    """Check a model card's front matter against the Hub's rules, which neither its client nor timm does.

    Args:
        card: the whole card, Markdown.
        library: what its weights are loaded with, by the name of its library_name.

    Raises:
        ValueError: naming the first key that is missing or wrong. A license is required.
    """
    front, _ = front_matter("this bundle", card)
    if not front.get("license"):
        raise ValueError(
            "the card names no license, and nobody may use weights without one: "
            "export again with --license (mit, apache-2.0, cc-by-nc-4.0, ...)"
        )
    require_license(str(front["license"]), front.get("license_name"), front.get("license_link"))
    if front.get("library_name") != library:
        raise ValueError(f"the card's library_name is {front.get('library_name')!r}, expected {library!r}")
    if front.get("pipeline_tag") not in TASKS:
        raise ValueError(f"the card's pipeline_tag is {front.get('pipeline_tag')!r}, expected one of {sorted(TASKS)}")
    for key in ("tags", "datasets"):
        values = front.get(key, [])
        if not isinstance(values, list) or not all(
            isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", v) for v in values
        ):
            raise ValueError(f"the card's {key} are {values!r}, expected a list of ids such as ILSVRC/imagenet-1k")
    for entry in _list(front.get("model-index", []), "model-index"):
        if not isinstance(entry.get("name"), str):
            raise ValueError("an entry of the card's model-index has no name")
        for result in _list(entry.get("results"), "results of model-index"):
            _check_result(result)


def _check_result(result: Mapping[str, Any]) -> None:
    wanted: dict[str, tuple[str, ...]] = {"task": ("type",), "dataset": ("type", "name")}
    if "source" in result:  # without one the Hub takes it as its uploader's own; its client refuses one without url
        wanted["source"] = ("name", "url")
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
