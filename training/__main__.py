"""`accelerate launch -m clove_hub.training RECIPE [section.key=value ...]`"""

from __future__ import annotations

import argparse
import os
import sys

from .recipe import load, shipped_recipes


def pretrain_main(arguments: list[str] | None = None, program: str = "python -m clove_hub.training") -> int:
    """Runs a recipe; the exit code is 0 (finished), 75 (stopped by a signal, saved), 1 (failed) or 2 (wrong input)."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Pre-train a backbone by a recipe.",
        epilog=f"Shipped recipes: {', '.join(shipped_recipes())}. Exit code 75 means: stopped by SIGTERM or SIGUSR1 after "
        "saving; start the same command again to go on.",
    )
    parser.add_argument("recipe", help="the name of a shipped recipe, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as in batch.total=512")
    options = parser.parse_args(arguments)
    try:
        recipe = load(options.recipe, options.overrides)
        from .loop import train  # heavy; a wrong recipe is told at once

        return train(recipe)
    except (ValueError, FloatingPointError) as error:
        if int(os.environ.get("RANK", "0")) == 0:  # once, not once for each process
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(pretrain_main())
