"""Decode an image file into upright 8-bit RGB pixels, or give the reason why not. Nothing else decodes images.

JPEG, PNG, WebP, TIFF, GIF, BMP, JPEG 2000, PNM and AVIF are read by Pillow; HEIC and JPEG XL by separate packages,
which are imported for the first such file.
"""

from __future__ import annotations

import importlib
import io
import os
import stat
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".jfif", ".jp2", ".jpe"),
    *(".pbm", ".pgm", ".pnm", ".ppm"),
)
"""The endings of what Pillow reads."""
EXTRAS = {".heic": "heic", ".heif": "heic", ".hif": "heic", ".jxl": "jxl", ".svs": "tiff"}
"""The endings of what other packages read, and the extra of clove-hub that installs each."""
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PACKAGES = {"heic": "pillow_heif", "jxl": "pillow_jxl", "tiff": "tifffile", "dicom": "pydicom"}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")

ORIENTATION = 0x0112  # the EXIF tag: how the stored pixels must be turned to stand upright
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags; photometric 0: zero is white
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(ValueError):
    """An image that cannot be read or decoded, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_image(path: Path) -> NDArray[np.uint8]:
    """Reads and decodes a file: uint8 (H, W, 3), upright.

    Raises:
        BrokenImage: as `read_bytes` and `decode`.
    """
    name = printable(path)
    return decode(read_bytes(path, name), name)


def read_bytes(path: str | bytes | Path, name: str) -> bytes:
    """Reads a file, but never waits for the other end of a named pipe.

    Raises:
        BrokenImage: the file cannot be read, or is a pipe, a socket or a device.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BrokenImage(name, "not a regular file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BrokenImage(name, f"cannot be read: {error.strerror or error}") from error


def printable(name: str | bytes | Path) -> str:
    """A file name as text for any log: file systems allow names that are not valid UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def decode(data: bytes, name: str = "image", draft: int | None = None) -> NDArray[np.uint8]:
    """Decodes an image file into uint8 (H, W, 3), upright as its EXIF orientation says.

    With `draft`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest of these at which both sides have at
    least `draft` pixels, which skips most of the work.

    Only the first frame of an animation is read. 16-bit values lose their lower eight bits. Transparent pixels are
    blended onto white: colors stored beneath full transparency mean nothing. Pillow's limit on an image's pixels
    applies.

    Raises:
        BrokenImage: the file is empty, not an image, truncated or otherwise damaged, too large, or holds
            numbers whose range is unknown (floats, 32-bit integers).
    """
    if not data:
        raise BrokenImage(name, "the file is empty")
    try:
        with _opened(data) as image:
            _draft(image, draft)
            fast = _fast_pixels(image, data)
            if fast is not None:
                turn = turn_of(image)
                return fast if turn is None else np.array(Image.fromarray(fast).transpose(turn))
            image.load()  # before the orientation: PNG may store it after the pixels, TIFF is turned here
            turn = turn_of(image)
            upright = _rgb(image, name) if turn is None else _rgb(image, name).transpose(turn)
            if not all(upright.size):
                raise BrokenImage(name, f"it has {upright.width} x {upright.height} pixels")
            return np.array(upright)
    except BrokenImage:
        raise
    except UnidentifiedImageError as error:
        if (extra := _extra(data)) and not _register(extra):
            kind = {"heic": "HEIC", "jxl": "JPEG XL"}[extra]
            raise BrokenImage(name, f"a {kind} image, which needs pip install 'clove-hub[{extra}]'") from error
        if data[:4] in TIFF_HEADS:
            raise BrokenImage(name, "a TIFF that is not a photo: set data.bands to its number of bands") from error
        raise BrokenImage(name, f"not an image of a known format ({len(data)} bytes, first {data[:8]!r})") from error
    except Image.DecompressionBombError as error:
        way_out = ". With pip install 'clove-hub[tiff]', only the needed parts of a large TIFF in a folder are read"
        raise BrokenImage(name, f"{error}{way_out if data[:4] in TIFF_HEADS else ''}") from error
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
        with _opened(data) as image:
            _draft(image, draft)
            size: int = 3 * image.width * image.height
            return size
    except Exception as error:  # as in `decode`
        raise BrokenImage("image", f"{type(error).__name__}: {error}") from error


def orientation(data: bytes) -> int:
    """The EXIF orientation by which `decode` turns an image: 1 for none, 5 to 8 exchange width and height."""
    try:
        with _opened(data) as image:
            stored = image.getexif().get(ORIENTATION)
    except Exception:  # as in `decode`
        return 1
    return stored if stored in _TURNS else 1


@cache
def readable_suffixes() -> frozenset[str]:
    """The endings of files that can be read here: with those of the packages that are installed."""
    return frozenset(SUFFIXES) | {ending for ending, extra in EXTRAS.items() if installed(extra)}


@cache
def installed(extra: str) -> bool:
    """Whether the package is there that an extra of clove-hub brings."""
    return find_spec(_PACKAGES[extra]) is not None


def _opened(data: bytes) -> Image.Image:
    if extra := _extra(data):
        _register(extra)
    return Image.open(io.BytesIO(data))


def _extra(data: bytes) -> str | None:
    """The extra of clove-hub that brings the reader of a file, by its first bytes; None where Pillow reads it."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return "heic"
    return "jxl" if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")) else None


@cache
def _register(extra: str) -> bool:
    """Makes Pillow open what the extra's package reads; False where that is not installed."""
    try:
        if extra == "heic":
            importlib.import_module("pillow_heif").register_heif_opener()
        else:
            importlib.import_module("pillow_jxl")  # which registers itself
    except ImportError:
        return False
    return True


@cache
def fast_jpeg() -> tuple[Callable[..., NDArray[np.uint8]] | None, str]:
    """simplejpeg's decoder where it gives the same pixels as Pillow's, and what a log should say about it.

    It is tried on a small picture first: the two bring a libjpeg each, and only equal versions round alike.
    """
    try:
        decoder = importlib.import_module("simplejpeg").decode_jpeg
    except ModuleNotFoundError:
        return None, "Pillow (pip install 'clove-hub[fast]' for a faster decoder)"
    except Exception as error:  # not loadable on this machine, for whatever reason
        return None, f"Pillow (simplejpeg cannot be loaded: {error})"
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


def _draft(image: Image.Image, draft: int | None) -> None:
    if draft is not None and image.format in ("JPEG", "MPO"):  # HEIC would give an embedded thumbnail
        image.draft(None, (draft, draft))


def turn_of(image: Image.Image) -> Image.Transpose | None:
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return None  # the codestream has its own orientation, which the decoder applies; EXIF's must be ignored
    try:
        return _TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata beside good pixels: every viewer shows them as they are stored
        return None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # convert("RGB") would clip at 255: nearly everything white. Older Pillow opens 16 bits as "I".
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]  # TIFF may store 12, and Pillow does not scale these
        values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(~values if tags.get(_PHOTOMETRIC) == 0 else values).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise BrokenImage(name, f"its pixels are {kind}, whose range is not known; store it with 8 or 16 bits")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
