"""What a run needs to know of images that are no photos: how their bands are normalized, and which views make sense."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from clove_hub.data.bands import pooled, read_measured
from clove_hub.data.finder import find_images
from clove_hub.views import ViewSpec, for_bands

from .recipe import DataSettings, Recipe

log = logging.getLogger(__name__)


def with_statistics(recipe: Recipe) -> Recipe:
    """The recipe with `data.mean` and `data.std` written out where they were measured, so that a run keeps its own.

    Raises:
        ValueError: they are needed and not known, or were measured on other images.
    """
    data, reading = recipe.data, recipe.data.reading
    if data.mean is not None or reading.of_photos:
        return recipe
    if data.source != "folder":
        raise ValueError(
            f"data.bands={data.bands} of data.source={data.source} needs data.mean and data.std: `clove-hub check DIR --bands "
            f"{data.bands}` measures them on a folder with some of the images"
        )
    folders = [Path(path).expanduser() for path in data.paths]
    found = pooled(
        [read_measured(path, reading, len(find_images(path, suffixes=reading.suffixes).names)) for path in folders]
    )
    return replace(recipe, data=replace(data, mean=found.mean, std=found.std))


def views_of(spec: ViewSpec, data: DataSettings) -> ViewSpec:
    """A method's views of the images that a recipe names; what they leave out is logged."""
    if data.mean is None or data.std is None:
        return spec
    adapted, without = for_bands(spec, data.mean, data.std, data.reading.depth)
    if without:
        log.info(
            "%d bands of %d bits: the views go without %s, which has no meaning there",
            *(data.bands, data.reading.depth, ", ".join(without)),
        )
    return adapted
