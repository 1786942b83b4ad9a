"""A file with weights: a checkpoint that a paper's authors released, or the state dict of one network."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from torch import Tensor

from clove_hub.zoo.released import Released, recognize
from clove_hub.zoo.resnets import not_a_resnet
from clove_hub.zoo.tensors import differences, printable, read_tensors, require_names_and_shapes

from .architectures import LOOKALIKES, architecture, checked_model_args
from .bundle import CONFIG, WEIGHTS, read_bundle, read_config, without_classifier
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
        return read_bundle(path.parent, name, f"{path}")
    tensors, rest = read_tensors(path)
    return identify(path, name, tensors, rest)


@dataclass(frozen=True)
class Statement:
    """What a file, or the config.json beside it, says of its network."""

    architecture: str
    where: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None


def identify(path: Path, name: str, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Weights:
    """The backbone among the tensors of a file.

    Args:
        rest: what else the file says.

    Raises:
        ValueError: as `read_file`.
    """
    what, said = str(path), statement(path, rest)
    bare = _bare(tensors)
    if said is not None:
        known = architecture(said.architecture, said.model_args)
        own, notes = without_classifier(known, bare)
        if 2 * sum(tuple(own[key].shape) == shape for key, shape in known.shapes.items() if key in own) > len(
            known.shapes
        ):
            require_names_and_shapes(own, known.shapes, f"{what} ({known.name}, as {said.where} says)")
            origin = _origin(f"a {known.name}", "timm", known.classifier_names(bare))
            return _weights(name, what, said.architecture, own, said, notes, origin, rest)
    released = recognize(bare, what)
    if released is None:
        if said is not None:
            raise ValueError(
                f"{what} holds no {said.architecture}, which {said.where} says it is: {'; '.join(differences(own, known.shapes))}"
            )
        error = not_a_resnet(bare, what)
        raise ValueError(
            f"{error}. Of another network of timm it is read with its name in a {CONFIG} beside it, as in "
            '{"architecture": "convnext_tiny"}'
        )
    fits = (released.architecture, *LOOKALIKES.get(released.architecture, ()))
    if said is not None and said.architecture not in fits:
        raise ValueError(
            f"{what} holds a {released.architecture}, and {said.where} says that it is a {said.architecture}"
        )
    return _recognized(path, name, released, said, rest)


def _recognized(path: Path, name: str, released: Released, said: Statement | None, rest: Mapping[str, Any]) -> Weights:
    backbone, found = released.backbone(released.exported), said.architecture if said else released.architecture
    alone = released.exported == "backbone"
    title = released.title if alone else f"a {released.title} checkpoint"
    origin = _origin(title, released.format, released.heads, released.encoders, released.exported)
    if not alone:
        return Weights(
            name,
            f"the {released.exported} of {path}, a released {released.title} checkpoint",
            "released",
            found,
            backbone,
            origin=origin,
        )
    notes: tuple[str, ...] = ()
    if released.heads:
        kind = "classifier" if all(head.startswith("fc.") for head in released.heads) else "head"
        notes = (f"The {kind} was left out ({', '.join(map(printable, sorted(released.heads)[:6]))}).",)
    others = LOOKALIKES.get(found, ()) if said is None and released.format in WRITTEN_BY_ANY_CODE else ()
    if others:
        notes += (
            f"The file does not say its architecture; its names and shapes are those of {found}, which is taken, and of "
            f"{' and '.join(others)}: if it is one of these, write "
            f'{{"architecture": "{others[0]}"}} into a {CONFIG} beside it.',
        )
    return _weights(name, str(path), found, backbone, said, notes, origin, rest)


def _origin(
    title: str, format: str, heads: Iterable[str], encoders: Iterable[str] = ("backbone",), exported: str = "backbone"
) -> dict[str, Any]:
    return {"title": title, "format": format, "encoders": list(encoders), "exported": exported, "heads": list(heads)}


def _weights(
    name: str,
    what: str,
    found: str,
    tensors: dict[str, Tensor],
    said: Statement | None,
    notes: tuple[str, ...],
    origin: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> Weights:
    if said is None or said.preprocessing is None:
        notes += (UNKNOWN_IMAGES,)
    if averaged := [key for key in ("state_dict_ema", "model_ema") if key in rest]:
        notes += (f"The file also holds averaged weights ({averaged[0]}), which were not taken.",)
    return Weights(
        name,
        what,
        "file",
        found,
        tensors,
        (said.preprocessing if said else None) or Preprocessing(),
        said.model_args if said else {},
        origin,
        notes,
    )


def statement(path: Path, rest: Mapping[str, Any]) -> Statement | None:
    """What the file says of its network, or else the config.json beside it; None if neither names one of timm.

    Raises:
        ValueError: it says something else in a form that timm does not write.
    """
    options = next((_options(rest[key]) for key in ("args", "opt", "config") if _options(rest.get(key))), {})
    for key, value, where in (
        ("arch", rest.get("arch"), "`arch`"),
        ("architecture", rest.get("architecture"), "`architecture`"),
        ("model", options.get("model"), "`model` among its options"),
        ("arch", options.get("arch"), "`arch` among its options"),
    ):
        found = value.partition(".")[0] if isinstance(value, str) else ""
        if timm.is_model(found):
            by_timm = key != "architecture" and options.get("model") == value and {"mean", "crop_pct"} <= options.keys()
            if not by_timm:
                return Statement(found, f"its {where}")
            said = f"the {where} of {path}"
            return Statement(
                found,
                f"its {where}",
                checked_model_args(options.get("model_kwargs"), found, said),
                _of_timms_training(found, options, said),
            )
    beside = path.parent / CONFIG
    if not beside.is_file():
        return None
    try:
        config = read_config(beside, str(path.parent))
    except ValueError:  # of something else
        return None
    cfg = config.get("pretrained_cfg")
    where = f"the {CONFIG} beside {path}"
    return Statement(
        config["architecture"].partition(".")[0],
        f"the {CONFIG} beside it",
        checked_model_args(config.get("model_args"), config["architecture"], where),
        read_preprocessing(cfg, where) if isinstance(cfg, Mapping) and cfg.get("mean") else None,
    )


def _of_timms_training(found: str, options: Mapping[str, Any], where: str) -> Preprocessing:
    """How timm's train.py prepares images with these options."""
    cfg: Any = timm.models.get_pretrained_cfg(found)
    try:
        resolved = resolve_data_config(dict(options), cfg.to_dict() if cfg else {})  # type: ignore[no-untyped-call]
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has other options than timm's training has ({error!s:.100})") from error
    return read_preprocessing(resolved, where)


def _options(value: object) -> dict[str, Any]:
    """The options of a training, which checkpoints keep in a Namespace or a dict."""
    if isinstance(value, argparse.Namespace):
        return dict(vars(value))
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _bare(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names without what distributed training and torch.compile put in front of every one."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors
