"""`clove-hub pretrain RECIPE [section.key=value ...]`, and the same under `accelerate launch -m clove_hub.training`."""

from __future__ import annotations

import argparse

from clove_hub.command import Command

from .recipe import load, shipped_recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"Shipped recipes: {', '.join(shipped_recipes())}.\nExit code 75 means: stopped by SIGTERM or SIGUSR1 after "
        "saving; start the same command again to go on."
    )
    parser.add_argument("recipe", help="the name of a shipped recipe, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as in batch.total=512")


def run(options: argparse.Namespace) -> int:
    recipe = load(options.recipe, options.overrides)
    from .loop import train  # heavy; a wrong recipe is told at once

    return train(recipe)


PRETRAIN = Command("Pre-train a backbone by a recipe.", add_arguments, run, logs=True)
