"""Images on their way to the backbone: normalized, in batches, loaded by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


def normalized(image: Image.Image | NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> Tensor:
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
