"""The epoch whose network scores best on the test split: scored after each, kept in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import nn

from clove_hub.runs import read_rows

from ..run.folder import RunFolder

log = logging.getLogger(__name__)

EPOCHS = "epochs.jsonl"
TENSORS = "best.safetensors"


class BestEpoch:
    """What `score` finds after each epoch, and the network of the best.

    A run that resumes has the rows of the epochs before, and scores the one that it was stopped after if it has none.

    Args:
        steps: of an epoch.
        last: step of the run, where an epoch may be cut short.
        start: the steps done so far.
        score: of the network in eval mode; the same on all processes, the higher the better.
    """

    def __init__(self, folder: RunFolder, steps: int, last: int, start: int, score: Callable[[], float]) -> None:
        self.folder, self.steps, self.last, self.score = folder, steps, last, score
        folder.truncate(EPOCHS, start)
        self.rows: list[dict[str, Any]] = folder.peers.from_main(read_rows(folder.path / EPOCHS))

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best epoch, of equals the first."""
        return max(self.rows, key=lambda row: row["mIoU"])

    def due(self, step: int) -> bool:
        """Whether an epoch ends here that has not been scored."""
        ends = step == self.last or (step > 0 and step % self.steps == 0)
        return ends and not any(row["step"] == step for row in self.rows)

    def consider(self, step: int, network: nn.Module) -> None:
        """Scores the epoch that ends here."""
        share_buffers(network)
        row = {"step": step, "epoch": -(-step // self.steps), "mIoU": self.score()}
        if not self.rows or row["mIoU"] > self.best["mIoU"]:
            self.folder.write_tensors(TENSORS, network.state_dict())
        self.folder.append(EPOCHS, row)
        self.rows.append(row)

    def restore(self, network: nn.Module) -> None:
        """Brings the network of all processes to the best epoch."""
        with self.folder.peers.together():
            if self.folder.peers.main:
                network.load_state_dict(load_file(self.folder.path / TENSORS))
        for tensor in network.state_dict().values():
            tensor.copy_(broadcast(tensor))
        log.info("epoch %d of %d is the best: mIoU %.1f", self.best["epoch"], len(self.rows), self.best["mIoU"])


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Gives the main process's statistics to all; without synchronized batch norm each has its own."""
    for buffer in network.buffers():
        buffer.copy_(broadcast(buffer))
