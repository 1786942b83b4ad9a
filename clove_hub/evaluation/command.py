"""`clove-hub evaluate`: what it does, and what it says."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..weights import SOURCE
from . import PROTOCOLS


def evaluate_main(arguments: list[str], program: str = "clove-hub evaluate") -> int:
    """Runs the command; the exit code is 0, or 2 for input that is refused."""
    width = max(map(len, PROTOCOLS))
    parser = argparse.ArgumentParser(
        prog=program,
        description="Evaluate a backbone by a protocol.",
        epilog="protocols (docs/protocols says more):\n"
        + "\n".join(f"  {name:<{width}}  {text}" for name, text in PROTOCOLS.items())
        + "\n\nover several processes: torchrun --nproc-per-node N -m clove_hub.evaluation PROTOCOL ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("protocol", metavar="PROTOCOL", help="one of those below")
    parser.add_argument(
        "--model",
        required=True,
        metavar="SOURCE",
        help=SOURCE,
    )
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="the folder that the protocol reads")
    parser.add_argument("--json", type=Path, metavar="OUT", help="the file to write the result to")
    parser.add_argument("--seed", type=int, default=0, help="from which all that is random follows (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings of the protocol, such as levels=[-1,-2]"
    )
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        evaluate(
            options.protocol,
            options.model,
            options.data,
            parse_settings(options.settings),
            options.seed,
            options.json,
            options.device,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(
    protocol: str,
    source: str,
    data: Path,
    settings: Mapping[str, Any],
    seed: int = 0,
    out: Path | None = None,
    device: str | None = None,
) -> None:
    """Loads the backbone, runs the protocol, prints the metrics, and writes the record to `out`.

    Raises:
        ValueError: as `load_backbone` and `run_protocol`.
    """
    from ..weights import load_backbone
    from .processes import world
    from .result import check_writable, notes, write
    from .run import make_settings, run_protocol

    make_settings(protocol, settings)  # a wrong one should be said before the model is fetched
    if out is not None:
        check_writable(out)
    with process_group(device) as place:
        backbone = load_backbone(source, seed=seed)
        record = run_protocol(
            protocol,
            backbone.model.to(place),
            backbone.preprocessing,
            data,
            settings,
            seed,
            backbone.name,
            model_args=backbone.weights.model_args if backbone.weights else None,
        )
        if world()[0] == 0:
            for name, value in record.metrics.items():
                deviation = f" ± {record.deviations[name]:.2f}" if name in record.deviations else ""
                print(f"{name:<16}{value:7.2f}{deviation}")
            print(f"{record.model}, {record.protocol} v{record.version}, {record.data.samples} samples")
            for note in notes(record):
                print(note)
            if out is not None:
                write(record, out)
                print(f"-> {out}")


def parse_settings(given: list[str]) -> dict[str, Any]:
    """`["top_k=5", "levels=[-1, -2]"]` -> `{"top_k": 5, "levels": [-1, -2]}`; values are read as YAML.

    Raises:
        ValueError: one is not of the form key=value.
    """
    settings = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"{item!r} is not a setting; expected key=value")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value in {item!r} cannot be read: {error}") from error
    return settings


@contextmanager
def process_group(device: str | None) -> Iterator[str]:
    """The device of this process, which joins the others where `torchrun` or `accelerate launch` started several."""
    import torch
    from torch import distributed as dist

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from error
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield str(place)
        return
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield str(place)
    finally:
        dist.destroy_process_group()
