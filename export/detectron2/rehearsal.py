"""The rehearsal of a task in Detectron2, on a few images of its own data."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from clove_hub.documents import read_json
from clove_hub.evaluation.result import write_text
from clove_hub.weights import Weights

from ..rehearsal import FOLDER, Step, rehearse
from .facts import how_to_open, write_facts
from .miniature import write_miniature
from .tasks import EXTRA_NORM_HEAD, Task

PACKAGES = (
    *("detectron2", "detectron2-densepose", "fvcore", "pycocotools", "scipy", "pillow", "opencv-python"),
    *("opencv-python-headless", "lvis", "cityscapesscripts", "shapely"),
)
"""Packages whose versions decide whether a task can be trained and scored."""
OPEN = """
import sys
import torch
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
{imports}
cfg = get_cfg()
{keys}
cfg.merge_from_file(sys.argv[1])
predictor = DefaultPredictor(cfg)
predictor(read_image(sys.argv[2], format="BGR"))
# Full pickles: this rehearsal wrote the file a moment ago, and the framework has just opened it in the same way.
trained = torch.load(cfg.MODEL.WEIGHTS, map_location="cpu", weights_only=False)["model"]
held = predictor.model.state_dict()
wrong = [name for name in trained if name in held and not torch.equal(held[name].cpu(), trained[name])]
if wrong or not trained.keys() & held.keys():
    sys.exit(f"error: {{len(wrong)}} of {{len(trained)}} tensors are not those of {{cfg.MODEL.WEIGHTS}}")
"""
"""A user's script for the result, without clove-hub except for the import that the C4 head needs."""


def rehearse_task(name: str, task: Task, cfg: Any, backbone: Weights, data: Path, out: Path, gpus: int) -> None:
    """Train two iterations, score, resume for a third, score the ground truth as predictions, and open the result.

    Args:
        cfg: the task's config; whatever takes long is shortened.
        data: Detectron2's DETECTRON2_DATASETS.
        out: the folder of all seeds.
        gpus: GPUs of the training; the rehearsal has one process.

    Raises:
        ValueError: something fails; the message names it and says what to do.
    """
    sets = out.resolve() / FOLDER / "datasets"
    prepare = partial(_prepare, name, task, cfg, backbone, data, gpus)
    rehearse(out, PACKAGES, prepare, {"DETECTRON2_DATASETS": str(sets)})


def _prepare(name: str, task: Task, cfg: Any, backbone: Weights, data: Path, gpus: int, folder: Path) -> list[Step]:
    folder = folder.resolve()
    photo = write_miniature(task.layout, data, folder / "datasets")
    seed = folder / "seed"
    write_facts(seed, name, backbone, 1.0, ["a rehearsal"])
    configs = [folder / "first.yaml", folder / "again.yaml"]
    for config, iterations in zip(configs, (2, 3), strict=True):
        short = cfg.clone()
        short.OUTPUT_DIR, short.SOLVER.MAX_ITER, short.SOLVER.STEPS = str(seed), iterations, ()
        short.SEED, short.SOLVER.IMS_PER_BATCH, short.SOLVER.BASE_LR = 0, 2, min(cfg.SOLVER.BASE_LR, 1e-5)
        short.TEST.EVAL_PERIOD, short.TEST.PRECISE_BN.NUM_ITER = 0, 1
        short.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, 1)
        write_text(config, short.dump())
    options = ["--parent", str(os.getpid()), "--num-gpus", str(min(gpus, 1)), "--dist-url", "auto"]
    first, again = (["-m", f"{__package__}.train_net", *options, "--config-file", str(config)] for config in configs)
    head = cfg.MODEL.ROI_HEADS.NAME
    script = OPEN.format(
        imports=f"import {__package__}.heads" if head == EXTRA_NORM_HEAD else "",
        keys="from densepose import add_densepose_config; add_densepose_config(cfg)" if task.densepose else "",
    )
    made = ["-m", f"{__package__}.made", str(configs[0]), str(folder / "made.json")]
    packages = ", ".join(task.packages)
    mend = f"Install another version of {packages}, then run the same command again" if packages else Step.advice
    return [
        Step("two iterations and their scoring", first),
        Step("resuming from the checkpoint", again, _went_on),
        Step(
            "scoring the ground truth as predictions",
            made,
            lambda _: require_found(task, folder / "made.json"),
            advice=mend,
        ),
        Step(
            f"opening the result as `{how_to_open(seed, head, task.densepose)}` does",
            ["-c", script, str(seed / "config.yaml"), str(photo)],
        ),
    ]


def _went_on(printed: str) -> None:
    if "Starting training from iteration 2" not in printed:
        raise ValueError("Detectron2 started again at the first iteration")


def require_found(task: Task, path: Path) -> None:
    """Raise ValueError if the evaluator does not score the ground truth as correct."""
    scores = read_json(path)
    wrong = []
    for group, names in task.metrics.items():
        for theirs in names:
            value, least = scores.get(group, {}).get(theirs), task.of_the_truth.get(group, 90.0)
            if value is None or not value >= least:
                wrong.append(f"{group} {theirs} {value}")
    if wrong:
        raise ValueError(f"the ground truth, scored as predictions, has {', '.join(wrong)}, expected about 100")
