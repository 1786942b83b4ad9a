"""Photos and masks from files, and the layouts of folders that the protocols read.

Whatever is wrong with a file is said with its path. Lists of files are complete when they are returned: every file in
them exists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from .result import Data

VOID = 255
"""The index of pixels that have no class and do not count."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_HASHED = 16
T = TypeVar("T")
U = TypeVar("U")


# ---- one file --------------------------------------------------------------------------------------------------------


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


def read_indices(path: Path) -> NDArray[np.uint8]:
    """An image of whole numbers, one for each pixel, whatever they mean.

    Raises:
        ValueError: the file is missing or damaged, or its pixels are colours.
    """
    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.array(image)
    except FileNotFoundError:
        raise ValueError(f"the mask {path} is missing") from None
    except Exception as error:  # as in `read_photo`
        raise ValueError(f"{path} cannot be read as a mask ({type(error).__name__}: {error})") from error
    if mode not in ("L", "P", "1"):
        raise ValueError(f"{path} is an image of mode {mode}; a mask has one 8-bit index for each pixel (mode L or P)")
    return pixels.astype(np.uint8)


def same_size(path: Path, mask: NDArray[np.uint8], photo: Path, size: tuple[int, int]) -> None:
    """Raises ValueError unless the mask has the photo's width and height."""
    height, width = mask.shape
    if (width, height) != size:
        raise ValueError(f"{path} is {width}x{height} pixels, but {photo} is {size[0]}x{size[1]}")


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W), float32."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def batches(items: Sequence[T], size: int) -> list[list[T]]:
    """The items in their order, `size` at a time; the last batch has what is left."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def in_threads(load: Callable[[T], U], batches: Sequence[Sequence[T]]) -> Iterator[list[U]]:
    """Loads each batch in its order, the next one while the last is worked on."""
    with ThreadPoolExecutor(4) as pool:
        coming = [pool.submit(load, item) for item in batches[0]] if batches else []
        for following in [*batches[1:], ()]:
            current, coming = coming, [pool.submit(load, item) for item in following]
            if current:
                yield [future.result() for future in current]


# ---- folders ---------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Labelled:
    """Images with one class each."""

    photos: list[Path]
    labels: list[int]
    classes: list[str]


def class_folders(folder: Path, classes: Sequence[str] | None = None) -> Labelled:
    """Images in a sub-folder for each class.

    Args:
        classes: those that there must be, in their order; all sub-folders by name if not given.

    Raises:
        ValueError: there is no such folder or class, a class is empty, or one is there that `classes` lacks.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is missing: expected DATA/train and DATA/val, each with a sub-folder for each class"
        )
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{folder} has no sub-folders; expected one with images for each class")
    if classes is not None and (odd := sorted(set(found) - set(classes))):
        raise ValueError(f"the class {folder / odd[0]} is not among those of the training images")
    photos: list[Path] = []
    labels: list[int] = []
    classes = found if classes is None else list(classes)
    for label, name in enumerate(classes):
        own = photos_beneath(folder / name)
        photos += own
        labels += [label] * len(own)
    return Labelled(photos, labels, classes)


def lines(path: Path) -> list[str]:
    """The lines of a list of names that are not empty.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"the list {path} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"the list {path} is empty")
    return found


def require(path: Path, what: str) -> Path:
    """The path of a file that must exist."""
    if not path.is_file():
        raise ValueError(f"{what} is missing: {path}")
    return path


def described(root: Path, files: Sequence[Path], samples: int) -> Data:
    """Name and fingerprint of the files used: their names below the root, their sizes, the bytes of sixteen of them."""
    digest = hashlib.sha256(str(len(files)).encode())
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n".encode())
    for index in np.linspace(0, len(files) - 1, min(len(files), _HASHED)).astype(int):
        digest.update(hashlib.sha256(files[index].read_bytes()).digest())
    return Data(root.resolve().name, digest.hexdigest(), samples)
