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
from .card_results import explained
from .metadata import check_metadata, eval_results, metadata

PIPELINES = {
    "detection": ("object-detection", "Faster R-CNN", "boxes of"),
    "instances": ("image-segmentation", "Mask R-CNN", "boxes and masks of"),
    "keypoints": ("keypoint-detection", "Keypoint R-CNN", "boxes and keypoints of"),
    "segmentation": ("image-segmentation", "FCN", "for each pixel one of"),
}
"""By task: the Hub's tag, the network, and what it gives."""
MOST_CLASSES = 200
"""Names in the card; config.json has all."""
WRITTEN = {
    "detection": "the detections as COCO results, as a data set in COCO's format, and drawn on the photos",
    "segmentation": "a mask of each photo as PNG, the masks as COCO results and as a data set in COCO's format, and pictures",
}
"""What `clove-hub predict` writes."""
CARD = Template("""---
$front
---

# Model card for $name

torchvision's $kind with a $architecture backbone, fine-tuned on $data. It predicts $gives $count.

$classes

**License:** $license

## How to use

`pip install 'clove-hub[downstream]'` installs what the command and the snippet need. Replace `photos` and
`photo.jpg` by your own. $where

On the command line, for a file or a folder of photos:

```bash
clove-hub predict $source photos --out predictions
```

`predictions` then holds $written.

In Python:

```python
import clove_hub

detector = clove_hub.load_detector("$source")
found = next(detector.predict(["photo.jpg"], threshold=0.5))
print($shown)
```

As an ONNX file, whose outputs are compared with PyTorch's (`pip install 'clove-hub[onnx]'`):

```bash
clove-hub convert $source --to onnx --out $onnx
```

## Training

$training

## Evaluation

$figures

## Limitations

- It finds only the classes above, as they are labeled in the training images. It does worse on subjects, regions, cameras and
  styles that are rare there, and biases of those images carry over. Evaluate on your own data before you rely on it.
- The license covers the weights. The terms of the training images are separate; check that they allow your use.

## Files

| file | content |
|---|---|
| `model.safetensors` | the whole network, $size bytes, sha256 `$sha256` |
| `config.json` | task, backbone, network, images, classes |
| `clove_hub.json` | settings of the fine-tuning, origin of the backbone, results, sha256 of the other files |
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
        front=front if license else f"# license: not chosen yet\n{front}",
        name=name,
        kind=kind,
        architecture=architecture,
        data=f"{data['train_images']:,} images of {data['name']}",
        gives=gives,
        count=count,
        classes=f"Classes: {listed}.",
        license=shown_license(license),
        written=WRITTEN["segmentation" if task == "segmentation" else "detection"],
        where=f"Both load version `{at.tag}` of this repository, also after a newer one is published."
        if at
        else "Run them in the folder of this file.",
        source=at.source if at else ".",
        shown="found.classes" if task == "segmentation" else "found.names, found.boxes",
        onnx="detector.onnx" if at else "../detector.onnx",
        training=_training(facts),
        figures=_figures(facts),
        size=f"{size:,}",
        sha256=facts["sha256"]["model.safetensors"],
    )
    if license:
        check_metadata(card, "clove-hub")
    return card


def _measured() -> dict[str, Any]:
    return {"kind": "measured", "source": "measured by clove-hub at the end of the fine-tuning", "url": None}


def _training(facts: Mapping[str, Any]) -> str:
    origin = facts["origin"]
    data, settings, base = origin["data"], origin["settings"], origin["pretrained"]
    forbids = restriction(base.get("license"))
    rows: dict[str, Any] = {
        "backbone": "random weights" if base["kind"] == "random" else begun_with(origin),
        "fingerprint of the backbone": f"`{base['fingerprint']}`",
        "training images": f"{data['train_images']:,} of {data['name']}",
        "terms of the images": "not recorded",
        "fingerprint of the data": f"`{data['fingerprint']}`",
        "optimizer steps": f"{settings['steps']:,}, with {settings['batch.total'] if 'batch.total' in settings else settings['batch']['total']} images each",
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
    scaled = (
        " `optimizer.learning_rate` is for the preset's batch; it was multiplied by `batch.total` / that batch."
        if sections and settings["optimizer"]["name"] == "sgd"
        else ""
    )
    note = f"\n\nThe license of the weights that it started from {forbids}." if forbids else ""
    return f"{table(rows)}{note}\n\nThe complete settings are in `clove_hub.json`.{scaled}"


def _figures(facts: Mapping[str, Any]) -> str:
    count = facts["origin"]["data"]["test_images"]
    images = f"{count:,} image{'s' if count > 1 else ''}"
    rows = [
        f"| {result['protocol']} | {result['dataset']} {result['split']}, {images} | "
        + ", ".join(f"{with_unit(name)} {value}" for name, value in result["metrics"].items())
        + " |"
        for result in facts["results"]
    ]
    notes = "\n".join(f"- {result['settings']}." for result in facts["results"])
    table = "\n".join(("| protocol | data | figures |", "|---|---|---|", *rows))
    return f"Measured at the end of the fine-tuning:\n\n{table}\n\n{explained(facts['results'])}\n\n{notes}"
