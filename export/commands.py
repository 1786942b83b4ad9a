"""`clove-hub export` and `clove-hub convert`: what they do, and what they say."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from clove_hub.runs import sha256
from clove_hub.weights import SOURCE
from clove_hub.weights.run import find_checkpoint
from clove_hub.zoo.formats import FORMATS
from clove_hub.zoo.models import find_model

from .bundle import WEIGHTS, from_run, write_bundle
from .convert import SUFFIXES, Converted, convert_source


def export_run(
    run: Path,
    out: Path | None = None,
    checkpoint: int | None = None,
    license: str | None = None,
    name: str | None = None,
) -> Path:
    """Writes the backbone of a run as a bundle, says how to load it, and returns the bundle's folder.

    Args:
        out: the bundle's folder; `bundle` within the run by default.
        checkpoint: the step whose checkpoint to take; the newest whole one by default.
        license: of the weights, as the Hub spells it; without one the card says that none was chosen.
        name: the model of the zoo that the run reproduces, if it does.

    Raises:
        ValueError: as `find_checkpoint`, `find_model`, `from_run` and `write_bundle`.
    """
    found = find_checkpoint(run, checkpoint)
    out = run / "bundle" if out is None else out
    write_bundle(from_run(found, license, find_model(name) if name else None), out)
    state = found.state
    bundle = repr(f"local-dir:{out}")
    print(
        f"{out}: {state.backbone}, the {state.exported} of {state.method} after step {state.step} of "
        f"{state.steps_total}. timm loaded it back, bit for bit.\n"
        f"{WEIGHTS} has sha256 {sha256(out / WEIGHTS)}\n\n"
        "    import timm\n\n"
        f"    model = timm.create_model({bundle}, pretrained=True)  # (B, 3, H, W) -> (B, C)\n"
        f"    maps = timm.create_model({bundle}, pretrained=True, features_only=True)  # -> feature maps\n"
    )
    return out


def convert(source: str, to: str, out: Path) -> Converted:
    """Writes a backbone for another framework, and says what was written and how to load it.

    Args:
        source: as in `clove_hub.weights.load`.
        to: `detectron2`, `torchvision`, `timm` or `mmseg`.

    Raises:
        ValueError: as `convert_source`.
    """
    converted = convert_source(source, to, out)
    print(f"{converted.path}: {converted.architecture}, {converted.tensors} tensors, each placed, for {to}")
    for note in converted.notes:
        print(note)
    if converted.fragment is not None:
        print(f"{converted.fragment}: the settings that belong to it:")
    print(f"\n{converted.how_to_load}")
    return converted


def export_main(arguments: list[str], program: str = "clove-hub export") -> int:
    """Runs the command; the exit code is 0, or 2 for input that is refused."""
    parser = argparse.ArgumentParser(prog=program, description="Turn a run into a bundle that timm loads as it is.")
    parser.add_argument("run", type=Path, help="the folder that run.output named")
    parser.add_argument("--out", type=Path, help="the bundle's folder (default: bundle, within the run)")
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="of this step instead of the newest one that is whole"
    )
    parser.add_argument("--license", help="of the weights, as the Hub spells it: mit, apache-2.0, cc-by-nc-4.0, ...")
    parser.add_argument(
        "--as", dest="name", metavar="MODEL", help="the model of the zoo that the run reproduces (`clove-hub models`)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        export_run(options.run, options.out, options.checkpoint, options.license, options.name)
    except ValueError as error:
        return _refuse(error)
    return 0


def convert_main(arguments: list[str], program: str = "clove-hub convert") -> int:
    """Runs the command; the exit code is 0, or 2 for input that is refused."""
    endings = "; ".join(f"{target}: {' or '.join(suffixes)}" for target, suffixes in SUFFIXES.items())
    parser = argparse.ArgumentParser(
        prog=program, description="Turn a backbone into what another framework starts from, values unchanged."
    )
    parser.add_argument(
        "source",
        help=SOURCE,
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the framework")
    parser.add_argument("--out", required=True, type=Path, help=f"the file to write ({endings})")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        convert(options.source, options.to, options.out)
    except ValueError as error:
        return _refuse(error)
    return 0


def _refuse(error: ValueError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
