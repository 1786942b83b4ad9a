"""One folder with every awkward kind of picture that we know of, and what each should be read as."""

from __future__ import annotations

import importlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pictures import encoded, picture
from PIL import Image, features

Pixels = NDArray[np.uint8]

STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p[:, ::-1].transpose(1, 0, 2),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p[::-1].transpose(1, 0, 2),
}
"""How each EXIF orientation stores an upright picture: where its row 0 and column 0 belong, by the EXIF standard."""


class Expected(NamedTuple):
    pixels: Pixels
    error: float
    """The mean difference that the file's compression may make."""


class Awkward(NamedTuple):
    root: Path
    good: dict[bytes, Expected]
    """By the path below the root."""
    broken: dict[str, str]
    """The path, and a part of the reason."""
    left_out: dict[str, int]
    """How many files of each kind are no images."""


def awkward_pictures(root: Path, pixels: Pixels | None = None) -> Awkward:
    """Makes the folder.

    Args:
        pixels: of an upright picture, (H, W, 3); a made one by default.
    """
    upright = np.array(picture(size=(80, 60))) if pixels is None else pixels
    root.mkdir(parents=True)
    good: dict[bytes, Expected] = {}

    def put(name: str | bytes, data: bytes, pixels: Any = upright, error: float = 0) -> None:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        shown = np.broadcast_to(np.asarray(pixels), (*np.shape(pixels)[:2], 3)).astype(np.uint8)
        good[os.fsencode(name)] = Expected(shown, error)

    image = Image.fromarray(upright)
    gray = image.convert("L")
    alone = np.asarray(gray)[..., None]
    put("plain.png", encoded(image))
    put("UPPER.PNG", encoded(image))
    put("Mixed.JpEg", encoded(image, "JPEG", quality=95, subsampling=0), error=3)
    put(b"caf\xe9.png", encoded(image))
    put("deep/er/nested.webp", encoded(image, "WEBP", lossless=True))
    put("png named.jpg", encoded(image))
    put("bitmap.bmp", encoded(image, "BMP"))
    put("lossless.jp2", encoded(image, "JPEG2000"))
    put("portable.ppm", encoded(image, "PPM"))
    put("one.png", encoded(image.crop((0, 0, 1, 1))), upright[:1, :1])
    put("thread.png", encoded(Image.fromarray(np.repeat(upright[:1], 40, 1))), np.repeat(upright[:1], 40, 1))

    # ---- bits and colors
    put("gray.jpg", encoded(gray, "JPEG", quality=95), alone, 3)
    put("bilevel.png", encoded(gray.convert("1")), np.asarray(gray.convert("1"))[..., None] * 255)
    palette = image.quantize(16)
    put("palette.png", encoded(palette), np.asarray(palette.convert("RGB")))
    put("clear.gif", encoded(palette, "GIF", transparency=3), on_white(palette, 3))
    put("clear palette.png", encoded(palette, transparency=3), on_white(palette, 3))
    alpha = np.arange(upright.shape[1], dtype=np.uint8)[None, :, None].repeat(len(upright), 0)
    put("rgba.png", encoded(Image.fromarray(np.concatenate([upright, alpha], 2))), blended(upright, alpha), 1)
    put("la.png", encoded(Image.fromarray(np.concatenate([alone, alpha], 2))), blended(alone, alpha), 1)
    wide = alone.astype(np.uint16) * 256 + 77
    put("gray16.png", encoded(Image.fromarray(wide[..., 0])), alone)
    put("gray16.pgm", f"P5 {gray.width} {gray.height} 65535\n".encode() + wide.astype(">u2").tobytes(), alone)
    put("inks.jpg", encoded(image.convert("CMYK"), "JPEG", quality=95), error=6)
    put("progressive.jpg", encoded(image, "JPEG", quality=95, subsampling=0, progressive=True), error=3)

    # ---- orientation
    for number, stored in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = number
        turned = Image.fromarray(np.ascontiguousarray(stored(upright)))
        put(f"turned{number}.jpg", encoded(turned, "JPEG", quality=95, subsampling=0, exif=exif.tobytes()), error=3)
        put(f"turned{number}.png", encoded(turned, exif=exif.tobytes()))
        put(f"turned{number}.tif", encoded(turned, "TIFF", exif=exif.tobytes()))

    # ---- several pictures in a file: the first counts
    other = Image.fromarray(255 - upright)
    put("moving.webp", encoded(image, "WEBP", lossless=True, save_all=True, append_images=[other]))
    put(
        "moving.gif", encoded(palette, "GIF", save_all=True, append_images=[other.quantize(16)]), palette.convert("RGB")
    )
    put("two views.jpg", encoded(image, "MPO", quality=95, save_all=True, append_images=[other]), error=6)

    # ---- as other programs write them
    if png := installed("png"):  # pypng
        put("rgb16.png", by_pypng(png, upright.astype(np.uint16) * 256 + 77, bitdepth=16))
        put("rgba16.png", by_pypng(png, np.concatenate([upright, alpha], 2).astype(np.uint16) * 257, bitdepth=16, alpha=True),
            blended(upright, alpha), 1)  # fmt: skip
        put("interlaced.png", by_pypng(png, upright, bitdepth=8, interlace=True))
        put("two bits.png", by_pypng(png, alone // 64, bitdepth=2, greyscale=True), alone // 64 * 85)
    if tifffile := installed("tifffile"):
        pages = np.stack([upright, 255 - upright])
        put("pages.tif", by_tifffile(tifffile, pages, photometric="rgb"))
        put("gray16.tif", by_tifffile(tifffile, wide[..., 0], photometric="minisblack", compression="zlib"), alone)
        put("white is zero.tif", by_tifffile(tifffile, 65535 - wide[..., 0], photometric="miniswhite"), alone)
        put("rgb16.tif", by_tifffile(tifffile, upright.astype(np.uint16) * 256 + 77, photometric="rgb", byteorder=">"))
    if features.check("avif"):
        put("turned.avif", encoded(Image.fromarray(np.ascontiguousarray(STORED[6](upright))), "AVIF", quality=95,
            subsampling="4:4:4", exif=orientation(6)), error=4)  # fmt: skip
    if heif := installed("pillow_heif"):
        heif.register_heif_opener()
        turned = Image.fromarray(np.ascontiguousarray(STORED[8](upright)))
        put("phone.heic", encoded(turned, "HEIF", quality=95, chroma=444, exif=orientation(8)), error=4)
    if installed("pillow_jxl"):
        put("long term.jxl", encoded(image, "JXL", lossless=True))

    # ---- links, and what is no picture
    (root / "linked.png").symlink_to(root / "plain.png")
    good[b"linked.png"] = good[b"plain.png"]
    (root / "again").symlink_to(root)
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    (root / "truncated.jpg").write_bytes(encoded(image, "JPEG", quality=95)[:-500])
    (root / "empty.png").write_bytes(b"")
    (root / "page.jpg").write_bytes(b"<html><title>404 not found</title></html>")
    (root / "no width.png").write_bytes(png_head(0, 5))
    (root / "floats.tif").write_bytes(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))
    os.mkfifo(root / "pipe.jpg")
    for name in ("notes.txt", "labels.csv", "shot.cr2", "README", "._plain.png", ".thumbs/plain.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(encoded(image))
    broken = {
        "gone.jpg": "No such file",
        "itself.jpg": "cannot be read",
        "truncated.jpg": "truncated",
        "empty.png": "empty",
        "page.jpg": "not an image",
        "no width.png": "",
        "floats.tif": "floats",
    }
    left_out = {".txt": 1, ".csv": 1, ".cr2": 1, "without an ending": 1, "hidden": 2}
    return Awkward(root, good, broken, left_out | {"special (pipes, sockets, devices)": 1})


def blended(pixels: Pixels, alpha: Pixels) -> NDArray[np.float64]:
    """Colors on white paper."""
    share = alpha / 255
    return np.round(pixels * share + 255 * (1 - share))


def on_white(palette: Image.Image, index: int) -> Pixels:
    """The picture where one of its colors is transparent."""
    shown = np.array(palette.convert("RGB"))
    shown[np.asarray(palette) == index] = 255
    return shown


def orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


def installed(package: str) -> ModuleType | None:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def by_pypng(png: Any, pixels: NDArray[Any], **how: Any) -> bytes:
    height, width = pixels.shape[:2]
    file = io.BytesIO()
    png.Writer(width, height, **({"greyscale": False} | how)).write(file, pixels.reshape(height, -1).tolist())
    return file.getvalue()


def by_tifffile(tifffile: Any, pixels: NDArray[Any], **how: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **how)
    return file.getvalue()


def png_head(width: int, height: int) -> bytes:
    """A PNG of which all is right but that there is nothing to see."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * (height * (1 + 3 * width)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
