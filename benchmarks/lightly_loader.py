"""lightly's loader as its documentation sets one up, for `pipeline`: `PYTHON benchmarks/lightly_loader.py ORDER`.

It runs in a Python that has lightly and nothing of ours (`-I` keeps the folder and PYTHONPATH out). Each line of its input is a request; each is answered by a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.transforms import DINOTransform


def main() -> None:
    order = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints does not answer
    dataset = LightlyDataset(order["photos"], transform=DINOTransform(**order["transform"]))
    batches: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        found: Any = None
        if request["do"] == "open":
            sampler = torch.utils.data.RandomSampler(dataset, num_samples=order["batch"] * request["batches"])
            batches = iter(
                torch.utils.data.DataLoader(
                    dataset, batch_size=order["batch"], sampler=sampler, num_workers=order["workers"], drop_last=True
                )
            )
        elif request["do"] == "next":
            views, *_ = next(batches)
            found = [list(view.shape) for view in views]
        elif request["do"] == "close":
            batches = None
        else:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            start = time.perf_counter()
            for index in request["indices"]:
                dataset[index % len(dataset)]
            found = time.perf_counter() - start
            torch.set_num_threads(threads)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
