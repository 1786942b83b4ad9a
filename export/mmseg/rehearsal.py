"""The rehearsal of a task in MMSegmentation, on a few images of its own data."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

from clove_hub.documents import read_json
from clove_hub.evaluation.result import write_text
from clove_hub.weights import Weights

from ..convert import as_assignments
from ..rehearsal import Step, rehearse
from .config import Config, plain, resolve
from .layouts import write_miniature
from .tasks import TASKS, Order

PACKAGES = ("mmengine", "mmcv", "mmcv-lite", "mmsegmentation", "opencv-python", "opencv-python-headless", "pillow")
"""Packages whose versions decide whether a task can be trained and scored."""
OPEN = """
import sys
import torch
from mmseg.apis import inference_model, init_model
model = init_model(sys.argv[1], sys.argv[2], device="cpu")
# Full pickles: this rehearsal wrote the file a moment ago, and the framework has just opened it in the same way.
trained, held = torch.load(sys.argv[2], map_location="cpu", weights_only=False)["state_dict"], model.state_dict()
if wrong := [name for name in {**trained, **held} if name not in held or not torch.equal(held[name], trained.get(name))]:
    sys.exit(f"error: {len(wrong)} tensors are not those of {sys.argv[2]} ({', '.join(wrong[:4])})")
inference_model(model, sys.argv[3])
"""
"""A user's script for the result, without clove-hub."""


def rehearse_task(order: Order, data: Path, backbone: Weights, gpus: int) -> None:
    """Train two iterations, score, resume for a third, score the ground truth as predictions, and open the result.

    Args:
        data: the folder of data sets.
        gpus: GPUs of the training; the rehearsal has one process.

    Raises:
        ValueError: something fails; the message names it and says what to do.
    """
    rehearse(order.out, PACKAGES, partial(_prepare, order, data, backbone, min(gpus, 1)), {})


def _prepare(order: Order, data: Path, backbone: Weights, gpus: int, folder: Path) -> list[Step]:
    folder = folder.resolve()
    photo = write_miniature(TASKS[order.task].layout, data, folder / "data")
    few = replace(order, data=folder / "data")
    configs = [folder / "first.py", folder / "again.py"]
    for path, iterations in zip(configs, (2, 3), strict=True):
        config = _short(few, backbone, gpus, iterations)
        write_text(path, as_assignments(config))
    write_text(folder / "plain.py", as_assignments(plain(config)))
    seed, made = folder / "seed", folder / "made.json"
    options = ["--work-dir", str(seed), "--gpus", str(gpus), "--parent", str(os.getpid())]
    first, again = (["-m", f"{__package__}.train", str(path), *options] for path in configs)
    opened = [str(folder / "plain.py"), str(seed / "iter_3.pth"), str(photo)]
    return [
        Step("two iterations and their scoring", first),
        Step("resuming from the checkpoint", again, _went_on),
        Step(
            "scoring the ground truth as predictions",
            ["-m", f"{__package__}.made", str(configs[0]), str(made)],
            lambda _: _whole(made),
        ),
        Step("opening the result as MMSegmentation's init_model does", ["-c", OPEN, *opened]),
    ]


def _short(order: Order, backbone: Weights, gpus: int, iterations: int) -> Config:
    """The task's config, for a few iterations of two images."""
    config, _ = resolve(
        TASKS[order.task], backbone, order.weights, str(order.data), gpus, order.normalization, order.overrides
    )
    config["train_cfg"] |= {"max_iters": iterations, "val_interval": iterations}
    config["default_hooks"]["checkpoint"]["interval"] = 1
    config["train_dataloader"]["batch_size"] = 2
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        config[loader]["num_workers"] = min(config[loader]["num_workers"], 1)
    return config


def _went_on(printed: str) -> None:
    if "iter: 2" not in printed:
        raise ValueError("MMEngine started again at the first iteration")


def _whole(path: Path) -> None:
    """Raise ValueError if the evaluator does not score the ground truth as correct."""
    if (found := read_json(path))["mIoU"] < 99.9:
        raise ValueError(f"the ground truth, scored as predictions, has a mIoU of {found['mIoU']}, expected 100")
