"""A fine-tuned model as a folder: in a run of fine-tuning, exported by `export`, or on the Hub.

model.safetensors   the whole network: backbone, pyramid, heads
config.json         task, backbone, network, images, classes, and the sum of the weights
README.md           the model card, once exported
clove_hub.json      figures, where the backbone comes from, and the sums of the other files, once exported
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clove_hub.data.coco import Category
from clove_hub.documents import read_object
from clove_hub.runs import sha256
from clove_hub.settings import build
from clove_hub.zoo.checks import require_finite
from clove_hub.zoo.tensors import file_kind, read_tensors

from .architectures import checked_model_args, require_architecture
from .bundle import CONFIG, PROVENANCE, WEIGHTS, is_of_finetuned, require_sums
from .hub import HUB, fetch
from .weights import Preprocessing, Weights, read_preprocessing

FORMAT = 1
MODEL = "the folder of a fine-tuning run, of an exported model, or hf-hub:organization/name[@revision]"
"""The accepted sources of a fine-tuned model, for messages and help."""
KEYS = ("task", "backbone", "preprocessing", "settings", "categories", "pretrained", "sha256")
"""Keys of config.json, beside `format` and `library_name`."""


@dataclass(frozen=True)
class FineTuned:
    """A stored fine-tuned model, with verified checksums and finite values."""

    name: str
    """The given source."""
    what: str
    """For messages: `the fine-tuned model runs/photos`."""
    folder: Path
    task: str
    """`detection`, `instances`, `keypoints` or `segmentation`."""
    architecture: str
    """The backbone's name in timm."""
    model_args: Mapping[str, Any]
    preprocessing: Preprocessing
    settings: Mapping[str, Any]
    """Settings of the fine-tuning: `preset`, and the sections `network` and `images`."""
    categories: tuple[Category, ...]
    """Its classes, in the order of its outputs; for segmentation numbered from 0."""
    pretrained: Mapping[str, Any]
    """Facts about the initial weights of the backbone."""
    sha256: str
    """sha256 of the weights' file."""
    tensors: Mapping[str, Tensor]


def make_config(
    task: str,
    source: Weights,
    settings: Mapping[str, Any],
    categories: Sequence[Category],
    pretrained: Mapping[str, Any],
    weights: Path,
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        source: the backbone that training started from.
        settings: as in `FineTuned`.
        pretrained: as in `FineTuned`.
        weights: the complete file of weights.
    """
    return {
        "format": FORMAT,
        "library_name": "clove-hub",
        "task": task,
        "backbone": {"architecture": source.architecture, "model_args": dict(source.model_args)},
        "preprocessing": {"mean": list(source.preprocessing.mean), "std": list(source.preprocessing.std)},
        "settings": dict(settings),
        "categories": [dataclasses.asdict(category) for category in categories],
        "pretrained": dict(pretrained),
        "sha256": sha256(weights),
    }


def is_finetuned(folder: Path) -> bool:
    """Whether its config.json is that of a fine-tuned model; a bundle's is timm's."""
    try:
        return is_of_finetuned(read_object(folder / CONFIG))
    except ValueError:
        return False


def find_finetuned(source: str | Path) -> Path | None:
    """The folder of a fine-tuned model, without its weights if on the Hub; None if the source is something else.

    Raises:
        ValueError: the repository cannot be reached.
    """
    name = str(source)
    folder = fetch(name, CONFIG) if name.startswith(HUB) else Path(name.removeprefix("local-dir:")).expanduser()
    return folder if is_finetuned(folder) else None


def read_finetuned(source: str | Path) -> FineTuned:
    """Read a fine-tuned model; nothing in it is executed.

    Raises:
        ValueError: it is not one, a checksum does not match, its config is invalid, or its weights have a non-finite
            value.
    """
    name = str(source)
    if name.startswith(HUB):
        folder = fetch(name, CONFIG, PROVENANCE, WEIGHTS[0])
    else:
        folder = Path(name.removeprefix("local-dir:")).expanduser()
        _require_folder(folder, name)
    what = f"the fine-tuned model {name}"
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{name} holds no fine-tuned model: it has no {CONFIG}, which a fine-tuning writes at its end. Expected {MODEL}"
        )
    if not is_finetuned(folder):
        raise ValueError(
            f"{name} holds no fine-tuned model: its {CONFIG} names no task and no classes, as for a backbone. To fine-tune a "
            f"backbone: `clove-hub downstream torchvision TASK --backbone {shlex.quote(name)} --data FOLDER`"
        )
    require_sums(folder, (CONFIG, WEIGHTS[0]), what)
    found = _read_config(folder, name, what)
    file = folder / WEIGHTS[0]
    if not file.is_file():
        raise ValueError(f"{what}: {WEIGHTS[0]} is missing: export, download or fine-tune it again")
    if sha256(file) != found.sha256:
        raise ValueError(
            f"{what}: {WEIGHTS[0]} is not what was trained: its sha256 is not the one in {CONFIG}. Export, download or "
            "fine-tune it again"
        )
    if file_kind(file) != "safetensors":
        raise ValueError(f"{what}: {WEIGHTS[0]} is not a safetensors file, the only kind that is read")
    tensors, _ = read_tensors(file)
    require_finite(tensors, what)
    return dataclasses.replace(found, tensors=tensors)


def _require_folder(folder: Path, name: str) -> None:
    if folder.is_dir():
        return
    found = "is a file" if folder.exists() else "does not exist"
    raise ValueError(f"{name!r:.300} is not a fine-tuned model: it {found}. Expected {MODEL}")


def _read_config(folder: Path, name: str, what: str) -> FineTuned:
    """The content of config.json, without the tensors."""
    config, where = read_object(folder / CONFIG), f"the {CONFIG} of {what}"
    if config.get("format") != FORMAT:
        raise ValueError(
            f"{where} has format {config.get('format')!r:.40}, expected {FORMAT}: use the version of clove-hub that wrote it"
        )
    kinds: dict[str, type] = {"task": str, "categories": list, "sha256": str}
    for key in KEYS:
        if not isinstance(config.get(key), kinds.get(key, dict)):
            raise ValueError(
                f"{where} has {key} {config.get(key)!r:.80}, which is not what was written: export it again"
            )
    backbone, rows = config["backbone"], config["categories"]
    architecture = backbone.get("architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"{where} has the backbone {backbone!r:.80}, expected the name of a model of timm")
    require_architecture(architecture, f"{where}: architecture=")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where} has the categories {rows!r:.80}, expected a list with an id and a name each")
    try:
        categories = tuple(build(Category, row, f"categories[{number}]") for number, row in enumerate(rows))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if len({category.id for category in categories}) < len(categories):
        raise ValueError(f"{where} has two categories with one id")
    return FineTuned(
        name=name,
        what=what,
        folder=folder,
        task=config["task"],
        architecture=architecture,
        model_args=checked_model_args(backbone.get("model_args"), architecture, where),
        preprocessing=read_preprocessing(config["preprocessing"], where),
        settings=config["settings"],
        categories=categories,
        pretrained=config["pretrained"],
        sha256=config["sha256"],
        tensors={},
    )
