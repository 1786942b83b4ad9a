"""`clove-hub downstream transformers MODEL --backbone SOURCE --data FOLDER [--out DIR] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from clove_hub.command import Command, require_installed, user_path
from clove_hub.global_state import kept_generators
from clove_hub.settings import described, plain
from clove_hub.weights import SOURCE
from clove_hub.weights.transformers import MODELS, require_transformers

from .settings import DEFAULTS, SECTIONS, read_settings

EPILOG = """models: detr, rt_detr_v2, d_fine (boxes); mask2former, upernet (a class for each pixel)

data:
  boxes    FOLDER/annotations/instances_{train,val}.json, FOLDER/{train,val}/ (or COCO's ..2017),
           or FOLDER/{train,valid}/_annotations.coco.json beside the images (Roboflow),
           or PASCAL VOC's layout, or FOLDER/{train,val}/*.xml beside the images
  pixels   VOC 2012's or Cityscapes' layout, or FOLDER/{train,val}.txt, images/, labels/, classes.json

settings, the model's unless changed:
  schedule.epochs=24 batch.total=8 batch.per_device=2
  optimizer.learning_rate=1e-4 optimizer.backbone_rate=0.1
  images.size=480 run.precision=fp32
  network.num_queries=100
      network: any entry of the model's config

DIR/model is the folder for from_pretrained; DIR/results.json has its figures.

Several GPUs: accelerate launch --module clove_hub.cli downstream transformers ...

A stopped run resumes when the same command is given again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--backbone", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument(
        "--data", required=True, type=user_path, metavar="FOLDER", help="images and annotations, see below"
    )
    parser.add_argument("--out", type=user_path, metavar="DIR", help="the run's folder (default: runs/downstream/...)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the settings")


def run(options: argparse.Namespace) -> int:
    settings = read_settings(options.model, options.overrides)
    require_transformers("downstream transformers")
    require_installed(("torchvision", "pycocotools", "scipy"), "downstream,transformers")
    from ..run.stopping import listen
    from . import fine_tune  # after checking that its imports are installed

    name = re.sub(r"[^\w.-]+", "_", options.backbone).strip("_")
    out = options.out or Path("runs", "downstream", f"{options.model}_{name}_seed{settings.run.seed}")
    with kept_generators():
        return fine_tune.run(settings, options.backbone, options.data, out, listen)


def settings(words: Sequence[str]) -> str:
    """The settings of the model named in the arguments."""
    model = next((model for model in MODELS if model in words), None)
    if model is None:
        return "MODEL --help shows the settings of a model."
    sections = {name: getattr(DEFAULTS[model], name) for name in SECTIONS}
    parts = [described(type(section), name, plain(section)) for name, section in sections.items()]
    return "\n".join([f"settings of {model} (section.key=value):\n", *parts])


TRANSFORMERS = Command(
    "A detector or segmenter of transformers on a backbone, trained by transformers' Trainer.",
    add_arguments,
    run,
    settings,
    logs=True,
)
