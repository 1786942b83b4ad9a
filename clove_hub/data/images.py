"""From the bytes of an image file to upright 8-bit RGB pixels, or the reason why not."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

_ORIENTATION = 0x0112  # the EXIF tag: how the stored pixels must be turned to stand upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(Exception):
    """An image that cannot be read or decoded, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(data: bytes, name: str = "image", draft: int | None = None) -> NDArray[np.uint8]:
    """Decodes an image file into uint8 (H, W, 3), upright as its EXIF orientation says.

    With `draft` a JPEG comes at 1/2, 1/4 or 1/8 of its size, the smallest of these at which both sides have at
    least `draft` pixels: most of the work is then never done.

    Of an animation the first frame counts. Sixteen bits lose their lower eight. What is transparent lies on
    white: colors stored beneath full transparency mean nothing. Pillow's limit on an image's pixels holds.

    Raises:
        BrokenImage: the file is empty, not an image, truncated or otherwise damaged, too large, or holds
            numbers whose range is unknown (floats, 32-bit integers).
    """
    if not data:
        raise BrokenImage(name, "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if draft is not None:
                image.draft(None, (draft, draft))
            fast = _fast_pixels(image, data)
            if fast is not None:
                turn = _turn(image)
                return fast if turn is None else np.array(Image.fromarray(fast).transpose(turn))
            image.load()  # before the orientation: PNG may store it after the pixels, TIFF is turned here
            turn = _turn(image)
            pixels = _rgb(image, name)
            return np.array(pixels if turn is None else pixels.transpose(turn))
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage(name, f"not an image of a known format ({len(data)} bytes, first {data[:8]!r})") from error
    # Damaged files make Pillow's decoders raise nearly anything: OSError, SyntaxError, ValueError,
    # struct.error, zlib.error, MemoryError. None of it may stop a run.
    except Exception as error:
        raise BrokenImage(name, f"{type(error).__name__}: {error}") from error


def pixel_bytes(data: bytes, draft: int | None = None) -> int:
    """The bytes that `decode` would return, from the head of the file alone.

    Raises:
        BrokenImage: there is no head of an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if draft is not None:
                image.draft(None, (draft, draft))
            size: int = 3 * image.width * image.height
            return size
    except Exception as error:  # as in `decode`
        raise BrokenImage("image", f"{type(error).__name__}: {error}") from error


@cache
def fast_jpeg() -> tuple[Callable[..., NDArray[np.uint8]] | None, str]:
    """simplejpeg's decoder where it gives the same pixels as Pillow's, and what a log should say about it.

    It is tried on a small picture first: the two bring a libjpeg each, and only equal versions round alike.
    """
    try:
        decoder = importlib.import_module("simplejpeg").decode_jpeg
    except Exception as error:  # not installed, or not loadable on this machine, for whatever reason
        return None, f"Pillow (simplejpeg cannot be loaded: {error}; pip install 'clove-hub[fast]' is faster)"
    noise = (np.arange(39 * 53 * 3) * 7919 % 251).astype(np.uint8).reshape(39, 53, 3)
    for draft in (53, 16):  # in full, and at half its size
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=90)
        with Image.open(file) as image:
            image.draft(None, (draft, draft))
            pillow = np.array(image)
        try:
            same = np.array_equal(
                decoder(file.getvalue(), min_height=pillow.shape[0], min_width=pillow.shape[1]), pillow
            )
        except Exception as error:
            return None, f"Pillow (simplejpeg fails: {error})"
        if not same:
            return None, "Pillow (simplejpeg is installed, but gives other pixels than this Pillow)"
    return decoder, "simplejpeg"


def _fast_pixels(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a plain color JPEG, to the bit those of Pillow; None wherever there is a doubt.

    Pillow has read the head, so that its rules hold (size limit, orientation, draft). Whatever is unusual or
    damaged, a mere warning of libjpeg included, is left to Pillow to decide about.
    """
    decoder = fast_jpeg()[0]
    if decoder is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        pixels = decoder(data, min_height=image.height, min_width=image.width)
    except Exception:
        return None
    return pixels if pixels.shape == (image.height, image.width, 3) else None


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata beside good pixels: every viewer shows them as they are stored
        return None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # convert("RGB") would clip at 255: nearly everything white. Older Pillow opens 16 bits as "I".
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise BrokenImage(name, f"its pixels are {kind}, whose range is not known; store it with 8 or 16 bits")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def read_photo(path: Path) -> Image.Image:
    """An upright RGB image.

    Raises:
        ValueError: the file cannot be read or is damaged.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise ValueError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def photos_beneath(folder: Path) -> list[Path]:
    """The images in a folder and its folders, in the order of their paths; hidden ones are left out.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with images")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)}), at any depth")
    return found
