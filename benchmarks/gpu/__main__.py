"""`python -m benchmarks.gpu --minutes 9`: what has to be known of a GPU, the most valuable first, in the minutes that there are.

| part     | what it asks                                                                                       |
|----------|----------------------------------------------------------------------------------------------------|
| check    | does every branch that a GPU alone takes do what it should                                           |
| speed    | how fast is a step, what takes its time, what could the hardware do at most                          |
| learn    | what has each method learned after equal steps                                                       |
| finetune | is a pre-trained backbone a better start than random weights                                         |

Each part is a process with its share of the minutes, and writes `gpu_PART.json` after every item. Nothing is downloaded. `--rehearse`
runs the same on a small scale on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from .. import report
from . import part
from .children import processes
from .journal import DEVICE_LOST

PARTS = {"check": 2.7, "speed": 3.8, "learn": 1.9, "finetune": 1.1}
"""How the minutes are shared; what a part does not need goes to those after it."""
GRACE = 10.0
"""Seconds after its share at which a part is ended."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="All questions to a GPU in one call.")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together (default: %(default)s)")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="one or several (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="the same code, small, on a CPU")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="to learn from (default: made ones)")
    parser.add_argument("--segmentation", type=Path, metavar="DIR", help="images with masks, as CamVid's")
    parser.add_argument("--detection", type=Path, metavar="DIR", help="images and annotations, as COCO's")
    parser.add_argument("--backbone", metavar="SOURCE", help="to fine-tune (default: what learn has left)")
    parser.add_argument(
        "--reference", type=Path, metavar="CLONE", help="a clone of the released CLoVE code, to compare"
    )
    parser.add_argument("--results", type=Path, default=report.RESULTS, metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="where runs and made photos go (default: a new one)"
    )
    options = parser.parse_args()
    for folder in (options.photos, options.segmentation, options.detection, options.reference):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --rehearse runs the same on a small scale on a CPU")
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="clove_gpu_") as folder:
        return parts(options, options.work or Path(folder))


def parts(options: argparse.Namespace, work: Path) -> int:
    """Runs the parts one after the other; 0 where each has come to its end."""
    until, chosen, code = time.monotonic() + 60 * options.minutes, options.part or list(PARTS), 0
    for number, name in enumerate(chosen):
        (options.results / f"gpu_{name}.json").unlink(missing_ok=True)
        share = PARTS[name] / sum(PARTS[one] for one in chosen[number:])
        end = time.monotonic() + share * (until - time.monotonic())
        ended = DEVICE_LOST
        while ended == DEVICE_LOST and (left := end - time.monotonic()) > GRACE:
            print(f"\n---- {name}, {left:.0f} seconds", flush=True)
            arguments = (options, name, (left - GRACE / 2) / 60, work, os.getpid())
            process = processes(options.rehearse).Process(target=part.run, args=arguments)
            process.start()
            process.join(left + GRACE)
            if process.is_alive():
                print(f"{name} is killed: its time was up", flush=True)
                process.kill()
                process.join()
            ended = process.exitcode or 0
        code = code or ended
    return code


if __name__ == "__main__":
    sys.exit(main())
