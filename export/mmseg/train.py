"""One run of a task in MMSegmentation: train, score, write scores.json. Resumes after a stop.

`clove-hub downstream mmseg` starts it for each seed:

    python -m clove_hub.export.mmseg.train OUT/voc12aug.py --seed 0 --work-dir OUT/seed_0 --gpus 4
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from torch import Tensor

from clove_hub.evaluation.result import write_text
from clove_hub.processes import STOPS, die_with_parent

from ..seeds import DIVERGED, SCORES


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1, help="processes, each on one; 0 for the CPU")
    parser.add_argument("--parent", type=int, metavar="PID", help="a process with which this one ends")
    options = parser.parse_args(arguments)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # pending until a handler was installed
    launched = "RANK" in os.environ
    if options.parent and not launched:
        die_with_parent(signal.SIGTERM, options.parent)
    if launched:
        die_with_parent(signal.SIGTERM, os.getppid())
    if options.gpus > 1 and not launched:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.gpus), "-m"]
        os.execv(sys.executable, [sys.executable, *words, __spec__.name, *arguments])
    cfg = Config.fromfile(str(options.config))
    cfg.work_dir = str(options.work_dir)
    cfg.randomness = {"seed": options.seed}
    cfg.launcher = "pytorch" if launched else "none"
    if last := newest(options.work_dir):
        cfg.load_from, cfg.resume = str(last), True
    runner = Runner.from_cfg(cfg)
    try:
        runner.train()
    except FloatingPointError as error:
        write_text(options.work_dir / DIVERGED, f"{options.work_dir}: {error}\n")
        sys.exit(f"error: {options.work_dir}: {error}")
    found = by_class(runner)
    metrics = runner.test()
    if is_main_process():
        # A figure without a value is null.
        scores = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        text = json.dumps(
            {"metrics": scores, "class": found, "classes": list(runner.test_loop.evaluator.dataset_meta["classes"])},
            indent=1,
        )
        write_text(options.work_dir / SCORES, text + "\n")


def by_class(runner: Any) -> dict[str, dict[str, float]]:
    """The figures of each class that occurs, in the ground truth or in a prediction, filled when the runner tests.

    MMSegmentation's metric only logs them; this intercepts its totals over all images.
    """
    (metric,) = runner.test_loop.evaluator.metrics
    usual = metric.compute_metrics
    found: dict[str, dict[str, float]] = {}

    def kept(results: Sequence[Sequence[Tensor]]) -> dict[str, float]:
        intersection, union, _, truth = (
            torch.stack(list(parts)).sum(0).tolist() for parts in zip(*results, strict=True)
        )
        for number, name in enumerate(metric.dataset_meta["classes"]):
            if union[number]:
                found[name] = {"IoU": 100 * intersection[number] / union[number], "pixels": truth[number]}
        figures: dict[str, float] = usual(results)
        return figures

    metric.compute_metrics = kept
    return found


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    numbered = {int(path.stem.removeprefix("iter_")): path for path in folder.glob("iter_*.pth")}
    return next(
        (numbered[number] for number in sorted(numbered, reverse=True) if zipfile.is_zipfile(numbered[number])), None
    )


if __name__ == "__main__":
    main(sys.argv[1:])
