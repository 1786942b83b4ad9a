"""Images with annotations beside predictions, as in the paper's Figure 3."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

from clove_hub.data.coco import Category
from clove_hub.data.masks import VOID

Color = tuple[int, int, int]
SIDE = 480  # minimum pixels of a picture's shorter side: names must be readable
FONT = Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
LETTERS, MARGIN = 14, 6  # pixels
SHOWN = 20  # objects drawn per image, by descending score


def draw_found(image: Tensor, found: Mapping[str, Tensor], categories: Sequence[Category], threshold: float) -> Tensor:
    """An image with boxes, names, masks and keypoints of the objects with a score of at least `threshold`.

    Args:
        image: (3, H, W) uint8.
        found: outputs of torchvision's detectors; without scores they are the ground truth.

    Returns:
        (3, H', W') uint8, enlarged if the image is small.
    """
    scores = found.get("scores")
    keep = torch.arange(len(found["boxes"]))
    if scores is not None:
        keep = scores.cpu().argsort(descending=True)
        keep = keep[scores.cpu()[keep] >= threshold]
    keep = keep[:SHOWN]
    factor = max(1, -(-SIDE // min(image.shape[1:])))
    image = _enlarged(image, factor)
    if not len(keep):
        return image
    labels = found["labels"].cpu()[keep].tolist()
    colors = [palette(label) for label in labels]
    names = [categories[label - 1].name for label in labels]
    if scores is not None:
        names = [f"{name} {score:.0%}" for name, score in zip(names, scores.cpu()[keep].tolist(), strict=True)]
    if "masks" in found:
        masks = found["masks"].cpu()[keep]
        inside = (masks[:, 0] if masks.ndim == 4 else masks) >= 0.5
        image = draw_segmentation_masks(image, _enlarged(inside, factor), alpha=0.5, colors=colors)
    boxes = found["boxes"].cpu()[keep] * factor
    image = draw_bounding_boxes(
        image, boxes, names, colors=colors, width=2, fill_labels=True, label_colors="white",
        font=str(FONT), font_size=LETTERS,
    )  # fmt: skip
    if "keypoints" in found:
        points = found["keypoints"].cpu()[keep]
        seen = points[..., 2] > 0
        image = draw_keypoints(
            image, points[..., :2] * factor, visibility=seen, connectivity=list(categories[0].skeleton),
            colors="#E69F00", radius=3, width=2,
        )  # fmt: skip
    return image


def draw_classes(image: Tensor, classes: Tensor) -> Tensor:
    """An image overlaid with the colors of its pixels' classes, (3, H, W) uint8; void pixels are unchanged."""
    colors = torch.zeros(256, 3, dtype=torch.uint8)
    colors[:VOID] = torch.tensor([palette(number) for number in range(VOID)], dtype=torch.uint8)
    painted = colors[classes.long().cpu()].permute(2, 0, 1)
    mixed = (0.4 * image.float() + 0.6 * painted.float()).round().to(torch.uint8)
    return torch.where(classes.cpu() == VOID, image, mixed)


def save_beside(path: Path, titles: Sequence[str], pictures: Sequence[Tensor], legend: Mapping[str, Color]) -> None:
    """Write pictures of one size side by side, with titles above and a legend of the colors below.

    Args:
        titles: titles of the pictures.
        pictures: (3, H, W) uint8.
        legend: names and colors.
    """
    _, height, width = pictures[0].shape
    gap = 8
    whole = len(pictures) * (width + gap) - gap
    font = ImageFont.truetype(FONT, LETTERS)
    line = LETTERS + MARGIN
    lines = _lines(list(legend), whole, font)
    sheet = Image.new("RGB", (whole, line + height + MARGIN + len(lines) * line), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
        pen.text((number * (width + gap), 0), title, "black", font)
        sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (number * (width + gap), line))
    for row, names in enumerate(lines):
        left, top = 0, line + height + MARGIN + row * line
        for name in names:
            pen.rectangle((left, top + 2, left + LETTERS, top + 2 + LETTERS), legend[name])
            pen.text((left + LETTERS + MARGIN, top), name, "black", font)
            left += _wide(name, font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


def _lines(names: Sequence[str], width: int, font: ImageFont.FreeTypeFont) -> list[list[str]]:
    """The names in lines not wider than the pictures, unless a single name is."""
    lines: list[list[str]] = []
    left = width
    for name in names:
        wide = _wide(name, font)
        if left + wide > width:
            lines.append([])
            left = 0
        lines[-1].append(name)
        left += wide
    return lines


def _wide(name: str, font: ImageFont.FreeTypeFont) -> int:
    """Width of a legend entry in pixels."""
    return int(font.getlength(name)) + LETTERS + 3 * MARGIN


def palette(number: int) -> Color:
    """A color for a class; consecutive numbers have distant hues."""
    hue = number * 0.61803398875 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.35 * (number % 2), 0.95 - 0.25 * (number % 3) / 2)
    return round(255 * red), round(255 * green), round(255 * blue)


def _enlarged(image: Tensor, factor: int) -> Tensor:
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
