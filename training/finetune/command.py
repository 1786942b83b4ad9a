"""`clove-hub downstream torchvision TASK --backbone SOURCE --data FOLDER [--out DIR] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from clove_hub.weights import SOURCE

from .settings import TASKS, read_settings

EPILOG = """data:
  detection, instances   FOLDER/annotations/instances_{train,val}.json, FOLDER/{train,val}/ (or COCO's ..2017)
  keypoints              FOLDER/annotations/person_keypoints_{train,val}.json, the same images
  segmentation           VOC 2012's layout, or FOLDER/{train,val}.txt, images/, labels/, classes.json

settings, the papers' protocol unless changed:
  batch.total=16 schedule.steps=90000 optimizer.learning_rate=0.02   scaled linearly with the batch
  data.fraction=0.1                                                  a tenth of the images, always the same
  images.shortest_edge=[640,672,704,736,768,800] network.head=conv run.seed=0 run.precision=bf16 ...

Several GPUs: accelerate launch --module clove_hub.cli downstream torchvision ...
A run that was stopped goes on when the same command is given again."""


def torchvision_main(arguments: list[str], program: str = "clove-hub downstream torchvision") -> int:
    """Runs the command: 0 when scored, 2 for input that is refused, 75 when it was asked to stop and has saved."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Faster, Mask or Keypoint R-CNN with a feature pyramid, or FCN, of torchvision on a backbone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--backbone",
        required=True,
        metavar="SOURCE",
        help=SOURCE,
    )
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="images and annotations, see below")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/downstream/...)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the settings")
    options = parser.parse_intermixed_args(arguments)
    try:
        settings = read_settings(options.task, options.overrides)
        require_packages("torchvision", *(["pycocotools"] if options.task != "segmentation" else []))
        from .fine_tune import run  # now that what it imports is known to be there

        name = re.sub(r"[^\w.-]+", "_", options.backbone).strip("_")
        out = options.out or Path("runs", "downstream", f"{options.task}_{name}_seed{settings.run.seed}")
        return run(settings, options.backbone, options.data, out)
    except (ValueError, FloatingPointError) as error:
        # From a loading worker it comes with the worker's traceback before it.
        print(f"error: {str(error).rpartition(f'{type(error).__name__}: ')[2].strip()}", file=sys.stderr)
        return 2


def require_packages(*names: str) -> None:
    """Raises ValueError naming those that are not installed, and the extra that brings them."""
    if absent := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(absent)} must be installed for this: pip install 'clove-hub[downstream]'")
