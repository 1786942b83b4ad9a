"""Any method in a size that trains in seconds, and commands in processes that have imported everything."""

import dataclasses
import multiprocessing
import sys

import torch
from patience import PATIENCE

from clove_hub.cli import main
from clove_hub.methods import METHODS

# Sizes that make any method small; each takes those that it has.
SIZES = {
    "global_size": 64,
    "local_size": 32,
    "local_views": 2,
    "projector_hidden": 32,
    "feature_dim": 16,
    "attention_heads": 2,
    "hard_negatives": 3,
    "queue": 500,
    "prototypes": 8,
}


RUN = {
    "backbone.model": "test_resnet",
    "batch.total": 8,
    "batch.per_device": 8,
    "data.workers": 0,
    "schedule.steps": 4,
    "schedule.warmup_epochs": 0,
    "run.precision": "fp32",
    "run.log_every": 1,
    "run.save_every": 2,
    "run.keep": 9,
}


def small(name: str, **changes: object) -> list[str]:
    """Overrides that make a run of the method small: `section__key=value` comes on top."""
    known = {field.name for field in dataclasses.fields(METHODS[name].settings)}
    settings = {f"method.{key}": value for key, value in SIZES.items() if key in known} | RUN
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items()]


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
