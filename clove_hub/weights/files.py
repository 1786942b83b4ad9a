"""A file with weights: a checkpoint that a paper's authors released, or the state dict of one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg

from clove_hub.documents import read_object
from clove_hub.zoo.checks import differences, require_names_and_shapes
from clove_hub.zoo.facts import options
from clove_hub.zoo.released import plain_names, recognize
from clove_hub.zoo.resnets import in_place, not_a_resnet
from clove_hub.zoo.tensors import Contents, read_contents

from .architectures import LOOKALIKES, architecture, checked_model_args, require_architecture
from .bundle import CONFIG, WEIGHTS, left_out, pretrained_cfg, read_bundle, without_classifier
from .weights import Preprocessing, Weights, read_preprocessing

UNKNOWN_IMAGES = "The file does not say how images were normalized; ImageNet's mean and std are taken."
WRITTEN_BY_ANY_CODE = ("resnet", "backbone")
"""Formats of one network without anything of its training around it: they could be of any code."""


def read_file(path: Path, name: str) -> Weights:
    """Reads the backbone of a file.

    Raises:
        ValueError: it cannot be read without running code, it says one architecture and holds another, it is no network
            known here, or a tensor is missing, unexpected or mis-shaped.
    """
    if path.name in WEIGHTS and (path.parent / CONFIG).is_file():  # with the sums of the bundle, if it is one
        return read_bundle(path.parent, name, str(path))
    return identify(path, name, read_contents(path))


@dataclass(frozen=True)
class Statement:
    """The architecture that a file, or the config.json beside it, records."""

    architecture: str
    where: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None


def identify(path: Path, name: str, contents: Contents) -> Weights:
    """The backbone in what a file holds.

    Raises:
        ValueError: as `read_file`.
    """
    tensors, rest, chosen = contents
    what, said, bare = str(path), statement(path, rest), plain_names(tensors)
    known = architecture(said.architecture, said.model_args, what) if said else None
    if len(bare) > len(tensors):
        chosen += (
            f"The file has no num_batches_tracked, as before torch 0.4.1; {len(bare) - len(tensors)} are set to 0.",
        )
    own, heads = without_classifier(known, bare) if known else ({}, [])
    if said and known and 2 * in_place(own, known.shapes) > len(known.shapes):
        require_names_and_shapes(own, known.shapes, f"{what} ({known.name}, as {said.where} says)")
        found, notes = known.name, left_out("classifier", heads)
        origin = {
            "title": f"a {found}",
            "format": "timm",
            "encoders": ["backbone"],
            "exported": "backbone",
            "heads": heads,
        }
    else:
        released = recognize(bare, what)
        if released is None and said and known:
            raise ValueError(
                f"{what} is not a {said.architecture}, as {said.where} says: "
                f"{'; '.join(differences(own, known.shapes))}"
            )
        if released is None:
            raise ValueError(
                f"{not_a_resnet(tensors, what)}. For another architecture of timm, write its name into a {CONFIG} beside the "
                'file, as in {"architecture": "convnext_tiny"}'
            )
        fits = (released.architecture, *LOOKALIKES.get(released.architecture, ()))
        found = said.architecture if said else released.architecture
        if said and found not in fits:
            raise ValueError(f"{what} is a {fits[0]}, but {said.where} says {found}")
        own, alone = released.backbone(released.exported), released.exported == "backbone"
        origin = {
            "title": released.title if alone else f"a {released.title} checkpoint",
            "format": released.format,
            "encoders": list(released.encoders),
            "exported": released.exported,
            "heads": list(released.heads),
        }
        if not alone:
            what = f"the {released.exported} of {path}, a released {released.title} checkpoint"
            return Weights(name, what, "released", found, own, origin=origin, notes=chosen)
        kind = "classifier" if all(head.startswith("fc.") for head in released.heads) else "head"
        notes = left_out(kind, released.heads)
        if not said and fits[1:] and released.format in WRITTEN_BY_ANY_CODE:
            notes += (
                f"The file does not say its architecture; its names and shapes fit {found}, which is assumed, and "
                f"{' and '.join(fits[1:])}: if it is one of these, write "
                f'{{"architecture": "{fits[1]}"}} into a {CONFIG} beside it.',
            )
    preprocessing = said.preprocessing if said else None
    if preprocessing is None:
        notes += (UNKNOWN_IMAGES,)
    model_args = said.model_args if said else {}
    return Weights(name, what, "file", found, own, preprocessing or Preprocessing(), model_args, origin, notes + chosen)


def statement(path: Path, rest: Mapping[str, Any]) -> Statement | None:
    """What the file says of its network, or else the config.json beside it; None if neither names one of timm.

    Raises:
        ValueError: it says something else in a form that timm does not write.
    """
    told = options(rest)
    for value, where in (
        (rest.get("arch"), "`arch`"),
        (rest.get("architecture"), "`architecture`"),
        (told.get("model"), "`model` among its options"),
        (told.get("arch"), "`arch` among its options"),
    ):
        found = value.partition(".")[0] if isinstance(value, str) else ""
        if not timm.is_model(found):
            continue
        if where == "`architecture`" or told.get("model") != value or not {"mean", "crop_pct"} <= told.keys():
            return Statement(found, f"its {where}")
        said = f"{path}, by its {where},"  # by timm's train.py
        model_args, own = checked_model_args(told.get("model_kwargs"), found, said), get_pretrained_cfg(found)
        try:
            images = resolve_data_config(told, own.to_dict() if own else {})  # type: ignore[no-untyped-call]
        except (AssertionError, TypeError, ValueError) as error:
            found = ", ".join(f"{key} {told.get(key)!r:.60}" for key in ("mean", "std", "img_size", "input_size"))
            raise ValueError(
                f"{said} has options that timm's training cannot have ({found}): {error!s:.100}"
            ) from error
        return Statement(
            found, f"its {where}", model_args, read_preprocessing(images, said, bands=model_args.get("in_chans", 3))
        )
    beside = path.parent / CONFIG
    if not beside.is_file():
        return None
    where = f"the {CONFIG} beside {path}"
    try:
        config = read_object(beside)
    except ValueError as error:
        raise ValueError(
            f"{where}, which may say what the file holds, cannot be read: correct it or move it away ({error})"
        ) from error
    if "architecture" not in config:  # of something else
        return None
    if not isinstance(config["architecture"], str):
        raise ValueError(
            f"{where} has architecture {config['architecture']!r:.80}, expected the name of a model of timm: correct it or "
            "move it away"
        )
    name, cfg = config["architecture"].partition(".")[0], pretrained_cfg(config, where)
    require_architecture(name, f"{where}: architecture=")
    model_args = checked_model_args(config.get("model_args"), name, where)
    bands = model_args.get("in_chans", 3)
    return Statement(
        name,
        f"the {CONFIG} beside it",
        model_args,
        read_preprocessing(cfg, where, bands=bands)
        if any(cfg.get(key) is not None for key in ("mean", "std"))
        else None,
    )
