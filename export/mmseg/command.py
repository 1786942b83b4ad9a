"""`clove-hub downstream mmseg TASK --backbone SOURCE [--data FOLDER] [--out DIR] [key=value ...]`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from clove_hub.command import Command, user_path
from clove_hub.weights import SOURCE, load

from .config import BATCH, ITERATIONS
from .tasks import TASKS, Order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, TASKS))
    tasks = "\n".join(f"  {name:<{width}}  {task.text}" for name, task in TASKS.items())
    parser.epilog = (
        f"tasks, as SlotCon's repository has them, {BATCH} images in an iteration:\n{tasks}\n\n"
        f"key=value: MMEngine's keys, as in optim_wrapper.optimizer.lr=0.01. With {ITERATIONS}=20000 the schedule,\n"
        "checkpoints and evaluations follow unless they are given too.\n\nExit code 75 means: stopped by SIGTERM, SIGHUP or "
        "SIGUSR1 after saving (130: by Ctrl-C); start the same\ncommand again to go on."
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of those below")
    parser.add_argument("--backbone", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="FOLDER",
        help="folder of data sets in MMSegmentation's layout, to train and score here; without it, only config and "
        "weights are written",
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="default: all; 0 for the CPU")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="seeds (default: 1)")
    parser.add_argument(
        "--normalization",
        choices=["slotcon", "imagenet"],
        help="imagenet, the default for ade20k: the backbone's own mean and standard deviation, for pixels from 0 to "
        "255. slotcon, the default for voc12aug and cityscapes: those for pixels from 0 to 1, with which "
        "SlotCon's (and MoCo's) figures were measured",
    )
    parser.add_argument("--out", type=user_path, metavar="DIR", help="default: runs/downstream/mmseg_TASK_SOURCE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")


def run(options: argparse.Namespace) -> int:
    if options.runs < 1:
        raise ValueError(f"--runs {options.runs}: expected a whole number from 1")
    from . import suite

    name = re.sub(r"[^\w.-]+", "_", options.backbone).strip("_")
    order = Order(
        task=options.task,
        backbone=options.backbone,
        data=options.data,
        out=options.out or Path("runs", "downstream", f"mmseg_{options.task}_{name}"),
        gpus=options.gpus,
        runs=options.runs,
        normalization=options.normalization,
        overrides=tuple(options.overrides),
    )
    if order.data is not None:
        return suite.run(order, order.data)
    backbone = load(order.backbone)
    gpus = suite.USUAL_GPUS if order.gpus is None else order.gpus
    config, notes = suite.prepare(order, backbone, gpus)
    suite.write_protocol(order, backbone, config)
    print(f"{order.weights}: {backbone.architecture} of {backbone.what}, every tensor in its place")
    for note in (*backbone.notes, *notes):
        print(f"note: {note}")
    launcher = f" --launcher pytorch --gpus {gpus}" if gpus > 1 else ""
    print(
        f"{order.config}: {TASKS[order.task].text}\n\n"
        f"To train it with MMSegmentation 1.x ({suite.INSTALL}) and clove-hub, in the folder that has data/:\n\n"
        f"    mim train mmsegmentation {order.config}{launcher}\n\n"
        "To train, score and collect in one command instead, add --data FOLDER to this one."
    )
    return 0


MMSEG = Command(
    "FCN on a backbone in MMSegmentation, as SlotCon's paper fine-tunes it. Given again, the command goes on where it was "
    "stopped.",
    add_arguments,
    run,
)
