"""Score the ground-truth masks, as predictions of a perfect network, with a task's own evaluator.

The rehearsal runs it on a few images:

    python -m clove_hub.export.mmseg.made OUT/rehearsal/first.py OUT/rehearsal/made.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from mmseg.utils import register_all_modules


def main(config: Path, out: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(str(config))
    dataset: Any = DATASETS.build(cfg.test_dataloader.dataset)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    for number in range(len(dataset)):
        found = dataset[number]["data_samples"]
        found.pred_sem_seg = found.gt_sem_seg
        evaluator.process([found])
    out.write_text(json.dumps({name: float(value) for name, value in evaluator.evaluate(len(dataset)).items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
