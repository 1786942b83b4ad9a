"""One part of `python -m benchmarks.gpu`, in a process of its own."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import signal
from datetime import datetime, timezone
from pathlib import Path

import torch

from clove_hub.processes import die_with_parent

from .. import report
from . import check, finetune, learn, speed
from .journal import Journal
from .place import Place


def run(options: argparse.Namespace, name: str, minutes: float, work: Path, parent: int) -> None:
    """Runs a part in this process, which `__main__` has started.

    Args:
        work: the folder that the parts share.
        parent: its process id.
    """
    die_with_parent(signal.SIGKILL, parent)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING)
    if options.rehearse:
        torch.set_num_threads(1)  # threads of OpenMP survive no fork
    device = torch.device("cpu" if options.rehearse else "cuda")
    folders = {
        key: value and value.resolve()
        for key in ("photos", "segmentation", "detection", "reference")
        for value in [getattr(options, key)]
    }
    place = Place(device, options.rehearse, work.resolve(), **folders)
    journal = Journal(
        options.results / f"gpu_{name}.json",
        minutes,
        patience=10.0 if options.rehearse else 1.0,  # a test's machine may do much else
        benchmark=f"gpu_{name}",
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=report.commit(report.ROOT),
        rehearsal=options.rehearse,
        hardware=report.hardware(device),
        versions=report.versions(),
    )
    if name == "finetune":
        finetune.run(journal, place, options.backbone)
    else:
        {"check": check, "speed": speed, "learn": learn}[name].run(journal, place)
