"""Images of any number of bands and of 16 bits: gray X-rays, RGB with near infrared, satellites' spectra.

`Reading` says what images are decoded into. Three bands of 8 bits are photos, which `images.decode` reads.
"""

from __future__ import annotations

import importlib
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clove_hub.documents import read_object

from . import images
from .images import TIFF_HEADS, BrokenImage, installed, printable, read_bytes
from .tiff import decode_tiff

Depth = Literal[8, 16]
MEASURED = "clove_hub_bands.json"
"""The file in a folder of images in which `clove-hub check --bands` stores their mean and standard deviation."""
_LUMINANCE = (0.299, 0.587, 0.114)
_AS_STORED = ("L", "LA", "RGB", "RGBA")  # Pillow's modes of 8 bits whose bands are values


@dataclass(frozen=True)
class Reading:
    """The format into which image files are decoded: uint8 or uint16 (H, W, bands), whose largest value is white.

    TIFF is read by tifffile, `.npy` by NumPy, DICOM by pydicom, everything else by Pillow. For one band, a color image
    is converted to luminance; for three, a gray image is repeated. Other images with another number of bands are
    refused.
    """

    bands: int = 3
    depth: Depth = 8
    """Bits of a value that are kept: with 8, sixteen lose their lower eight."""
    draft: int | None = None
    """As in `images.decode`."""

    @property
    def of_photos(self) -> bool:
        return (self.bands, self.depth) == (3, 8)

    @property
    def suffixes(self) -> frozenset[str]:
        """The endings, in lower case, of the files that can be read here."""
        found = images.readable_suffixes()
        if self.of_photos:
            return found
        return found | {".npy"} | ({".dcm", ".dicom"} if installed("dicom") else set())

    def decode(self, data: bytes, name: str = "image") -> NDArray[Any]:
        """Decodes a file.

        Raises:
            BrokenImage: as `images.decode`, or it has another number of bands, or values whose range is not known.
        """
        if self.of_photos:
            return images.decode(data, name, self.draft)
        if not data:
            raise BrokenImage(name, "the file is empty")
        return self.fitted(_stored(data, name, self.bands, self.draft), name)

    def read(self, path: Path) -> NDArray[Any]:
        """Reads and decodes a file; raises as `read_bytes` and `decode`."""
        name = printable(path)
        return self.decode(read_bytes(path, name), name)

    def levels(self, path: Path) -> NDArray[Any]:
        """A file's values in units of which 255 are white: uint8 of a photo, else float32, (H, W, bands)."""
        pixels = self.read(path)
        return pixels if self.of_photos else np.float32(255 / np.iinfo(pixels.dtype).max) * pixels

    def nbytes(self, data: bytes) -> int:
        """The bytes that `decode` would return; of what is no photo it must decode to know.

        Raises:
            BrokenImage: as `decode`.
        """
        return images.pixel_bytes(data, self.draft) if self.of_photos else self.decode(data).nbytes

    def fitted(self, pixels: NDArray[Any], name: str) -> NDArray[Any]:
        """Values as a file has them (H, W, C) with the bands and the depth that are wanted.

        Raises:
            BrokenImage: there is another number of bands, or no range of values is known.
        """
        if pixels.dtype not in (np.uint8, np.uint16):
            raise BrokenImage(
                name,
                f"its values are {pixels.dtype}, whose range is not known; store them as unsigned integers of 8 or 16 bits",
            )
        if not pixels.size:
            raise BrokenImage(name, f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels")
        kind = pixels.dtype
        if self.bands == 1 and pixels.shape[2] == 3:
            pixels = np.rint(pixels @ np.array(_LUMINANCE))[:, :, None].astype(kind)
        if self.bands == 3 and pixels.shape[2] == 1:
            pixels = pixels.repeat(3, axis=2)
        if pixels.shape[2] != self.bands:
            raise BrokenImage(
                name,
                f"it has {pixels.shape[2]} bands, expected {self.bands}, the value of data.bands (of `clove-hub check`: --bands)",
            )
        if self.depth == 8 and kind == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        return np.ascontiguousarray(pixels)


PHOTOS = Reading()


def _stored(data: bytes, name: str, bands: int, draft: int | None) -> NDArray[Any]:
    """All bands and bits of a file, upright: (H, W, C). For one or three bands transparency lies on white, as in photos."""
    if data[:4] in TIFF_HEADS and data[128:132] != b"DICM":  # a DICOM may begin with the head of a TIFF
        return decode_tiff(data, name)
    try:
        if data.startswith(b"\x93NUMPY"):
            return _array(np.load(io.BytesIO(data), allow_pickle=False), name)
        if data[128:132] == b"DICM":
            return _dicom(data, name)
        if data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] != b"\0":
            raise BrokenImage(name, "a color PNG of 16 bits, of which Pillow reads only 8; store it as a TIFF")
        with Image.open(io.BytesIO(data)) as image:
            wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            as_stored = image.mode in _AS_STORED and (bands not in (1, 3) or len(image.getbands()) == bands)
            if wide or as_stored:
                image.load()  # before the orientation: PNG may store it after the pixels
                turn = images.turn_of(image)
                pixels = np.asarray(image if turn is None else image.transpose(turn))
                pixels = pixels.astype(np.uint16) if wide else pixels
                return pixels if pixels.ndim == 3 else pixels[:, :, None]
    except BrokenImage:
        raise
    except Exception as error:  # damaged files make decoders raise nearly anything
        raise BrokenImage(name, f"{type(error).__name__}: {error}") from error
    return images.decode(data, name, draft)  # three bands, or gray three times


