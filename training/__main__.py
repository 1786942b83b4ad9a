"""The entry point of `accelerate launch -m clove_hub.training RECIPE [section.key=value ...]`."""

import sys

from clove_hub.command import execute

from .command import PRETRAIN

if __name__ == "__main__":
    sys.exit(execute(PRETRAIN, sys.argv[1:], "python -m clove_hub.training"))
