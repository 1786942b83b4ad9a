"""A folder that timm loads: our bundle with its sums, or what timm's own `save_for_hf` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from clove_hub.runs import sha256
from clove_hub.zoo.tensors import differences, printable, read_tensors, require_names_and_shapes

from .architectures import Architecture, architecture, checked_model_args
from .weights import Weights, read_preprocessing

CONFIG, PROVENANCE = "config.json", "clove_hub.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names that timm gives to a file of weights; the first one that is there is taken."""


def read_bundle(folder: Path, name: str, what: str) -> Weights:
    """Reads the backbone of a folder, after its sums have been checked if it has any.

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
    cfg = config.get("pretrained_cfg", config)
    where = f"the {CONFIG} of {what}"
    if not isinstance(cfg, Mapping):
        raise ValueError(f"{where} has pretrained_cfg {cfg!r:.80}, expected keys and values")
    model_args = checked_model_args(config.get("model_args"), config["architecture"], where)
    known = architecture(config["architecture"], model_args)
    if size := model_args.get("img_size"):  # as timm does, a model built for another size gets images of that size
        cfg = {**cfg, "input_size": [3, size, size] if isinstance(size, int) else [3, *size]}
    preprocessing = read_preprocessing(cfg, where)
    tensors, _ = read_tensors(file)
    own, heads = without_classifier(known, tensors)
    notes = left_out("classifier", heads)
    if differences(own, known.shapes) and not provenance:
        # Files of some models have their first authors' names, which timm turns into its own. The message about whatever
        # is wrong is the one below; timm accepts tensors without a place, which are an error here.
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
        origin=provenance.get("origin", {}),
        notes=notes,
        license=license if isinstance(license, str) else None,
        model=model if isinstance(model, str) else None,
    )


def read_config(path: Path, what: str) -> dict[str, Any]:
    """What `config.json` says; `architecture` is a name.

    Raises:
        ValueError: it cannot be read, or is not one of timm.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = "no object" if not isinstance(config, dict) else "no architecture"
    except (OSError, ValueError, RecursionError) as error:
        config, found = None, f"{type(error).__name__}: {error!s:.100}"
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{what}: its {CONFIG} is not one that timm writes or reads ({found})")
    return config


def require_sums(folder: Path, names: Sequence[str], what: str) -> dict[str, Any]:
    """Holds files of a bundle to the sums in its clove_hub.json, and returns what that says; empty if there is none.

    Raises:
        ValueError: it cannot be read, does not have the sum of a file, or a file is missing or has another.
    """
    path = folder / PROVENANCE
    if not path.exists():
        return {}
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
        sums = dict(provenance["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{what}: its {PROVENANCE} was changed after the export ({error!r:.100}): export again"
        ) from error
    for name in names:
        if name not in sums:
            raise ValueError(f"{what}: {printable(name)} is not what was exported: {PROVENANCE} has no sum of it")
        if not (folder / name).is_file():
            raise ValueError(f"{what}: {printable(name)} is missing, which {PROVENANCE} has a sum of")
        if sha256(folder / name) != sums[name]:
            raise ValueError(
                f"{what}: {printable(name)} is not what was exported: its sha256 is not the one in {PROVENANCE}. "
                "Export, adopt or download it again"
            )
    return dict(provenance)


def without_classifier(known: Architecture, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without those of the classifier, and the names of these."""
    heads = known.classifier_names(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in heads}, heads


def left_out(kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """A sentence about what was not taken, if there was anything."""
    return (f"The {kind} was left out ({', '.join(map(printable, sorted(names)[:6]))}).",) if names else ()
