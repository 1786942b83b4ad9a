"""Everything: `python -m benchmarks.all --data PHOTOS [--reference CLONE]`. About eight minutes on a GPU."""

from __future__ import annotations

import gc

from . import end_to_end, pipeline, step
from .setting import arguments, command


def main(given: list[str] | None = None) -> None:
    parser = arguments("all", "Runs pipeline, step and end_to_end, each in its own sizes.", data=True)
    parser.set_defaults(rounds=3)
    options = parser.parse_args(given)
    shared = ["--data", options.data, "--device", options.device, "--rounds", str(options.rounds)]
    shared += ["--results", str(options.results), *options.overrides]
    if options.reference:
        shared += ["--reference", str(options.reference)]
    for benchmark in (pipeline, step, end_to_end):
        benchmark.main(shared)
        gc.collect()  # what the next one needs the memory for


if __name__ == "__main__":
    command(main)
