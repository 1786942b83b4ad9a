"""The command line: it names the commands and nothing else; each is imported when it is called."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import TextIO

COMMANDS = {
    "pretrain": ("clove_hub.training.__main__", "pre-train a backbone by a recipe, on one device"),
    "methods": ("clove_hub.methods.listing", "what each method is, what it costs and which recipes there are"),
    "models": ("clove_hub.zoo.listing", "the models of the zoo, and where their weights are"),
    "demo": ("clove_hub.demo", "the whole road in a few minutes, on a handful of photos"),
    "export": ("clove_hub.export.commands", "turn a run into a bundle that timm loads"),
    "publish": ("clove_hub.export.publish", "put a bundle on the Hub, or tell what that would do"),
    "adopt": ("clove_hub.export.adopt", "turn a checkpoint that a paper's authors released into a bundle"),
    "inspect": ("clove_hub.export.inspect", "say what a file of weights is, without running or writing anything"),
    "evaluate": ("clove_hub.evaluation.command", "measure a backbone without fine-tuning it, by a named protocol"),
    "figures": ("clove_hub.figures.command", "draw what a run did and what a backbone has learned"),
    "downstream": ("clove_hub.cli", "fine-tune a backbone on detection, masks, keypoints, segmentation"),
    "results": ("clove_hub.export.results", "collect results into one table, or into a bundle's card"),
    "convert": ("clove_hub.export.commands", "turn a backbone into what another library reads"),
}

ENGINES = {
    "torchvision": (
        "clove_hub.training.finetune.command",
        "detection, masks, keypoints, segmentation: one folder of data, one GPU",
    ),
    "detectron2": (
        "clove_hub.export.detectron2.command",
        "the papers' seven tasks, as they ran them; needs Detectron2",
    ),
    "mmseg": (
        "clove_hub.export.mmseg.command",
        "the papers' three segmentation tasks as config and weights for MMSegmentation",
    ),
}
"""For each engine the module with its `<engine>_main`, and a line of help."""


def main(arguments: list[str] | None = None) -> int:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="clove-hub",
        description="Self-supervised backbones for dense prediction: pre-train, publish, find, fine-tune.",
        epilog="commands:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clove-hub {version('clove-hub')}")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="one of those below; COMMAND --help says more"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own arguments")
    options = parser.parse_args(arguments)
    module, _ = COMMANDS[options.command]
    # By name: this room does not know the ones that it opens, and --help stays fast.
    run: Callable[[list[str], str], int] = getattr(import_module(module), f"{options.command}_main")
    try:
        code = run(options.arguments, f"clove-hub {options.command}")
        sys.stdout.flush()
    except BrokenPipeError:
        if not nobody_reads(sys.stdout):
            raise
        return 128 + signal.SIGPIPE
    return code


def downstream_main(arguments: list[str], program: str = "clove-hub downstream") -> int:
    """Runs an engine's command; the exit code is its own."""
    width = max(map(len, ENGINES))
    parser = argparse.ArgumentParser(
        prog=program,
        description="Fine-tune a backbone on a task, score it, and write results.json.",
        epilog="engines:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in ENGINES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", choices=ENGINES, metavar="ENGINE", help="one of those below; ENGINE --help says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the engine's own arguments")
    options = parser.parse_args(arguments)
    module, _ = ENGINES[options.engine]
    run: Callable[[list[str], str], int] = getattr(import_module(module), f"{options.engine}_main")
    return run(options.arguments, f"{program} {options.engine}")


def nobody_reads(stream: TextIO) -> bool:
    """Whether it is a pipe whose other end is closed, as that of `clove-hub models | head` is; the rest is dropped."""
    pipe = select.poll()
    pipe.register(stream, 0)
    closed = any(event & select.POLLERR for _, event in pipe.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python complains when it flushes at the end
    return closed


if __name__ == "__main__":
    sys.exit(main())
