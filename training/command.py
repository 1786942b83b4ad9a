"""`clove-hub pretrain RECIPE [section.key=value ...]`, and the same under `accelerate launch -m clove_hub.training`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from clove_hub.command import Command
from clove_hub.global_state import kept_generators

from .recipe import describe, load, shipped_recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        f"Shipped recipes: {', '.join(shipped_recipes())}.\n\n"
        "Exit codes: 0 finished; 1 failed; 2 wrong input; 75 saved after SIGTERM, SIGUSR1 or SIGHUP; 130 saved "
        "after Ctrl-C. In each case, the same command resumes from the last saved step."
    )
    parser.add_argument("recipe", help="the name of a shipped recipe, or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the recipe, such as batch.total=512"
    )


def run(options: argparse.Namespace) -> int:
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched:
        recipe = load(options.recipe, options.overrides)
    from .loop import train  # heavy; a wrong recipe is reported before
    from .run.peers import starting
    from .run.stopping import listen

    if launched:
        with starting():
            recipe = load(options.recipe, options.overrides)
    with kept_generators():
        return train(recipe, listen)


def settings(words: Sequence[str]) -> str:
    """Those of the recipe among the words, with its values."""
    named = next((word for word in words if not word.startswith("-") and "=" not in word), None)
    if named is None:
        return "RECIPE --help shows the settings of a recipe."
    return f"settings of {named} (section.key=value):\n\n{describe(named)}"


PRETRAIN = Command("Pre-train a backbone by a recipe.", add_arguments, run, settings, logs=True)
