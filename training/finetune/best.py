"""The network that scores best on the test split: evaluated at a fixed interval, kept in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import nn

from clove_hub.runs import read_rows

from ..run.folder import RunFolder

log = logging.getLogger(__name__)

ROWS = "evaluations.jsonl"
TENSORS = "best.safetensors"


class Best:
    """Scores at a fixed interval, and the best network.

    A resumed run has the earlier rows, and first scores the network at which it was stopped if its row is missing.

    Args:
        every: steps between two evaluations.
        last: last step of the run, which is also evaluated.
        start: the steps done so far.
        metric: the figure that decides; higher is better.
        score: the figures of a network in eval mode, the same on all processes.
    """

    def __init__(
        self,
        folder: RunFolder,
        every: int,
        last: int,
        start: int,
        metric: str,
        score: Callable[[nn.Module], Mapping[str, float]],
    ) -> None:
        self.folder, self.every, self.last, self.metric, self.score = folder, every, last, metric, score
        folder.truncate(ROWS, start)
        self.rows: list[dict[str, Any]] = folder.peers.from_main(read_rows(folder.path / ROWS))

    def due(self, step: int) -> bool:
        """Whether the network after this step must be scored, and has not been."""
        ends = step == self.last or (step > 0 and step % self.every == 0)
        return ends and not any(row["step"] == step for row in self.rows)

    def consider(self, step: int, network: nn.Module) -> None:
        """Score the network after this step."""
        share_buffers(network)
        row = {"step": step, **self.score(network)}
        row.setdefault(self.metric, 0.0)  # without any detection
        if not self.rows or row[self.metric] > best(self.rows, self.metric)["value"]:
            self.folder.write_tensors(TENSORS, network.state_dict())
        self.folder.append(ROWS, row)
        self.rows.append(row)
        log.info("step %d of %d: %s %.1f", step, self.last, self.metric, row[self.metric])

    def restore(self, network: nn.Module) -> None:
        """Load the best network in all processes."""
        with self.folder.peers.together():
            if self.folder.peers.main:
                network.load_state_dict(load_file(self.folder.path / TENSORS))
        for tensor in network.state_dict().values():
            tensor.copy_(broadcast(tensor))
        found = best(self.rows, self.metric)
        log.info("step %d of %d is the best: %s %.1f", found["step"], self.last, self.metric, found["value"])


def best(rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The step with the highest figure, the first of equals, and the figure."""
    row = max(rows, key=lambda row: row[metric])
    return {"step": row["step"], "value": row[metric]}


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Broadcast the main process's statistics; without synchronized batch norm each process has its own."""
    for buffer in network.buffers():
        buffer.copy_(broadcast(buffer))
