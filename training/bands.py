"""Images other than photos: the first layer for their bands, and their normalization."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from timm.models import adapt_input_conv

from clove_hub.data.bands import pooled, read_measured
from clove_hub.data.finder import find_images
from clove_hub.weights import Preprocessing, Weights
from clove_hub.weights.architectures import architecture
from clove_hub.weights.weights import LEAST_STD

from .settings import BackboneSettings, DataSettings


def backbone_for(backbone: BackboneSettings, bands: int) -> BackboneSettings:
    """The backbone with a first layer for images of these bands.

    Raises:
        ValueError: it is to have one for others.
    """
    said = backbone.args.get("in_chans", bands)
    if said != bands:
        raise ValueError(
            f"backbone.args has in_chans={said}, but data.bands={bands}: leave in_chans out, or set data.bands={said}"
        )
    return backbone if bands == 3 else replace(backbone, args={**backbone.args, "in_chans": bands})


def normalization(data: DataSettings, images: Preprocessing, begun: Preprocessing | None) -> Preprocessing:
    """The normalization of a new run: that of its recipe or starting weights, else of photos or as measured.

    Args:
        images: of photos.
        begun: of the weights.

    Raises:
        ValueError: it is not known, or was measured on other images.
    """
    reading = data.reading
    images = replace(images, depth=reading.depth)
    if data.mean is not None and data.std is not None:
        return replace(images, mean=data.mean, std=data.std)
    if begun is not None and len(begun.mean) == data.bands:
        return replace(images, mean=begun.mean, std=begun.std)
    if reading.of_photos:
        return images
    if data.source != "folder":
        raise ValueError(
            f"data.bands={data.bands} of data.source={data.source} needs data.mean and data.std: `clove-hub check DIR --bands "
            f"{data.bands}` measures them on a folder with some of the images"
        )
    folders = [Path(path).expanduser() for path in data.paths]
    counts = [len(find_images(folder, suffixes=reading.suffixes).names) for folder in folders]
    found = pooled([read_measured(*one) for one in zip(folders, [reading] * len(folders), counts, strict=True)])
    if min(found.std) < LEAST_STD:
        raise ValueError(
            f"band {found.std.index(min(found.std)) + 1} of {data.bands} is constant in {', '.join(data.paths)}: leave it out of "
            "the files, or give data.mean and data.std"
        )
    return replace(images, mean=found.mean, std=found.std)


def with_bands(weights: Weights, bands: int) -> Weights:
    """Weights for three bands with the first layer adapted to others as in timm.

    One band gets the sum over the three; more get them in turn, scaled so that the sum over all bands stays.

    Raises:
        ValueError: they are for others than three, or timm does not know the first layer.
    """
    before = weights.model_args.get("in_chans", 3)
    first = architecture(weights.architecture, weights.model_args, weights.what).cfg.get("first_conv")
    names = [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first or ())]
    if before != 3 or not names or not all(name in weights.tensors for name in names):
        why = f"is for {before} bands" if before != 3 else "has a first layer that timm does not define"
        raise ValueError(
            f"{weights.what} {why}, but data.bands={bands}: only weights for three bands can be adapted to others"
        )
    adapted = {name: adapt_input_conv(bands, weights.tensors[name]) for name in names}
    return replace(
        weights,
        tensors={**weights.tensors, **adapted},
        model_args={**weights.model_args, "in_chans": bands},
        notes=(
            *weights.notes,
            f"Its first layer ({', '.join(names)}) was adapted from 3 bands to {bands} as timm does.",
        ),
    )
