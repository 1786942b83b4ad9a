"""TIFF by tifffile: any number of bands with 8 or 16 bits, and of large images only the tiles under a crop."""

from __future__ import annotations

import importlib
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .images import ORIENTATION, TIFF_HEADS, BrokenImage, installed, printable

ENDINGS = (".tif", ".tiff", ".svs")
LARGE = Image.MAX_IMAGE_PIXELS or 2**26
"""Pixels beyond which Pillow warns of an image; those of larger TIFFs are read tile by tile."""
_MOST = 2 * LARGE  # of one crop: what Pillow reads at most of an image
_SMALL = LARGE // 64  # bytes that so many pixels hardly fit into, so that smaller files need no look into their head
_INVERTED, _PALETTE = 0, 3  # photometric interpretations


def decode_tiff(data: bytes, name: str) -> NDArray[Any]:
    """The first image of a TIFF as it is stored, but upright: (H, W, C), bands last however they are stored.

    Raises:
        BrokenImage: tifffile is not installed, cannot read it, or there are more axes than rows, columns and bands.
    """
    with _first_series(io.BytesIO(data), name) as series:
        pixels = series.asarray()
        bands = [axis for axis, length in enumerate(pixels.shape) if series.axes[axis] not in "YX" and length > 1]
        if len(bands) > 1 or not {"Y", "X"} <= set(series.axes):
            raise BrokenImage(
                name, f"it has the axes {series.axes} of {pixels.shape}; expected rows, columns and bands"
            )
        if bands:
            pixels = np.moveaxis(pixels, bands[0], -1)
        rows, columns = series.shape[series.axes.index("Y")], series.shape[series.axes.index("X")]
        page = series.keyframe
        return turned(_levels(pixels.reshape(rows, columns, -1), page, name), page.tags.valueof(ORIENTATION, 1))


@dataclass
class LargeImage:
    """A TIFF on disk of which only the header has been read."""

    path: Path
    level: int
    """Which of its resolutions: 0 is the full one."""
    shape: tuple[int, int, int]
    """(H, W, C) at this resolution."""

    @cached_property
    def name(self) -> str:
        return printable(self.path)

    def crops(self, boxes: NDArray[np.int64]) -> list[NDArray[Any]]:
        """Reads the tiles under crops: one array (h, w, C) for each of (N, 4) top, left, height, width.

        Raises:
            BrokenImage: a tile is damaged, or a crop has more pixels than Pillow reads at most.
        """
        if (most := int((boxes[:, 2] * boxes[:, 3]).max())) > _MOST:
            raise BrokenImage(
                self.name,
                f"a crop has {most / 1e6:.0f} megapixels, more than {_MOST / 1e6:.0f}: set data.draft=auto and give the "
                "file overviews (gdaladdo, or vips tiffsave --pyramid), or choose smaller crops",
            )
        with open(self.path, "rb") as file, _first_series(file, self.name) as series:
            pages = list(series.levels[self.level].pages)
            return [
                np.concatenate([_levels(_region(page, file, *box), page.keyframe, self.name) for page in pages], axis=2)
                for box in boxes.tolist()
            ]


def open_large(path: Path | bytes, draft: int | None) -> LargeImage | None:
    """A TIFF of more than LARGE pixels, for its tiles to be read; None for any other file, which is decoded whole.

    Args:
        draft: the smallest resolution is taken at which both sides have at least so many pixels; None for the full one.

    Raises:
        BrokenImage: tifffile cannot read it.
    """
    path = Path(os.fsdecode(path))
    if path.suffix.lower() not in ENDINGS or not installed("tiff"):
        return None
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < _SMALL or file.read(4) not in TIFF_HEADS:
                return None
            file.seek(0)
            with _first_series(file, printable(path)) as series:
                return _large(path, series, draft)
    except OSError as error:
        raise BrokenImage(printable(path), f"cannot be read: {error.strerror or error}") from error


