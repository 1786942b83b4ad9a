"""The complete config of a task: the zoo's file, the protocol's changes, the backbone's settings, the user's changes.

Configurations that run without an error but give a wrong figure are found here, before training. All of them occur in
practice: public issue trackers have many reports of an AP that is too low by 1 to 30 points for one of these reasons.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from clove_hub.weights import Weights

from .settings import settings
from .tasks import Task

BATCH = "SOLVER.IMS_PER_BATCH"
RATE = "SOLVER.BASE_LR"
MAX_ITER, STEPS = "SOLVER.MAX_ITER", "SOLVER.STEPS"
ITERATIONS = (MAX_ITER, STEPS, "SOLVER.WARMUP_ITERS", "TEST.EVAL_PERIOD")


@dataclass(frozen=True)
class Resolved:
    """A config that is correct for its backbone."""

    cfg: Any
    """Detectron2's CfgNode, not frozen; each run sets OUTPUT_DIR and SEED."""
    notes: tuple[str, ...]
    """The deviations from the protocol, in sentences."""


def resolve(
    task: Task, backbone: Weights, weights: Path, gpus: int, overrides: Sequence[str], fraction: float = 1.0
) -> Resolved:
    """Build the config.

    Args:
        weights: where the converted backbone is, or will be.
        gpus: 0 for the CPU, which has no SyncBN and uses BN.
        overrides: KEY VALUE KEY VALUE ..., as in Detectron2's own commands.
        fraction: fraction of the training images to use.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or cannot train; the result is a wrong set-up; the
            images of an iteration are not divisible by the GPUs.
    """
    from detectron2.config import CfgNode

    if len(overrides) % 2:
        raise ValueError(f"changes come as KEY VALUE pairs; {overrides[-1]!r} has no value")
    given = dict(zip(overrides[::2], overrides[1::2], strict=True))
    cfg = base_config(task)
    protocol = {key: reduce(getitem, key.split("."), cfg) for key in (BATCH, RATE, *ITERATIONS)}
    needed = settings(backbone, str(weights.resolve()))
    cfg.merge_from_other_cfg(CfgNode(needed))
    _merge(cfg, [BATCH, given.get(BATCH, protocol[BATCH])])
    batch = cfg.SOLVER.IMS_PER_BATCH
    if not isinstance(batch, int) or batch < 1 or batch % max(gpus, 1):
        raise ValueError(
            f"{BATCH} is {batch}, which is not divisible among {gpus} GPUs: choose a multiple of {gpus}"
            if gpus > 1
            else f"{BATCH} is {batch}; expected a whole number from 1"
        )
    for_batch = scaled(protocol, batch)
    changes = {key: value for key, value in for_batch.items() if key not in given}
    cfg.merge_from_list([part for pair in changes.items() for part in pair])
    _merge(cfg, overrides)
    shorter = {
        key: value for key, value in rescheduled(protocol | for_batch, cfg.SOLVER.MAX_ITER).items() if key not in given
    }
    cfg.merge_from_list([part for pair in shorter.items() for part in pair])
    for key, number in cfg.SOLVER.items():
        if isinstance(number, float) and not 0 <= number < math.inf:
            raise ValueError(f"SOLVER.{key} is {number:g}; expected a finite number from 0")
    notes = [said(protocol, batch, changes)] if batch != protocol[BATCH] else []
    notes += [f"{key} {value}, as given" for key, value in given.items() if key != BATCH]
    notes += [f"{key} {value}, to fit {MAX_ITER}" for key, value in shorter.items()]
    if fraction < 1:
        notes.append(f"trained on {fraction:.0%} of the images; the schedule is unchanged")
    if gpus == 0:
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and replace_sync_bn(cfg):
        notes.append("BN in place of SyncBN, which the CPU does not have")
    require_right_setup(cfg, needed, backbone.architecture)
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
    """Detectron2's defaults, including DensePose's for its files."""
    from detectron2.config import get_cfg

    cfg = get_cfg()
    if densepose:
        from densepose import add_densepose_config

        add_densepose_config(cfg)
    return cfg


def replace_sync_bn(cfg: Mapping[str, Any]) -> bool:
    """Replace every SyncBN by BN; return whether there was one."""
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


# ---- another number of images in an iteration than the protocol's ----------------------------------------------------


