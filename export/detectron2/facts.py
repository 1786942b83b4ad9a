"""The metadata of a trained seed: a config that Detectron2's own tools open, and clove-hub's facts beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clove_hub.evaluation.result import write_text
from clove_hub.weights import Weights

from .tasks import EXTRA_NORM_HEAD

FACTS = "clove_hub.json"
CONFIG = "config.yaml"
FINAL = "model_final.pth"
"""Detectron2's file name of the weights after the last iteration."""
WITH_HEADS = f"python -m {__package__}"
"""Runs a Detectron2 tool with clove-hub's head registered."""


def write_facts(folder: Path, task: str, backbone: Weights, fraction: float, notes: Sequence[str]) -> None:
    """Write the facts that Detectron2's config has no keys for.

    Args:
        folder: the seed's folder.
        fraction: fraction of the training images that was used.
        notes: deviations from the protocol.
    """
    facts = {
        "task": task,
        "architecture": backbone.architecture,
        "backbone": backbone.what,
        "backbone_fingerprint": backbone.fingerprint,
        **backbone.preprocessing.normalization,
        "fraction": fraction,
        "notes": list(notes),
    }
    write_text(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def write_plain(cfg: Any) -> None:
    """Rewrite the seed's config with the path of the trained weights, for opening in Detectron2, not for training."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, FINAL).resolve())
    write_text(Path(cfg.OUTPUT_DIR, CONFIG), cfg.dump())


def how_to_open(folder: Path, head: str, densepose: bool) -> str:
    """The command that shows the predictions of a trained seed.

    Args:
        head: the config's MODEL.ROI_HEADS.NAME.
    """
    config = folder / CONFIG
    if densepose:
        return f"python apply_net.py show {config} {folder / FINAL} IMAGE bbox,dp_segm  (in projects/DensePose)"
    tool = f"demo/demo.py --config-file {config} --input IMAGE --output FOLDER"
    if head != EXTRA_NORM_HEAD:
        return f"python {tool}"
    return f"{WITH_HEADS} {tool}  (in Python: import {__package__}.heads before the model is built)"
