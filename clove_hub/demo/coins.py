"""A data set for a detector, made of one photo: the Greek coins of Pompeii that scikit-image installs.

A threshold finds 22 of the 24 coins; the glow in the corner hides two. The lower rows are for training; the upper one,
with the two that the threshold misses, is for testing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the photo."""
ROW = 92
"""The upper row of coins lies above this line, in pixels."""
SIDE, CROPS = 192, 16
"""Of the squares that are cut from below it."""
MISSED: tuple[Box, ...] = ((22, 34, 67, 74), (81, 39, 120, 74))
"""The two coins that the threshold misses."""


def write_coins(folder: Path) -> Path:
    """Writes the data set in COCO's layout.

    Args:
        folder: gets `train/`, `val/` and `annotations/`.

    Returns:
        The photo of the upper row, on which nothing is trained.
    """
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / "coins.png") as opened:
        photo = opened.convert("RGB")
    found, rng = coins(photo), np.random.default_rng(0)
    lower = [box for box in found if box[1] >= ROW]
    corners = [
        (int(rng.integers(photo.width - SIDE)), int(rng.integers(ROW, photo.height - SIDE))) for _ in range(CROPS)
    ]
    _write(folder, "train", photo, [(x, y, x + SIDE, y + SIDE) for x, y in corners], lower)
    _write(folder, "val", photo, [(0, 0, photo.width, ROW)], [*(box for box in found if box[1] < ROW), *MISSED])
    return folder / "val" / "01.png"


def coins(photo: Image.Image) -> list[Box]:
    """The foreground regions that do not touch the border."""
    import skimage

    tools: Any = skimage  # it has types for a part alone
    gray = np.asarray(photo.convert("L"))
    mask = tools.morphology.closing(gray > tools.filters.threshold_otsu(gray), np.ones((3, 3)))
    regions = tools.measure.regionprops(tools.measure.label(tools.segmentation.clear_border(mask)))
    return [(x0, y0, x1, y1) for y0, x0, y1, x1 in (one.bbox for one in regions if one.area >= 100)]


def _write(folder: Path, split: str, photo: Image.Image, crops: Sequence[Box], boxes: Sequence[Box]) -> None:
    """Cuts crops out of the photo, with the boxes of which at least half is inside."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, (left, top, right, bottom) in enumerate(crops, 1):
        name = f"{number:02}.png"
        photo.crop((left, top, right, bottom)).save(folder / split / name)
        images.append({"id": number, "file_name": name, "width": right - left, "height": bottom - top})
        for x0, y0, x1, y1 in boxes:
            width, height = min(x1, right) - max(x0, left), min(y1, bottom) - max(y0, top)
            if width > 0 and height > 0 and 2 * width * height >= (x1 - x0) * (y1 - y0):
                place = [max(x0, left) - left, max(y0, top) - top, width, height]
                one = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
                annotations.append({**one, "bbox": place, "area": width * height})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "coin"}]}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
