"""Made-up pictures, as files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Smooth colors, different for each number, without any symmetry."""
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 150, height))
    channels = (across + 5 * (number % 11), down + 50, (across + down) / 2 + 3 * (number % 17))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def jpeg(number: int) -> bytes:
    return encoded(picture(number), "JPEG", quality=90)


def files(folder: Path, *names: str) -> Path:
    """Writes picture i under the i-th name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))
    return folder
