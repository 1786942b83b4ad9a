"""From the bytes of an image file to upright 8-bit RGB pixels, or the reason why not."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

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


def decode(data: bytes, name: str = "image") -> NDArray[np.uint8]:
    """Decodes an image file into uint8 (H, W, 3), upright as its EXIF orientation says.

    Of an animation the first frame counts. Sixteen bits lose their lower eight. What is transparent lies on
    white: colours stored beneath full transparency mean nothing. Pillow's limit on an image's pixels holds.

    Raises:
        BrokenImage: the file is empty, not an image, truncated or otherwise damaged, too large, or holds
            numbers whose range is unknown (floats, 32-bit integers).
    """
    if not data:
        raise BrokenImage(name, "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
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
