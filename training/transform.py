"""Views for your own Dataset and DataLoader: `Transform` in the Dataset, `collate` in the DataLoader.

`clove_hub.DeviceViews(transform.view_spec)` turns a batch into the input of a method.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import default_collate, get_worker_info

from clove_hub.backbones import create_backbone
from clove_hub.data.bands import Reading
from clove_hub.global_state import kept_generators
from clove_hub.methods import METHODS
from clove_hub.settings import build
from clove_hub.views import ColorPlan, CropBatch, ViewSpec, allocate, draw, write_sample

from .recipe import method_of, read_sections
from .settings import BackboneSettings


class Transform:
    """Make the random crops of one image.

    The crops are a function of the seed and of the number of images before. In a DataLoader worker, the seed is the
    worker's, which the DataLoader draws for each epoch; no global random state is used.

    Args:
        views: the name or path of a recipe, or a `ViewSpec`, such as a method's `view_spec`.
        seed: of the crops, outside a worker.

    Raises:
        ValueError: there is no such recipe, or its backbone cannot take the views.

    Examples:
        >>> import clove_hub
        >>> transform = clove_hub.Transform("clove_r50_in1k_200ep")
        >>> batch = clove_hub.collate([transform(path) for path in sorted(photos.iterdir())[:2]])
        >>> views = clove_hub.DeviceViews(transform.view_spec)(batch)
        >>> [tuple(group.pixels.shape) for group in views]
        [(2, 2, 3, 224, 224), (6, 2, 3, 96, 96)]
    """

    def __init__(self, views: str | Path | ViewSpec, seed: int = 0) -> None:
        if isinstance(views, ViewSpec):
            self.view_spec = views
        else:
            sections = read_sections(str(views))
            name, settings = method_of(sections)
            backbone = build(BackboneSettings, sections.get("backbone", {}), "backbone")
            with kept_generators():
                method: Any = METHODS[name].build(create_backbone(backbone.model), settings)
            self.view_spec = method.view_spec
        self.seed = seed
        self._drawn = 0

    def __call__(self, image: str | Path | bytes | Image.Image | NDArray[np.unsignedinteger]) -> CropBatch:
        """The crops of an image, a batch of one sample.

        Args:
            image: the path or the bytes of a file, a PIL image of mode RGB, or uint8 (H, W, 3); of a spec with other bands or
                16 bits the path, the bytes, or uint8 or uint16 (H, W, C).

        Raises:
            BrokenImage: the file cannot be decoded.
            ValueError: the image is of another mode, shape or type.
        """
        reading = Reading(self.view_spec.bands, self.view_spec.depth)
        if isinstance(image, str | os.PathLike):
            pixels = reading.decode(Path(image).read_bytes(), str(image))
        elif isinstance(image, bytes):
            pixels = reading.decode(image)
        elif isinstance(image, Image.Image):
            if image.mode != "RGB":
                raise ValueError(
                    f"the image has the mode {image.mode}: give its path or bytes, which are read as in pre-training, or "
                    'image.convert("RGB")'
                )
            pixels = np.asarray(image)
        else:
            pixels = image
        batch = allocate(self.view_spec, 1)
        worker = get_worker_info()
        seed = self.seed if worker is None else worker.seed
        write_sample(batch, 0, pixels, draw(self.view_spec, seed, 0, self._drawn, *pixels.shape[:2]))
        self._drawn += 1
        return batch


def collate(samples: Sequence[Any]) -> Any:
    """Collate the samples of `Transform` into one `CropBatch`: the `collate_fn` of a DataLoader.

    Args:
        samples: outputs of `Transform`, or tuples of one and, for example, a label. Tuples are collated to a tuple;
            torch collates their other entries.

    Examples:
        >>> import clove_hub
        >>> transform = clove_hub.Transform("clove_r50_in1k_200ep")
        >>> crops, labels = clove_hub.collate([(transform(path), 7) for path in sorted(photos.iterdir())[:3]])
        >>> [tuple(group.shape) for group in crops.crops], labels.tolist()
        ([(2, 3, 224, 224, 3), (6, 3, 96, 96, 3)], [7, 7, 7])
    """
    first = samples[0]
    if isinstance(first, tuple):
        return tuple(collate(column) for column in zip(*samples, strict=True))
    if not isinstance(first, CropBatch):
        return default_collate(list(samples))

    def joined(name: str) -> list[torch.Tensor]:
        """One tensor for each group of views, the samples along the second dimension."""
        return [torch.cat(parts, 1) for parts in zip(*(getattr(sample, name) for sample in samples), strict=True)]

    plans = [
        ColorPlan(**{name: np.concatenate([getattr(plan, name) for plan in parts], 1) for name in vars(parts[0])})
        for parts in zip(*(sample.color for sample in samples), strict=True)
    ]
    return CropBatch(joined("crops"), joined("boxes"), joined("flipped"), plans)
