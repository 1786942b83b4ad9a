"""`python -m clove_hub.evaluation`: the command where `torchrun` needs a module."""

import sys

from clove_hub.command import execute

from .command import EVALUATE

if __name__ == "__main__":
    sys.exit(execute(EVALUATE, sys.argv[1:], "python -m clove_hub.evaluation"))
