r"""One run of a task in Detectron2: train, score, write scores.json. Resumes after a stop.

`clove-hub downstream detectron2` starts it for each seed. On several machines start it on each of them, with the config
that the command wrote:

    python -m clove_hub.export.detectron2.train_net --config-file OUT/seed_0.yaml \
        --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import signal
import sys
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from torch.multiprocessing.spawn import ProcessExitedException

from clove_hub.data.files import chosen
from clove_hub.evaluation.result import write_text
from clove_hub.processes import die_with_parent

from ..seeds import DIVERGED, SCORES
from . import heads  # noqa: F401  (registers the head that the C4 tasks name)
from .config import RATE, empty_config
from .facts import write_plain
from .order import StepSeed, in_order
from .own_data import register
from .repairs import mend
from .stopping import FiniteCheckpoints, StopRequests, leave, pass_on_signals
from .verify import require_placed

LIST_SEED = 0
"""Seed of the image lists of a low-data setting."""


class Trainer(DefaultTrainer):  # type: ignore[misc]
    """Detectron2's trainer, with the evaluator of each data set."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> DatasetEvaluator:
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        if kind in ("coco", "lvis"):
            evaluator = COCOEvaluator if kind == "coco" else LVISEvaluator
            return evaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR, "inference")))
        if kind == "cityscapes_instance":
            return CityscapesInstanceEvaluator(dataset_name)
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise ValueError(f"{dataset_name} is of the kind {kind!r}, for which clove-hub has no evaluator")


def few(cfg: Any, fraction: float) -> list[dict[str, Any]]:
    """The training images of a low-data setting: the same list as in the torchvision suite."""
    every = [record["image_id"] for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    wanted = set(chosen(every, fraction, LIST_SEED))
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    usable = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS, min_keypoints=keypoints
    )
    return [record for record in usable if record["image_id"] in wanted]


def trainer_kind(densepose: bool) -> Any:
    """`Trainer`, or DensePose's for its task, which has its own evaluator and images."""
    if not densepose:
        return Trainer
    from densepose.engine import Trainer as DensePoseTrainer

    return DensePoseTrainer


def build_trainer(cfg: Any, densepose: bool, fraction: float, stop: StopRequests) -> Any:
    """The trainer of a task with clove-hub's hooks, and the image list of a low-data setting."""

    class WithHooks(trainer_kind(densepose)):  # type: ignore[misc]
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return (
                build_detection_train_loader(cfg, dataset=few(cfg, fraction))
                if fraction < 1
                else super().build_train_loader(cfg)
            )

        def build_hooks(self) -> list[Any]:
            hooks = super().build_hooks()
            at = next(number for number, hook in enumerate(hooks) if isinstance(hook, EvalHook))
            return [*hooks[:at], StepSeed(cfg.SEED), FiniteCheckpoints(), stop, *hooks[at:]]

    return WithHooks(cfg)


def read_config(path: Path) -> tuple[Any, bool]:
    """The config in a file, and whether it is a DensePose config."""
    densepose = "ROI_DENSEPOSE_HEAD" in yaml.safe_load(path.read_text(encoding="utf-8"))["MODEL"]
    cfg = empty_config(densepose)
    cfg.merge_from_file(str(path))
    register(cfg)  # data sets of own photos, which a config names by their file
    return cfg, densepose


def main(args: argparse.Namespace) -> None:
    """Train in one process; the main process writes the scores."""
    stop = StopRequests()
    if parent := multiprocessing.parent_process():
        die_with_parent(signal.SIGTERM, parent.pid or 0)
    cfg, densepose = read_config(Path(args.config_file))
    cfg.freeze()
    mend(MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("evaluator_type"), densepose)
    default_setup(cfg, args)
    trainer = build_trainer(cfg, densepose, args.fraction, stop)
    trainer.resume_or_load(resume=True)
    if trainer.start_iter == 0:  # later it has trained weights
        file = torch.load(cfg.MODEL.WEIGHTS, map_location="cpu", weights_only=True)
        require_placed(getattr(trainer.model, "module", trainer.model), file["model"])
    trainer.data_loader = in_order(trainer.data_loader, cfg.SEED, trainer.start_iter)
    try:
        trainer.train()
    except FloatingPointError as error:
        what = str(error).partition("\n")[0].rstrip("!.")
        said = f"{cfg.OUTPUT_DIR}: {what}. Choose a {RATE} below {cfg.SOLVER.BASE_LR:g} and another --out"
        write_text(Path(cfg.OUTPUT_DIR, DIVERGED), said + "\n")
        sys.exit(f"error: {said}")
    except RuntimeError:
        if stop.received:  # workers that had not started also got the signal; no iteration is lost then
            leave(stop.received)
        raise
    if comm.is_main_process():
        scores = {
            # A figure without a value (no object of that size) is null.
            group: {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}
            for group, figures in trainer._last_eval_results.items()
        }
        write_plain(cfg)
        write_text(Path(cfg.OUTPUT_DIR, SCORES), json.dumps(scores, indent=1) + "\n")


def start() -> None:
    """Parse the command line as Detectron2's train_net.py does, and forward signals to the processes it starts."""
    parser = default_argument_parser()
    parser.add_argument("--fraction", type=float, default=1.0, help="of COCO's images, as the command was given it")
    parser.add_argument("--parent", type=int, metavar="PID", help="a process with which this one ends")
    arguments = parser.parse_args()
    pass_on_signals()
    if arguments.parent:
        die_with_parent(signal.SIGTERM, arguments.parent)
    try:
        launch(
            main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except ProcessExitedException as error:
        if error.exit_code < 0:  # killed; the message names the signal
            raise
        sys.exit(error.exit_code)


if __name__ == "__main__":
    start()
