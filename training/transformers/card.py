"""The card of a fine-tuned model: its description, its figures, and the code that loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

import yaml

from clove_hub.evaluation.result import Record, in_digits
from clove_hub.weights.transformers import Model

DETECT = """found = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(image.height, image.width)])[0]
for score, label, box in zip(found["scores"], found["labels"], found["boxes"]):
    print(model.config.id2label[label.item()], score.item(), box.tolist())"""
SEGMENT = """classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]
print({model.config.id2label[number] for number in classes.unique().tolist()})"""
BODY = Template(
    """# $model on $architecture

The backbone is `$backbone`; fine-tuned by `clove-hub downstream transformers $model` on $data, $images images.

| metric | $data, $split, $count images |
|---|---|
$rows

Images are normalized by the mean $mean and the standard deviation $std, as the backbone was trained with; the image processor's file
says so, and has their size.

```python
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, $opened_by

place = "."  # this folder, or its repository on the Hub
processor = AutoImageProcessor.from_pretrained(place)
model = $opened_by.from_pretrained(place).eval()
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
$reading
```

Classes: $classes.
"""
)


def write_card(folder: Path, kind: Model, record: Record, classes: Sequence[str]) -> None:
    """Write the folder's README.md."""
    assert record.preprocessing is not None
    segmenter = "mIoU" in record.metrics
    head = {
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation" if segmenter else "object-detection",
        "tags": ["clove-hub"],
    }
    text = BODY.substitute(
        model=record.settings["model"],
        architecture=record.architecture,
        backbone=record.model,
        data=record.data.name,
        images=record.settings["train_images"],
        split=record.split,
        count=record.data.samples,
        rows="\n".join(f"| {name} | {in_digits(name, value)} |" for name, value in record.metrics.items()),
        mean=record.preprocessing["mean"],
        std=record.preprocessing["std"],
        opened_by=kind.opened_by,
        reading=SEGMENT if segmenter else DETECT,
        classes=", ".join(classes),
    )
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{text}", encoding="utf-8")
