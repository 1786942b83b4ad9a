"""Commands in processes that have imported everything."""

import multiprocessing
import sys

import torch
from patience import PATIENCE

from clove_hub.cli import main


def run_command(*arguments: object) -> int:
    """`clove-hub ARGUMENTS` in a process of its own, in which everything is imported already; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clove_hub.training.loop"])
    process = context.Process(target=call, args=([str(one) for one in arguments],))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode is not None
    return process.exitcode


def call(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.exit(main(arguments))
