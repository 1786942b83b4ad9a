"""`clove-hub downstream ENGINE ...`: it names the engines and nothing else; each is imported when it is called."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

ENGINES = {
    "torchvision": (".torchvision_command", "detection, masks, keypoints, segmentation: one folder of data, one GPU"),
    "detectron2": ("..detectron2.command", "the papers' seven tasks, as they ran them; needs Detectron2"),
    "mmseg": ("..mmseg.command", "the papers' three segmentation tasks as config and weights for MMSegmentation"),
}
"""For each engine the module with its `<engine>_main`, and a line of help."""


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
    run: Callable[[list[str], str], int] = getattr(import_module(module, __package__), f"{options.engine}_main")
    return run(options.arguments, f"{program} {options.engine}")
