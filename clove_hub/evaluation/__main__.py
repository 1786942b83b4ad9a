"""`python -m clove_hub.evaluation`: the command where `torchrun` needs a module."""

import sys

from .command import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main(sys.argv[1:], "python -m clove_hub.evaluation"))
