"""The card of a fine-tuned model: its classes, its training data, its figures, and the two ways to use it."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template
from typing import Any

from clove_hub.evaluation.result import with_unit
from clove_hub.settings import as_typed
from clove_hub.weights.weights import restriction

from .card import Published, shown_license
from .card_origin import base_model, begun_with, table
from .card_results import AP
from .metadata import check_metadata, eval_results, metadata

PIPELINES = {
    "detection": ("object-detection", "Faster R-CNN", "boxes"),
    "instances": ("image-segmentation", "Mask R-CNN", "boxes and masks"),
    "keypoints": ("keypoint-detection", "Keypoint R-CNN", "boxes and keypoints"),
    "segmentation": ("image-segmentation", "FCN", "the class of each pixel"),
}
"""By task: the Hub's tag, the network, and what it gives."""
MOST_CLASSES = 200
"""Names in the card; config.json has all."""
CARD = Template("""---
$front
---

# $name

A $kind of torchvision on a $architecture backbone, fine-tuned on $data. It gives $gives of $count.

$classes

## How to use it

`pip install 'clove-hub[downstream]'` installs what both ways need. $where

On the command line, for a file or a folder of photos:

```bash
clove-hub predict $source photos --out predictions
```

`predictions` then has COCO's results as JSON, a data set in COCO's format, and pictures.

In Python:

```python
import clove_hub

detector = clove_hub.load_detector("$source")
found = next(detector.predict(["photo.jpg"], threshold=0.5))
print($shown)
```

`clove-hub convert $source --to onnx --out $onnx` makes an ONNX file of it, checked against torch.

## Training

$training

## Figures

$figures

## What it is not

- It finds the classes above, as the training images have them, and nothing else. Subjects, regions, cameras and styles that
  are rare there are found worse, and biases of those images carry over. Evaluate on your own data before you rely on it.
- The license covers the weights. The terms of the training images are separate; check that they allow your use.

## Files

| file | content |
|---|---|
| `model.safetensors` | the whole network, $size bytes, sha256 `$sha256` |
| `config.json` | task, backbone, network, images, classes |
| `clove_hub.json` | the settings of the fine-tuning, where the backbone comes from, figures, sums of the other files |
""")


def render_finetuned_card(
    facts: Mapping[str, Any], config: Mapping[str, Any], size: int, at: Published | None = None
) -> str:
    """The card, Markdown with its front matter.

    Args:
        facts: what clove_hub.json says.
        config: what config.json says.
        size: of the weights' file, in bytes.
        at: the repository and tag that the snippets load from; without it they load from the folder.

    Raises:
        ValueError: the front matter is not valid on the Hub (`check_metadata`).
    """
    origin, task = facts["origin"], config["task"]
    pipeline, kind, gives = PIPELINES[task]
    data, architecture = origin["data"], facts["backbone"]
    license = {key: value for key, value in facts["license"].items() if value is not None}
    names = [category["name"] for category in config["categories"]]
    count = f"{len(names)} class{'es' if len(names) > 1 else ''}"
    name = f"{kind}, {architecture}, fine-tuned on {data['name']}"
    front = metadata(
        name,
        eval_results([result | _measured() for result in facts["results"]]),
        base_model=base_model(origin),
        library_name="clove-hub",
        metrics=list(dict.fromkeys(metric for result in facts["results"] for metric in result["metrics"])) or None,
        pipeline_tag=pipeline,
        tags=["clove-hub", "torchvision", task],
        **license,
    ).to_yaml()
    listed = ", ".join(names[:MOST_CLASSES]) + (", ..." if len(names) > MOST_CLASSES else "")
    card = CARD.substitute(
        front=front if license else f"# license: none was chosen yet\n{front}",
        name=name,
        kind=kind,
        architecture=architecture,
        data=f"{data['train_images']:,} images of {data['name']}",
        gives=gives,
        count=count,
        classes=f"Classes: {listed}.",
        where=f"Both load version `{at.tag}` of this repository, whatever is published later."
        if at
        else "Run them in the folder of this file.",
        source=at.source if at else ".",
        shown="found.classes" if task == "segmentation" else "found.names, found.boxes",
        onnx="detector.onnx" if at else "../detector.onnx",
        training=_training(facts, license),
        figures=_figures(facts),
        size=f"{size:,}",
        sha256=facts["sha256"]["model.safetensors"],
    )
    if license:
        check_metadata(card, "clove-hub")
    return card


def _measured() -> dict[str, Any]:
    return {"kind": "measured", "source": "measured by clove-hub at the end of the fine-tuning", "url": None}


def _training(facts: Mapping[str, Any], license: Mapping[str, str]) -> str:
    origin = facts["origin"]
    data, settings, base = origin["data"], origin["settings"], origin["pretrained"]
    forbids = restriction(base.get("license"))
    rows: dict[str, Any] = {
        "license": shown_license(license),
        "backbone": "random weights" if base["kind"] == "random" else begun_with(origin),
        "fingerprint of the backbone": f"`{base['fingerprint']}`",
        "training images": f"{data['train_images']:,} of {data['name']}",
        "terms of the images": "not recorded",
        "fingerprint of the data": f"`{data['fingerprint']}`",
        "optimizer steps": f"{settings['steps']:,} of {settings['batch.total'] if 'batch.total' in settings else settings['batch']['total']} images",
        "preset": f"`{settings['preset']}`",
        "software": ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version),
    }
    sections = (
        ("network", "images", "batch", "optimizer", "schedule", "run") if isinstance(settings.get("run"), dict) else ()
    )
    rows |= {
        f"`{section}.{key}`": f"`{as_typed(value)}`"
        for section in sections
        for key, value in settings[section].items()
        if section != "run" or key in ("seed", "precision", "precise_bn")
    }
    note = f"\n\nThe license of the weights that it began with {forbids}." if forbids else ""
    return f"{table(rows)}{note}\n\nThe complete settings are in `clove_hub.json`."


def _figures(facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {result['protocol']} | {result['dataset']} {result['split']}, {facts['origin']['data']['test_images']:,} images | "
        + ", ".join(f"{with_unit(name)} {value}" for name, value in result["metrics"].items())
        + " |"
        for result in facts["results"]
    ]
    ap = AP if any(name.startswith("AP") for result in facts["results"] for name in result["metrics"]) else ""
    notes = "\n".join(f"- {result['settings']}." for result in facts["results"])
    table = "\n".join(("| protocol | data | figures |", "|---|---|---|", *rows))
    return f"Measured at the end of the fine-tuning:\n\n{table}\n\nAll figures are in percent.{ap}\n\n{notes}"
