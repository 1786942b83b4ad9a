"""Load a backbone in one line and draw how much each cell of a photo resembles a chosen one.

    python examples/use_backbone.py bundles/mine photo.jpg 0.4 0.5 similar.png

The backbone is whatever clove-hub takes: a run, a bundle, `hf-hub:organization/name`, a model of timm such as `resnet50`,
`random:resnet50` to compare with.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from torch import Tensor

import clove_hub


def similar(source: str, photo: Image.Image, x: float, y: float) -> Tensor:
    """The cosine of each cell with the one at (x, y), given as fractions of the photo's sides: (h, w)."""
    backbone = clove_hub.load_backbone(source)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    pixels = torch.frombuffer(bytearray(photo.convert("RGB").tobytes()), dtype=torch.uint8)
    image = pixels.view(photo.height, photo.width, 3).permute(2, 0, 1) / 255
    with torch.no_grad():
        cells = backbone.maps(backbone.padded(((image - mean) / std)[None]))[0][0]  # (C, h, w)
    cells = torch.nn.functional.normalize(cells, dim=0)
    _, height, width = cells.shape
    point = cells[:, min(int(y * height), height - 1), min(int(x * width), width - 1)]
    return torch.einsum("chw,c->hw", cells, point)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What resembles a point of a photo?")
    parser.add_argument("source")
    parser.add_argument("photo")
    parser.add_argument("x", type=float)
    parser.add_argument("y", type=float)
    parser.add_argument("out")
    given = parser.parse_args()
    photo = Image.open(given.photo)
    found = similar(given.source, photo, given.x, given.y)
    levels = ((found + 1) / 2 * 255).round().to(torch.uint8)
    drawn = Image.frombytes("L", (levels.shape[1], levels.shape[0]), bytes(levels.flatten().tolist()))
    drawn.resize(photo.size, Image.Resampling.NEAREST).save(given.out)
