"""The model card: what is known about the weights and nothing else, worded by `model_cards/template.md`.

It is made from what the bundle's other files say, so that it can be made again when results come in.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import yaml

from clove_hub.zoo.models import Model, Paper, find_model, front_matter, papers, protocols
from clove_hub.zoo.resnets import RESNETS

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
DETECTRON2 = """
Detectron2, as weights and the settings that belong to them:

```bash
clove-hub convert . --to detectron2 --out ../backbone.pth
```
"""
PRINTED = {
    ("paper", True): "from the paper",
    ("page", True): "from the authors' page",
    ("paper", False): "from another paper",
    ("page", False): "from another paper's page",
}
"""What the card calls a figure, by where it was printed and whether by those who released the weights."""
UNKNOWN = "unknown"
"""The method of weights whose file does not tell it: a ResNet alone may be trained with labels or without."""
BASELINES = {"supervised": "supervised", "random": "random weights"}
"""What figures are compared with, by its name in `Protocol.baselines`."""
AP = (
    ", AP over thresholds of 0.5 to 0.95 where it does not say 50 or 75 (bb: boxes, mk: masks, kp: keypoints, gps: dense "
    "poses, gpsm: these with masks)"
)


def render_card(provenance: Mapping[str, Any], config: Mapping[str, Any], size: int, parameters: int) -> str:
    """The card of a bundle, Markdown with its front matter.

    Args:
        provenance: what clove_hub.json says.
        config: the bundle's config.json, from which preprocessing is told.
        size: of the weights, in bytes.
        parameters: how many of them training adjusts.

    Raises:
        ValueError: the front matter is not what the Hub understands (`check_metadata`).
    """
    paper = papers().get(provenance["method"])
    model = find_model(provenance["model"]) if provenance["model"] else None
    cfg, architecture = config["pretrained_cfg"], config["architecture"]
    adopted = provenance["origin"]["kind"] == "adopted"
    if model:
        name = model.name
    elif adopted:
        name = provenance["origin"]["name"]
    else:
        name = f"{architecture}, pre-trained with {paper.name if paper else provenance['method']}"
    # Whose backbone it is, where the file has more than one network.
    whose = "backbone" if provenance["exported"] == "backbone" else f"{provenance['exported']}'s backbone"
    results = list(_results(provenance, model))
    template = Template(files("clove_hub.model_cards").joinpath("template.md").read_text(encoding="utf-8"))
    card = template.substitute(
        front=_front_matter(provenance, name, cfg["license"], model, results),
        name=name,
        summary=_summary(provenance, model, architecture, paper),
        backbone=f"the {whose} alone",
        license=cfg["license"] or "none was chosen yet",
        parameters=f"{parameters:,}",
        sha256=provenance["sha256"]["model.safetensors"],
        size=f"{size:,}",
        preprocessing=_preprocessing(cfg),
        num_features=config["num_features"],
        detectron2=DETECTRON2 if architecture in RESNETS else "",
        training=_adopted(provenance["origin"], whose, model) if adopted else _run(provenance, model),
        evaluation=_evaluation(results),
        citation=_citation(paper),
    )
    if cfg["license"]:
        check_metadata(card)
    return card


# ---- the front matter ------------------------------------------------------------------------------------------------


def _front_matter(
    provenance: Mapping[str, Any],
    name: str,
    license: str | None,
    model: Model | None,
    results: Sequence[Mapping[str, Any]],
) -> str:
    front: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "license": license,
        "tags": ["timm", "transformers"]
        + ([] if provenance["method"] == UNKNOWN else ["self-supervised", provenance["method"]]),
    }
    if model and model.data.hub:
        front["datasets"] = [model.data.hub]
    if own := [result for result in results if result["own"]]:
        # One entry for each result and its source: the Hub would show figures that share one as if it were for all.
        front["model-index"] = [{"name": name, "results": [_indexed(result) for result in own]}]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120).strip()
    return text if license else text.replace("license: null", "# license: none was chosen yet")


def _indexed(result: Mapping[str, Any]) -> dict[str, Any]:
    split = {"split": result["split"]} if result["split"] else {}
    entry = {
        "task": {"type": result["task"], "name": result["protocol"]},
        "dataset": {"type": result["dataset_type"], "name": result["dataset"], **split},
        "metrics": [
            {"type": metric, "value": value, "name": f"{metric} ({result['kind']})"}
            for metric, value in result["metrics"].items()
        ],
    }
    # Without a source the Hub says "self-reported", which is right for what was measured here.
    return entry | ({"source": {"name": result["source"], "url": result["url"]}} if result["url"] else {})


def _results(provenance: Mapping[str, Any], model: Model | None) -> Iterator[dict[str, Any]]:
    """Those of the model's card, then those measured with this bundle; each says which it is, and whether it is of these
    weights (`own`): what was printed is of those that the authors released.
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


# ---- the body --------------------------------------------------------------------------------------------------------


def _summary(provenance: Mapping[str, Any], model: Model | None, architecture: str, paper: Paper | None) -> str:
    method = paper.name if paper else provenance["method"]
    origin = provenance["origin"]
    if model:
        images = f"{model.data.images:,} images of {model.data.name} for {model.epochs} epochs"
    elif origin["kind"] == "run":
        images = f"{origin['data']['images']:,} images"
    else:
        labels = ", and whether with labels" if provenance["method"] == UNKNOWN else ""
        return (
            f"A headless {architecture}, taken from the file `{origin['file']}`. By the names in it, that is "
            f"{origin['format']}; how it was trained{labels}, and on which images, it does not tell."
        )
    stopped = "" if origin.get("finished", True) else " The training had not reached its end when they were taken."
    sentence = (
        f"A headless {architecture} that was trained with {method} on {images}, "
        f"without labels, for dense prediction: detection, segmentation, keypoints.{stopped}"
    )
    return f"{sentence}\n\n{model.text}" if model else sentence