def _array(pixels: NDArray[Any], name: str) -> NDArray[Any]:
    """An array (H, W), (H, W, C) or (C, H, W), of which the shortest axis holds the bands, as (H, W, C)."""
    if pixels.ndim == 2:
        return pixels[:, :, None]
    if pixels.ndim != 3:
        raise BrokenImage(name, f"an array of shape {pixels.shape}; expected rows, columns and bands")
    return np.moveaxis(pixels, 0, -1) if pixels.shape[0] < pixels.shape[2] else pixels


def _dicom(data: bytes, name: str) -> NDArray[Any]:
    """The stored values of a DICOM image, which are spread over 16 bits; MONOCHROME1 is turned so that zero is black."""
    if not installed("dicom"):
        raise BrokenImage(name, "a DICOM image, which needs pip install 'clove-hub[dicom]'")
    dataset = importlib.import_module("pydicom").dcmread(io.BytesIO(data))
    bits, frames = int(dataset.BitsStored), int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise BrokenImage(name, f"a DICOM of {frames} frames; store each frame as a file")
    pixels: NDArray[Any] = dataset.pixel_array
    if dataset.PixelRepresentation:  # signed, as CT's Hounsfield units: zero goes to the middle
        pixels = (pixels.astype(np.int32) + (1 << (bits - 1))).clip(0)
    kind, full = (np.uint8, 8) if bits <= 8 else (np.uint16, 16)
    pixels = (pixels.astype(np.uint32) << (full - bits)).astype(kind)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = ~pixels
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


# ---- mean and standard deviation -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    """What mean and standard deviation of each band are made from. Values are in units of which white is 1."""

    pixels: int
    first: NDArray[np.float64]
    """(bands,): the sum of all values, and ..."""
    second: NDArray[np.float64]
    """... of their squares."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.pixels + other.pixels, self.first + other.first, self.second + other.second)


def sums(pixels: NDArray[Any]) -> Sums:
    """Of one image: uint8 or uint16 (H, W, bands)."""
    values = pixels.reshape(-1, pixels.shape[2]) / np.float64(np.iinfo(pixels.dtype).max)
    return Sums(len(values), values.sum(0), np.square(values).sum(0))


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation of each band over all pixels of a folder's images, where white is 1."""

    images: int
    """Files that were found, whether they could be read or not."""
    pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def measured(images: int, total: Sums) -> Measured:
    """What the sums over all images say."""
    mean = total.first / total.pixels
    std = np.sqrt((total.second / total.pixels - mean**2).clip(0))
    return Measured(images, total.pixels, tuple(mean.tolist()), tuple(std.tolist()))


def pooled(parts: Sequence[Measured]) -> Measured:
    """Of several folders together."""
    total = [
        Sums(part.pixels, part.pixels * mean, part.pixels * (np.square(part.std) + mean**2))
        for part, mean in ((part, np.array(part.mean)) for part in parts)
    ]
    return replace(measured(sum(part.images for part in parts), sum(total[1:], total[0])))


def write_measured(folder: Path, reading: Reading, found: Measured) -> Path:
    """Store it in the folder; return the file.

    Raises:
        ValueError: it cannot be written.
    """
    path = folder / MEASURED
    document = {"bands": reading.bands, "depth": reading.depth, **vars(found)}
    try:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; give the run data.mean and data.std as printed"
        ) from error
    return path


def read_measured(folder: Path, reading: Reading, images: int) -> Measured:
    """Read what `write_measured` stored for this reading of the folder.

    Args:
        images: that there are now.

    Raises:
        ValueError: nothing is stored, or it was measured on other images.
    """
    path = folder / MEASURED
    command = f"clove-hub check {shlex.quote(str(folder))} --bands {reading.bands} --depth {reading.depth}"
    way_out = f"`{command}` measures and stores them, or give data.mean and data.std"
    if not path.is_file():
        raise ValueError(f"mean and standard deviation of the {reading.bands} bands are not known: {way_out}")
    found = read_object(path)
    try:
        bands, depth = found["bands"], found["depth"]
        stored = Measured(int(found["images"]), int(found["pixels"]), tuple(found["mean"]), tuple(found["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what clove-hub check writes ({error!r}): {way_out}") from error
    if (bands, depth, stored.images) != (reading.bands, reading.depth, images):
        raise ValueError(
            f"{path} is for {stored.images} images with {bands} bands of {depth} bits, but the folder has {images} images, read "
            f"as {reading.bands} bands of {reading.depth} bits: {way_out}"
        )
    return stored
