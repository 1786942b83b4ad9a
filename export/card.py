"""The model card: what is known about the weights and nothing else, worded by `model_cards/template.md`.

It is made from what the bundle's other files say, so that it can be made again when results come in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import yaml

from clove_hub.zoo.models import REPRODUCED, Model, Paper, find_model, papers, protocols
from clove_hub.zoo.resnets import RESNETS

from .metadata import check_metadata

DETECTRON2 = """
Detectron2, as weights and the settings that belong to them:

```bash
clove-hub convert . --to detectron2 --out ../backbone.pth
```
"""
FROM_THE_PAPER = "from the paper"


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
    name = model.name if model else f"{architecture}, pre-trained with {paper.name if paper else provenance['method']}"
    results = list(_results(provenance, model, paper))
    template = Template(files("clove_hub.model_cards").joinpath("template.md").read_text(encoding="utf-8"))
    card = template.substitute(
        front=_front_matter(provenance, name, cfg["license"], model, results),
        name=name,
        summary=_summary(provenance, model, architecture, paper),
        exported=provenance["exported"],
        license=cfg["license"] or "none was chosen yet",
        parameters=f"{parameters:,}",
        sha256=provenance["sha256"]["model.safetensors"],
        size=f"{size:,}",
        preprocessing=_preprocessing(cfg),
        num_features=config["num_features"],
        detectron2=DETECTRON2 if architecture in RESNETS else "",
        training=_adopted(provenance, model) if provenance["origin"]["kind"] == "adopted" else _run(provenance),
        evaluation=_evaluation(results),
        citation=f"\n## Citation\n\n{paper.title}, arXiv:{paper.arxiv}\n\n```bibtex\n{paper.bibtex.strip()}\n```"
        if paper
        else "",
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
        "tags": ["timm", "transformers", "self-supervised", provenance["method"]],
    }
    if model and model.data.hub:
        front["datasets"] = [model.data.hub]
    if results:
        # One entry for each result and its source: the Hub would show figures that share one as if it were for all.
        front["model-index"] = [{"name": name, "results": [_indexed(result) for result in results]}]
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120).strip()
    return text if license else text.replace("license: null", "# license: none was chosen yet")


def _indexed(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "task": {"type": result["task"], "name": result["protocol"]},
        "dataset": {"type": result["dataset_type"], "name": result["dataset"], "split": result["split"]},
        "metrics": [
            {"type": metric, "value": value, "name": f"{metric} ({result['kind']})"}
            for metric, value in result["metrics"].items()
        ],
        "source": {key: result[part] for key, part in (("name", "source"), ("url", "url")) if result[part]},
    }


def _results(provenance: Mapping[str, Any], model: Model | None, paper: Paper | None) -> Iterator[dict[str, Any]]:
    """Those of the model's card, then those measured with this bundle; each says which it is."""
    for result in model.results if model else ():
        how = protocols()[result.protocol]
        assert paper
        yield {
            "protocol": how.name,
            "task": how.task,
            "dataset": how.dataset,
            "dataset_type": how.dataset_type,
            "split": how.split,
            "settings": how.settings,
            "metrics": result.metrics,
            "kind": FROM_THE_PAPER,
            "source": f"{paper.name}: {result.source}",
            "url": f"https://arxiv.org/abs/{paper.arxiv}",
        }
    for measured in provenance["results"]:
        yield {**measured, "kind": REPRODUCED, "source": "measured with these weights by clove-hub", "url": None}


# ---- the body --------------------------------------------------------------------------------------------------------


def _summary(provenance: Mapping[str, Any], model: Model | None, architecture: str, paper: Paper | None) -> str:
    method = paper.name if paper else provenance["method"]
    origin = provenance["origin"]
    if model:
        images = f"{model.data.images:,} images of {model.data.name} for {model.epochs} epochs"
    elif origin["kind"] == "run":
        images = f"{origin['data']['images']:,} images"
    else:
        images = "images that its file does not tell of"
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
            "colours": "RGB",
            "resize": f"shorter side to {math.floor(side / cfg['crop_pct'])} pixels, {cfg['interpolation']}",
            "crop": f"{side} x {side} pixels, {cfg['crop_mode']}",
            "mean": ", ".join(f"{value:g}" for value in cfg["mean"]),
            "standard deviation": ", ".join(f"{value:g}" for value in cfg["std"]),
        }
    )


def _run(provenance: Mapping[str, Any]) -> str:
    origin = provenance["origin"]
    settings = {
        f"{section}.{key}": value
        for section in ("method", "batch", "optimizer", "schedule")
        for key, value in origin["recipe"].get(section, {}).items()
    }
    rows = _table(
        {
            "images": f"{origin['data']['name']}, {origin['data']['images']:,} images",
            "fingerprint of the images": f"`{origin['data']['fingerprint']}`",
            "images seen": f"{origin['images_seen']:,}",
            "optimiser steps": f"{origin['step']:,} of {origin['steps_total']:,}",
            "hardware": origin["hardware"],
            "software": ", ".join(f"{name} {version}" for name, version in origin["versions"].items()),
        }
        | {f"`{name}`": f"`{value}`" for name, value in settings.items()}
    )
    return f"{rows}\n\nThe whole recipe is in `clove_hub.json`."


def _adopted(provenance: Mapping[str, Any], model: Model | None) -> str:
    origin = provenance["origin"]
    rows = {
        "trained by": "the authors of the method" if model else "somebody else; the file does not say whom",
        "released at": origin.get("url") or "not known",
        "file": f"`{origin['file']}`",
        "its sha256": f"`{origin['sha256']}`",
        "its format": origin["format"],
        "taken from it": f"the {provenance['exported']}'s backbone, every tensor bit for bit",
    }
    if model:
        rows |= {
            "images": f"{model.data.name}, {model.data.images:,} images",
            "epochs": model.epochs,
            "recipe here": f"`clove-hub pretrain {model.recipe}` trains the same; these weights are not from it",
        }
    return (
        f"{_table(rows)}\n\nThe weights were converted, not trained, by clove-hub; nothing else in the file was used."
    )


def _evaluation(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "None is recorded for these weights."
    by_protocol: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_protocol[result["protocol"], result["settings"]].append(result)
    lines = ["| protocol | figures, % | source |", "|---|---|---|"]
    for (protocol, _), rows in by_protocol.items():
        for row in rows:
            figures = ", ".join(f"{metric} {value:g}" for metric, value in row["metrics"].items())
            lines.append(f"| {protocol} | {figures} | {row['kind']} ({row['source']}) |")
    notes = [f"- {protocol}: {settings}" for protocol, settings in by_protocol]
    return "\n".join([*lines, "", *notes])


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return "\n".join(("| | |", "|---|---|", *lines))
