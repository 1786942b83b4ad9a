"""A folder that timm loads: our bundle with its checksums, or one written by timm's `save_for_hf`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from clove_hub.documents import read_object
from clove_hub.runs import sha256
from clove_hub.zoo.checks import differences, printable, require_names_and_shapes
from clove_hub.zoo.tensors import read_tensors

from .architectures import Architecture, architecture, checked_model_args, require_architecture
from .weights import Weights, read_preprocessing

CONFIG, PROVENANCE = "config.json", "clove_hub.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names that timm gives to a file of weights; the first one that is there is taken."""


def read_bundle(folder: Path, name: str, what: str) -> Weights:
    """Read the backbone of a folder, after verifying its checksums if it has any.

    Args:
        name: as in `Weights`.
        what: as in `Weights`.

    Raises:
        ValueError: a file is missing, is not what was exported or not what timm writes, or a tensor has no place.
    """
    config = read_config(folder / CONFIG, what)
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{what} has a {CONFIG} and no {' or '.join(WEIGHTS)}: nothing to load")
    provenance = require_sums(folder, (CONFIG, file.name), what)
    where = f"the {CONFIG} of {what}"
    cfg = pretrained_cfg(config, where)
    require_architecture(config["architecture"].partition(".")[0], f"{where}: architecture=")
    model_args = checked_model_args(config.get("model_args"), config["architecture"], where)
    known = architecture(config["architecture"], model_args, where)
    if size := model_args.get("img_size"):  # as timm does, a model built for another size gets images of that size
        cfg = {
            **cfg,
            "input_size": [model_args.get("in_chans", 3), *(size if isinstance(size, list) else (size, size))],
        }
    origin = provenance.get("origin", {})
    preprocessing = read_preprocessing(cfg, where, bands=model_args.get("in_chans", 3), recipe=origin.get("recipe"))
    tensors, _ = read_tensors(file)
    own, heads = without_classifier(known, tensors)
    notes = left_out("classifier", heads)
    stored, needed = sum(t.numel() for t in tensors.values()), sum(map(math.prod, known.shapes.values()))
    if differences(own, known.shapes) and not provenance and needed <= 2 * stored:
        # Files of some models have their first authors' names, which timm turns into its own. Errors are reported below,
        # also for tensors that timm would ignore. A model that is far larger than the file is not built for it.
        with suppress(Exception), torch.random.fork_rng(devices=[]):
            renamed: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
            renamed.reset_classifier(0)
            if not differences(renamed.state_dict(), known.shapes):
                own, notes = renamed.state_dict(), (*notes, "timm renamed the tensors of the file.")
    require_names_and_shapes(own, known.shapes, f"{what} ({known.name})")
    license, model = cfg.get("license"), provenance.get("model")
    return Weights(
        name=name,
        what=what,
        kind="bundle",
        architecture=known.name,
        tensors=own,
        preprocessing=preprocessing,
        model_args=model_args,
        origin=origin,
        notes=notes,
        license=license if isinstance(license, str) else None,
        model=model if isinstance(model, str) else None,
    )


def pretrained_cfg(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What a config.json says of images: its `pretrained_cfg`, or itself as timm once wrote it.

    Raises:
        ValueError: it is no object.
    """
    cfg = config.get("pretrained_cfg", config)
    if not isinstance(cfg, Mapping):
        raise ValueError(
            f"{where} has pretrained_cfg {cfg!r:.80}, expected keys and values: correct it, or export or download again"
        )
    return cfg


def read_config(path: Path, what: str) -> dict[str, Any]:
    """What `config.json` says; `architecture` is a name.

    Raises:
        ValueError: it cannot be read, or is not one of timm.
    """
    config: dict[str, Any] = {}
    try:
        config = read_object(path)
        found = config.get("architecture")
        problem = f"its architecture is {found!r:.80}" if "architecture" in config else "it has no architecture"
    except ValueError as error:
        found, problem = None, str(error)
    if found is None and is_of_finetuned(config):
        base = config["pretrained"].get("source") if isinstance(config.get("pretrained"), dict) else None
        raise ValueError(
            f"{what} is a fine-tuned model, whose backbone was changed for its task: `clove-hub predict` uses it. Where a "
            f"backbone is asked for, give what it started from{f' ({base!s:.200})' if base else ''}"
        )
    if not isinstance(found, str):
        raise ValueError(
            f"{what}: its {CONFIG} is not one that timm writes or reads ({problem}). Expected the name of a model of timm as "
            "`architecture`: export, save or download it again"
        )
    return config


def is_of_finetuned(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a fine-tuned model, and not timm's."""
    return {"task", "categories"} <= config.keys()


PROVENANCE_KEYS: Mapping[str, tuple[type, ...]] = {
    "sha256": (dict,),
    "origin": (dict,),
    "results": (list,),
    "method": (str,),
    "exported": (str,),
    "backbone": (str,),
    "model": (str, type(None)),
}
"""What clove_hub.json has, and of which type."""


def require_sums(folder: Path, names: Sequence[str], what: str) -> dict[str, Any]:
    """Verify files of a bundle against the checksums in its clove_hub.json; return its content, empty if there is none.

    Raises:
        ValueError: it cannot be read, does not have the sum of a file, or a file is missing or has another.
    """
    path = folder / PROVENANCE
    if not path.exists():
        return {}
    again = "export, adopt or download it again"
    try:
        provenance = read_object(path)
    except ValueError as error:
        raise ValueError(f"{what}: its {PROVENANCE} is not what was exported ({error}): {again}") from error
    for key, kinds in PROVENANCE_KEYS.items():
        if not isinstance(provenance.get(key), kinds):
            found = f"has {key} {provenance[key]!r:.80}" if key in provenance else f"lacks {key}"
            raise ValueError(f"{what}: its {PROVENANCE} {found}, which is not what was exported: {again}")
    sums = provenance["sha256"]
    for name in names:
        if name not in sums:
            raise ValueError(
                f"{what}: {printable(name)} is not what was exported: {PROVENANCE} has no checksum of it: {again}"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{what}: {printable(name)} is missing, of which {PROVENANCE} has a checksum: {again}")
        if sha256(folder / name) != sums[name]:
            raise ValueError(
                f"{what}: {printable(name)} is not what was exported: its sha256 is not the one in {PROVENANCE}. "
                "Export, adopt or download it again"
            )
    return provenance


def without_classifier(known: Architecture, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without those of the classifier, and the names of these."""
    heads = known.classifier_names(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in heads}, heads


def left_out(kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """A sentence about what was not taken, if there was anything."""
    return (f"The {kind} was left out ({', '.join(map(printable, sorted(names)[:6]))}).",) if names else ()
