"""`clove-hub downstream torchvision TASK --backbone SOURCE --data FOLDER [--out DIR] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from clove_hub.command import Command, require_installed, user_path
from clove_hub.global_state import kept_generators
from clove_hub.settings import described, plain
from clove_hub.weights import SOURCE

from .settings import PRESETS, SECTIONS, TASKS, read_settings

EPILOG = """data:
  detection, instances   FOLDER/annotations/instances_{train,val}.json, FOLDER/{train,val}/ (or COCO's ..2017),
                         or FOLDER/{train,valid}/_annotations.coco.json beside the images (Roboflow)
  detection              PASCAL VOC's layout, or FOLDER/{train,val}/*.xml beside the images
  keypoints              FOLDER/annotations/person_keypoints_{train,val}.json, the same images
  segmentation           VOC 2012's or Cityscapes' layout, or FOLDER/{train,val}.txt, images/, labels/, classes.json

settings, the preset's unless changed:
  batch.total=16 schedule.steps=90000 optimizer.learning_rate=0.02
      scaled linearly with the batch
  data.fraction=0.1
      a tenth of the images, always the same
  images.shortest_edge=[640,672,704,736,768,800] images.lsj=1024
      several scales, or large-scale jitter
  optimizer.name=adamw optimizer.ema=0.9999 run.precision=fp32
      AdamW, moving average of the weights
  run.evaluate_every=1000 run.precise_bn=0
      scores every 1000 steps, keeps the best
  --preset TASK_papers_1x
      the papers' heads, several times as slow

Several GPUs: accelerate launch --module clove_hub.cli downstream torchvision ...

A stopped run resumes when the same command is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--backbone", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument(
        "--data", required=True, type=user_path, metavar="FOLDER", help="images and annotations, see below"
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"the protocol whose settings are the defaults: {', '.join(PRESETS)} (default: the first of the task)",
    )
    parser.add_argument("--out", type=user_path, metavar="DIR", help="the run's folder (default: runs/downstream/...)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the settings")


def run(options: argparse.Namespace) -> int:
    settings = read_settings(options.task, options.overrides, options.preset)
    needed = ["torchvision"] if options.task == "segmentation" else ["torchvision", "pycocotools"]
    require_installed(needed, "downstream")
    from ..run.stopping import listen
    from . import fine_tune  # after checking that its imports are installed

    name = re.sub(r"[^\w.-]+", "_", options.backbone).strip("_")
    out = options.out or Path("runs", "downstream", f"{options.task}_{name}_seed{settings.run.seed}")
    with kept_generators():
        return fine_tune.run(settings, options.backbone, options.data, out, listen)


def settings(words: Sequence[str]) -> str:
    """The settings of the task and preset named in the arguments."""
    task = next((task for task in TASKS if task in words), None)
    if task is None:
        return "TASK --help shows the settings of a task."
    given = [word.removeprefix("--preset=") for word in words]
    named = next((name for name in PRESETS if name in given), None)
    preset = PRESETS[read_settings(task, [], named).preset]
    sections = {name: getattr(preset, name) for name in SECTIONS}
    parts = [described(type(section), name, plain(section)) for name, section in sections.items()]
    return "\n".join([f"settings of {task} as {preset.preset} has them (section.key=value):\n", *parts])


TORCHVISION = Command(
    "Faster, Mask or Keypoint R-CNN with a feature pyramid, or FCN, of torchvision on a backbone.",
    add_arguments,
    run,
    settings,
    logs=True,
)
