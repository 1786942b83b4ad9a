"""The whole config of a task: the zoo's file, the protocol's changes, the backbone's needs, the user's changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clove_hub.weights import Weights

from ..convert import detectron2_settings
from .checks import Expected, require_right_setup
from .scaling import BATCH, ITERATIONS, RATE, said, scaled
from .tasks import Task


@dataclass(frozen=True)
class Resolved:
    """A config that is right for its backbone."""

    cfg: Any
    """Detectron2's CfgNode, not frozen; OUTPUT_DIR and SEED are for each run to set."""
    notes: tuple[str, ...]
    """What is not as in the protocol, in sentences."""


def resolve(
    task: Task, backbone: Weights, weights: Path, gpus: int, overrides: Sequence[str], fraction: float = 1.0
) -> Resolved:
    """Builds the config.

    Args:
        weights: where the converted backbone is, or will be.
        gpus: 0 for the CPU, which has no SyncBN and gets BN.
        overrides: KEY VALUE KEY VALUE ..., as Detectron2's own commands take them.
        fraction: of the training images that is used.

    Raises:
        ValueError: a key is unknown or a value of the wrong type; the result is a wrong set-up (`checks.py`); the
            images of an iteration do not divide among the GPUs.
    """
    if len(overrides) % 2:
        raise ValueError(f"changes come as KEY VALUE pairs; {overrides[-1]!r} has no value")
    cfg = base_config(task)
    notes = []
    protocol = {key: _get(cfg, key) for key in (BATCH, RATE, *ITERATIONS)}
    expected = merge_backbone(cfg, backbone, weights)
    _merge(cfg, [BATCH, dict(zip(overrides[::2], overrides[1::2], strict=True)).get(BATCH, protocol[BATCH])])
    batch = cfg.SOLVER.IMS_PER_BATCH
    if not isinstance(batch, int) or batch < 1 or batch % max(gpus, 1):
        raise ValueError(
            f"{BATCH} is {batch}, which does not divide among {gpus} GPUs: choose a multiple"
            if gpus > 1
            else f"{BATCH} is {batch}; expected a whole number from 1"
        )
    if changes := {key: value for key, value in scaled(protocol, batch).items() if key not in overrides[::2]}:
        cfg.merge_from_list([part for pair in changes.items() for part in pair])
    if batch != protocol[BATCH]:
        notes.append(said(protocol, batch, changes))
    _merge(cfg, overrides)
    given = zip(overrides[::2], overrides[1::2], strict=True)
    notes += [f"{key} {value}, as given" for key, value in given if key != BATCH]
    cfg.CLOVE_HUB.FRACTION = fraction
    if fraction < 1:
        notes.append(f"trained on {fraction:.0%} of the images; the schedule stays")
    if gpus == 0:
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and replace_sync_bn(cfg):
        notes.append("SyncBN is BN, since the CPU has none")
    require_right_setup(cfg, expected)
    return Resolved(cfg, tuple(notes))


def base_config(task: Task) -> Any:
    """The zoo's file with the protocol's changes. The backbone in it is still Detectron2's."""
    from detectron2 import model_zoo

    from . import heads  # noqa: F401  (registers the head that the C4 tasks name)

    cfg = empty_config(task.densepose)
    if task.densepose:
        import densepose

        cfg.merge_from_file(str(Path(densepose.__file__).parents[1] / "configs" / task.zoo))
    else:
        cfg.merge_from_file(model_zoo.get_config_file(task.zoo))
    cfg.merge_from_list([part for pair in task.changes.items() for part in pair])
    return cfg


def empty_config(densepose: bool) -> Any:
    """Detectron2's defaults and our own keys; with DensePose's, which its files need."""
    from detectron2.config import CfgNode, get_cfg

    cfg = get_cfg()
    cfg.CLOVE_HUB = CfgNode({"FRACTION": 1.0, "LIST_SEED": 0, "DENSEPOSE": densepose})
    if densepose:
        from densepose import add_densepose_config

        add_densepose_config(cfg)
    return cfg


def merge_backbone(cfg: Any, backbone: Weights, weights: Path) -> Expected:
    """Sets what the backbone needs, and says what that is."""
    from detectron2.config import CfgNode

    settings = yaml.safe_load(detectron2_settings(backbone.architecture, backbone.preprocessing, weights))
    cfg.merge_from_other_cfg(CfgNode(settings))
    model = cfg.MODEL
    return Expected(backbone.architecture, list(model.PIXEL_MEAN), list(model.PIXEL_STD), model.WEIGHTS)


def replace_sync_bn(cfg: Mapping[str, Any]) -> bool:
    """Puts BN in the place of every SyncBN, and says whether there was one."""
    replaced = False
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            replaced |= replace_sync_bn(value)
        elif value == "SyncBN":
            cfg[key] = "BN"  # type: ignore[index]
            replaced = True
    return replaced


def _merge(cfg: Any, pairs: Sequence[Any]) -> None:
    try:
        cfg.merge_from_list(list(pairs))
    except (AssertionError, KeyError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip("'\"")
        raise ValueError(
            f"{' '.join(map(str, pairs))}: {reason}; keys are Detectron2's, as in SOLVER.MAX_ITER"
        ) from error


def _get(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