def _preprocessing(cfg: Mapping[str, Any]) -> str:
    side = cfg["input_size"][-1]
    return _table(
        {
            "colors": "RGB",
            "resize": f"shorter side to {math.floor(side / cfg['crop_pct'])} pixels, {cfg['interpolation']}",
            "crop": f"{side} x {side} pixels, {cfg['crop_mode']}",
            "mean": ", ".join(f"{value:g}" for value in cfg["mean"]),
            "standard deviation": ", ".join(f"{value:g}" for value in cfg["std"]),
        }
    )


def _run(provenance: Mapping[str, Any], model: Model | None) -> str:
    origin = provenance["origin"]
    settings = {
        f"{section}.{key}": value
        for section in ("method", "batch", "optimizer", "schedule")
        for key, value in origin["recipe"].get(section, {}).items()
    }
    rows = _table(
        {
            "images": f"{origin['data']['name']}, {origin['data']['images']:,} images",
            "terms of the images": model.data.terms if model else "not told in the run",
            "fingerprint of the images": f"`{origin['data']['fingerprint']}`",
            "images seen": f"{origin['images_seen']:,}",
            "optimizer steps": f"{origin['step']:,} of {origin['steps_total']:,}",
            "hardware": origin["hardware"],
            "software": ", ".join(f"{name} {version}" for name, version in origin["versions"].items()),
        }
        | {
            f"changed after step {change['step']:,}": f"`{'; '.join(change['changed'])}`"
            for change in origin.get("changes", ())
        }
        | {f"`{name}`": f"`{value}`" for name, value in settings.items()}
    )
    curves = (
        "\n\n![Loss and signs of collapse over the steps](curves.png)" if "curves.png" in provenance["sha256"] else ""
    )
    return f"{rows}\n\nThe whole recipe is in `clove_hub.json`.{curves}"


def _adopted(origin: Mapping[str, Any], whose: str, model: Model | None) -> str:
    trained_by = "somebody else; the file does not say whom"
    if model:
        arxiv = papers()[model.paper.released_by].arxiv
        trained_by = f"the authors of [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})"
    rows = {
        "trained by": trained_by,
        "released at": origin.get("url") or "not known",
        "file": f"`{origin['file']}`",
        "its sha256": f"`{origin['sha256']}`",
        "its format": origin["format"],
        "taken from it": f"the {whose}, every tensor bit for bit",
    }
    if model:
        rows |= {
            "images": f"{model.data.name}, {model.data.images:,} images",
            "terms of the images": model.data.terms,
            "epochs": model.epochs,
            "hardware": "not told in the file",
            "recipe here": f"`clove-hub pretrain {model.recipe}` trains the same; these weights are not from it",
        }
    converted = "The weights were converted, not trained, by clove-hub; nothing else in the file was used."
    return "\n\n".join([_table(rows), converted, *origin["notes"]])


def _evaluation(results: Sequence[Mapping[str, Any]]) -> str:
    """A table for each source, and below them how the figures were measured."""
    if not results:
        return "None is recorded for these weights."
    by_source: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        told = f"[{result['source']}]({result['url']})" if result["url"] else result["source"]
        whose = "" if result["own"] else ", of the weights that its authors released and **not of these**"
        by_source[f"{result['kind'].capitalize()}{whose}: {told}."].append(result)
    blocks = [f"{source}\n\n{_figures_table(rows)}" for source, rows in by_source.items()]
    measured = dict.fromkeys((result["protocol"], result["settings"]) for result in results)
    notes = [f"- {protocol}: {settings}." for protocol, settings in measured]
    ap = AP if any(metric.startswith("AP") for result in results for metric in result["metrics"]) else ""
    return "\n\n".join([*blocks, f"How they were measured; everything is in percent{ap}:", "\n".join(notes)])


def _figures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the same source has them, beside the figures of a ResNet-50 trained with labels and of one with random weights."""
    compared = [key for key in BASELINES if any(key in row["baselines"] for row in rows)]
    lines = [["protocol", "figures", *(BASELINES[key] for key in compared)], ["---"] * (2 + len(compared))]
    for row in rows:
        columns = [row["metrics"]]
        for key in compared:
            others = row["baselines"].get(key, {})
            columns.append({name: value for name, value in others.items() if name in row["metrics"]})
        told = (", ".join(f"{metric} {value}" for metric, value in column.items()) or "-" for column in columns)
        lines.append([row["protocol"], *told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _citation(paper: Paper | None) -> str:
    """The method's paper and, where others released the weights, theirs."""
    if paper is None:
        return ""
    cited = [papers()[key] for key in dict.fromkeys((paper.method, paper.released_by))]
    told = (f"{one.title}, arXiv:{one.arxiv}\n\n```bibtex\n{one.bibtex.strip()}\n```" for one in cited)
    return "\n## Citation\n\n" + "\n\n".join(told)


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return "\n".join(("| | |", "|---|---|", *lines))


# ---- what the Hub understands: its specification of model cards as of 2026 -------------------------------------------


def require_license(license: str) -> None:
    """Raises ValueError unless this is the id of a license on the Hub; the message names those that come close."""
    if license not in LICENSES:
        near = difflib.get_close_matches(license.lower(), sorted(LICENSES), n=1)
        raise ValueError(
            f"{license!r} is no license id of the Hub{f' (did you mean {near[0]!r}?)' if near else ''}; they read like "
            "mit, apache-2.0 or cc-by-nc-4.0"
        )


def check_metadata(card: str) -> None:
    """Holds a model card's front matter to what the Hub understands: neither its client nor timm does.

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
