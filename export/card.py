"""The model card: what is known about the weights and nothing else, worded by `model_cards/template.md`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from string import Template
from typing import Any

from clove_hub.zoo.resnets import RESNETS

from .runs import State


@dataclass(frozen=True)
class Paper:
    """What a card cites for a method."""

    method: str
    """As its authors write it."""
    arxiv: str
    bibtex: str


PAPERS = {
    "clove": Paper(
        method="CLoVE",
        arxiv="2310.00527",
        bibtex="""@inproceedings{silva2023self,
  title     = {Self-supervised Learning of Contextualized Local Visual Embeddings},
  author    = {Silva, Thalles and Pedrini, Helio and Ram{\\'i}rez Rivera, Ad{\\'i}n},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision Workshops},
  pages     = {177--186},
  year      = {2023}
}""",
    ),
}

DETECTRON2 = """
Detectron2, as weights and the settings that belong to them:

```bash
clove-hub convert . --to detectron2 --out ../backbone.pth
```
"""


def render_card(
    state: State,
    config: Mapping[str, Any],
    sha256: str,
    size: int,
    parameters: int,
    license: str | None,
) -> str:
    """The card of a bundle, Markdown with its front matter.

    Args:
        config: the bundle's config.json, from which preprocessing is told.
        sha256: of the weights, with their `size` in bytes and number of trainable `parameters`.
        license: of the weights; None if none was chosen yet, which the card then says.
    """
    paper = PAPERS.get(state.method)
    method = paper.method if paper else state.method
    architecture = config["architecture"]
    template = Template(files("clove_hub.model_cards").joinpath("template.md").read_text(encoding="utf-8"))
    return template.substitute(
        architecture=architecture,
        method=state.method,
        method_name=method,
        exported=state.exported,
        license_line=f"license: {license}" if license else "# license: none was chosen yet",
        license=license or "none was chosen yet",
        summary=_summary(state, architecture, method),
        parameters=f"{parameters:,}",
        sha256=sha256,
        size=f"{size:,}",
        preprocessing=_preprocessing(config["pretrained_cfg"]),
        num_features=config["num_features"],
        detectron2=DETECTRON2 if architecture in RESNETS else "",
        training=_training(state),
        citation=f"\n## Citation\n\narXiv:{paper.arxiv}\n\n```bibtex\n{paper.bibtex}\n```" if paper else "",
    )


def _summary(state: State, architecture: str, method: str) -> str:
    stopped = "" if state.finished else " The training had not reached its end when these weights were taken."
    return (
        f"A headless {architecture} that was trained with {method} on {state.data['images']:,} images "
        f"without labels, for dense prediction: detection, segmentation, keypoints.{stopped}"
    )


def _preprocessing(cfg: Mapping[str, Any]) -> str:
    side = cfg["input_size"][-1]
    return _table(
        {
            "colours": "RGB",
            "resize": f"shorter side to {math.floor(side / cfg['crop_pct'])} pixels, {cfg['interpolation']}",
            "crop": f"{side} x {side} pixels, {cfg['crop_mode']}",
            "mean": ", ".join(f"{value:g}" for value in cfg["mean"]),
            "standard deviation": ", ".join(f"{value:g}" for value in cfg["std"]),
        }
    )


def _training(state: State) -> str:
    settings = {
        f"{section}.{key}": value
        for section in ("method", "batch", "optimizer", "schedule")
        for key, value in state.recipe.get(section, {}).items()
    }
    return _table(
        {
            "images": f"{state.data['name']}, {state.data['images']:,} images",
            "fingerprint of the images": f"`{state.data['fingerprint']}`",
            "images seen": f"{state.images_seen:,}",
            "optimiser steps": f"{state.step:,} of {state.steps_total:,}",
            "hardware": state.hardware,
            "software": ", ".join(f"{name} {version}" for name, version in state.versions.items()),
        }
        | {f"`{name}`": f"`{value}`" for name, value in settings.items()}
    )


def _table(rows: Mapping[str, Any]) -> str:
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return "\n".join(("| | |", "|---|---|", *lines))