def _large(path: Path, series: Any, draft: int | None) -> LargeImage | None:
    page = series.keyframe
    pages = list(series.pages)
    # One page with all bands, or one for each; a page that tifffile made up has no tiles of its own.
    axes = series.axes.replace("Y", "").replace("X", "")
    own = (len(pages) == 1 and axes in ("", "S")) or (
        len(axes) == 1 and len(pages) == series.shape[series.axes.index(axes)]
    )
    if page.imagelength * page.imagewidth <= LARGE or not own or None in pages:
        return None
    if page.tags.valueof(ORIENTATION, 1) != 1 or page.imagedepth != 1:
        return None
    sizes = [(level.keyframe.imagelength, level.keyframe.imagewidth) for level in series.levels]
    enough = [number for number, size in enumerate(sizes) if draft is not None and min(size) >= draft]
    level = min(enough, key=lambda number: math.prod(sizes[number]), default=0)
    return LargeImage(path, level, (*sizes[level], page.samplesperpixel * len(pages)))


@contextmanager
def _first_series(file: BinaryIO, name: str) -> Iterator[Any]:
    """tifffile's view of a file's first image.

    Raises:
        BrokenImage: tifffile is not installed, or raises anything in the context.
    """
    if not installed("tiff"):
        raise BrokenImage(name, "a TIFF, whose bands and bits need pip install 'clove-hub[tiff]'")
    try:
        with importlib.import_module("tifffile").TiffFile(file) as tiff:
            yield tiff.series[0]
    except BrokenImage:
        raise
    except Exception as error:  # damaged files make its decoders raise nearly anything, as Pillow's do
        raise BrokenImage(name, f"{type(error).__name__}: {error}") from error


def _region(page: Any, file: BinaryIO, top: int, left: int, height: int, width: int) -> NDArray[Any]:
    """The pixels (height, width, samples) of a part of a page, from the tiles or strips that it touches."""
    key = page.keyframe
    tile = (key.tilelength, key.tilewidth) if key.is_tiled else (key.rowsperstrip, key.imagewidth)
    rows, columns = math.ceil(key.imagelength / tile[0]), math.ceil(key.imagewidth / tile[1])
    found = np.full((height, width, key.samplesperpixel), key.nodata, key.dtype)
    tables = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader} if key.compression in _JPEG else {}
    separate = key.samplesperpixel if key.planarconfig == 2 else 1
    for plane in range(separate):
        samples = slice(plane, plane + 1) if separate > 1 else slice(None)
        for row in range(top // tile[0], (top + height - 1) // tile[0] + 1):
            for column in range(left // tile[1], (left + width - 1) // tile[1] + 1):
                number = (plane * rows + row) * columns + column
                if not page.databytecounts[number]:  # a tile that was never written holds nothing
                    continue
                file.seek(page.dataoffsets[number])
                segment, _, _ = key.decode(file.read(page.databytecounts[number]), number, **tables)
                down, across = row * tile[0] - top, column * tile[1] - left  # of the tile in what is asked for
                part = segment[0, max(-down, 0) : height - down, max(-across, 0) : width - across]
                below, beside = max(down, 0), max(across, 0)
                found[below : below + part.shape[0], beside : beside + part.shape[1], samples] = part
    return found


_JPEG = {6, 7, 34892, 33007}  # compressions whose tiles share tables


def _levels(pixels: NDArray[Any], page: Any, name: str) -> NDArray[Any]:
    """Values whose largest is that of their type, zero for black."""
    if page.photometric == _PALETTE:
        raise BrokenImage(name, "its pixels are indices into a palette; store colors or values instead")
    bits = page.bitspersample
    if pixels.dtype == np.uint16 and bits < 16:
        pixels = pixels << (16 - bits)
    return ~pixels if page.photometric == _INVERTED and pixels.dtype.kind == "u" else pixels


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Pixels (H, W, C) upright, by their EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