def scaled(protocol: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The changes for `batch` images per iteration that keep the total number of images.

    Goyal et al. 2017: k times the images per iteration, k times the learning rate, 1/k of the iterations.

    Args:
        protocol: BATCH, RATE and ITERATIONS of the protocol.

    Returns:
        The changed values by key; empty for the protocol's batch.
    """
    factor = batch / protocol[BATCH]
    changes = {RATE: protocol[RATE] * factor} | {key: _times(protocol[key], 1 / factor) for key in ITERATIONS}
    return {key: value for key, value in changes.items() if value != protocol[key]}


def rescheduled(schedule: Mapping[str, Any], iterations: int) -> dict[str, Any]:
    """The changes for another number of iterations that keep the learning rate's drops at the same fractions.

    The warm-up and the evaluation period become shorter with it, but not longer: Detectron2's 3x schedules keep them.

    Args:
        schedule: the schedule before the change.

    Returns:
        The changed values by key.
    """
    factor = iterations / schedule[MAX_ITER]
    keys = ITERATIONS[1:] if factor < 1 else ITERATIONS[1:2]
    changes = {key: _times(schedule[key], factor) for key in keys}
    changes[STEPS] = tuple(step for step in changes[STEPS] if step < iterations)  # Detectron2 rejects others
    return {key: value for key, value in changes.items() if value != schedule[key]}


def _times(value: Any, factor: float) -> Any:
    """Scale one or several numbers of iterations, to at least 1; a period of 0 means never and stays 0."""
    if isinstance(value, int):
        return max(round(value * factor), 1) if value else 0
    return tuple(_times(one, factor) for one in value)


def said(protocol: Mapping[str, Any], batch: int, changes: Mapping[str, Any]) -> str:
    """The changes in a sentence."""

    def plain(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    listed = ", ".join(f"{key} {plain(protocol[key])} -> {plain(value)}" for key, value in changes.items())
    return (
        f"{batch} images per iteration in place of the protocol's {protocol[BATCH]}: {listed or 'nothing else changes'}"
    )


# ---- wrong set-ups ---------------------------------------------------------------------------------------------------


def require_right_setup(config: Mapping[str, Any], needed: Mapping[str, Any], architecture: str) -> None:
    """Reject a config that would not fine-tune the backbone as it was trained.

    Args:
        config: Detectron2's config, as nested mappings (a CfgNode is one).
        needed: the settings that the backbone needs (`settings`).
        architecture: the backbone's architecture.

    Raises:
        ValueError: the config is wrong; the message has a sentence for each fault.
    """
    if found := list(_wrong(config, needed, architecture)):
        raise ValueError("this config would not fine-tune the backbone as it was trained:\n  " + "\n  ".join(found))


def _wrong(config: Mapping[str, Any], needed: Mapping[str, Any], architecture: str) -> Iterator[str]:
    model, wanted = config["MODEL"], needed["MODEL"]
    if (image_format := config["INPUT"]["FORMAT"]) != "RGB":
        yield f"INPUT.FORMAT is {image_format!r}: the backbone was trained on RGB; red and blue would be swapped. Set RGB"
    for key, other, meaning in (
        ("PIXEL_MEAN", wanted["PIXEL_MEAN"][::-1], "the order BGR"),
        ("PIXEL_STD", [1, 1, 1], "the value for the Caffe weights that Detectron2 starts from"),
    ):
        if not _equal(model[key], wanted[key]):
            hint = f" ({meaning})" if _equal(model[key], other) else ""
            yield f"MODEL.{key} is {list(model[key])}{hint}: the backbone was trained with {wanted[key]}"
    if model["RESNETS"]["STRIDE_IN_1X1"]:
        yield (
            "MODEL.RESNETS.STRIDE_IN_1X1 is True: the backbone has its stride in the 3x3 convolutions; the weights "
            "would load, but the feature maps would be wrong. Set False"
        )
    if (frozen := model["BACKBONE"]["FREEZE_AT"]) > 0:
        what = "its stem" if frozen == 1 else f"its stem and {frozen - 1} stages"
        yield f"MODEL.BACKBONE.FREEZE_AT is {frozen}, which freezes {what}: the papers train all of it. Set 0"
    for key in ("DEPTH", "NUM_GROUPS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS"):
        found, value = model["RESNETS"][key], wanted["RESNETS"][key]
        if found != value:
            yield f"MODEL.RESNETS.{key} is {found}, but the backbone is a {architecture}: set {value}"
    weights = str(model["WEIGHTS"])
    if weights != wanted["WEIGHTS"]:
        if not weights:
            what = "is empty: training would start from random weights"
        elif "ImageNetPretrained" in weights:
            what = f"is {weights}: supervised weights of ImageNet, not the backbone"
        elif "://" in weights:
            what = f"is {weights}: a whole detector that was trained with labels, not the backbone"
        else:
            what = f"is {weights}, which is not the converted backbone"
        yield f"MODEL.WEIGHTS {what}. Leave it out; this command sets {wanted['WEIGHTS']}"


def _equal(found: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether numbers are equal up to the usual rounding."""
    return len(found) == len(expected) and all(
        math.isclose(a, b, abs_tol=0.05) for a, b in zip(found, expected, strict=True)
    )
