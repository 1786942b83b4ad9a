"""Runs a trainer and notes, from outside, each batch that it reads for training and the loss of each step.

`python resume_watch.py LOG PHOTOS (-m MODULE | SCRIPT) [ARGUMENT ...]`. The trainer may be anybody's, as long as it reads
a map-style data set through torch's DataLoader, in its own process or in one worker. It runs in a Python that may lack
clove-hub, so this file imports nothing of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data._utils.fetch import _MapDatasetFetcher


def main() -> None:
    log, photos, *words = sys.argv[1:]
    multiprocessing.set_start_method("fork")  # so that a worker is watched too; Python's own choice until 3.14
    watch(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.path.join(os.path.realpath(photos), ""))
    if words[0] == "-m":  # both set argv and the path as Python itself does
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def watch(log: int, root: str) -> None:
    """Appends a line {"batch": [photo, ...]} for each batch of the training set, {"loss": x, "at": s} for each step.

    A line is a single write to a file opened for appending, so a kill leaves whole lines.

    Args:
        log: descriptor of the file.
        root: the folder of the photos, resolved, with a slash behind it; other files are not noted.
    """
    opened: list[str] = []
    training: list[Any] = []  # the data set of the first batch; an evaluation has another

    def write(**row: Any) -> None:
        os.write(log, json.dumps(row).encode() + b"\n")

    def note(path: str | bytes) -> None:
        name = os.path.realpath(os.fsdecode(path))
        if name.startswith(root):
            opened.append(name.removeprefix(root))

    def opening(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(details[0], str | bytes):
            note(details[0])

    sys.addaudithook(opening)
    try:
        from torchvision.io import image
    except ImportError:
        pass
    else:  # it opens files in C++, where no audit hook is called
        read_file = image.read_file

        def reading(path: str) -> Any:
            note(path)
            return read_file(path)

        image.read_file = reading

    fetch: Any = _MapDatasetFetcher.fetch
    backward: Any = torch.Tensor.backward

    def fetching(self: Any, indices: Any) -> Any:
        opened.clear()
        batch = fetch(self, indices)
        training[:] = training or [self.dataset]
        if self.dataset is training[0]:
            write(batch=opened)
        return batch

    def stepping(self: Any, *arguments: Any, **named: Any) -> None:
        write(loss=self.item(), at=time.monotonic())
        backward(self, *arguments, **named)

    setattr(_MapDatasetFetcher, "fetch", fetching)  # noqa: B010
    setattr(torch.Tensor, "backward", stepping)  # noqa: B010


if __name__ == "__main__":
    main()
