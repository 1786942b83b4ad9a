"""`clove-hub export` and `clove-hub convert`: what they do, and what they say."""

from __future__ import annotations

import argparse
from pathlib import Path

from clove_hub.command import Command, user_path
from clove_hub.global_state import kept_generators
from clove_hub.runs import sha256
from clove_hub.weights import SOURCE
from clove_hub.weights.run import find_checkpoint
from clove_hub.zoo.models import find_model
from clove_hub.zoo.resnets import FORMATS

from .bundle import WEIGHTS, from_run, write_bundle
from .convert import SUFFIXES, Converted, convert_source


@kept_generators()
def export_run(
    run: str | Path,
    out: str | Path | None = None,
    checkpoint: int | None = None,
    license: str | None = None,
    name: str | None = None,
) -> Path:
    """Writes the backbone of a run as a bundle, and returns the bundle's folder.

    Args:
        out: the bundle's folder; `bundle` within the run by default.
        checkpoint: the step whose checkpoint to take; the newest whole one by default.
        license: of the weights, as the Hub spells it; without one the card says that none was chosen.
        name: the model of the zoo that the run reproduces, if it does.

    Raises:
        ValueError: as `find_checkpoint`, `find_model`, `from_run` and `write_bundle`.

    Example:
        >>> import clove_hub
        >>> bundle = clove_hub.export_run(folder / "run", license="mit")
        >>> (bundle / "config.json").is_file()  # for timm.create_model(f"local-dir:{bundle}", pretrained=True)
        True
    """
    folder = Path(run).expanduser()
    out = folder / "bundle" if out is None else Path(out).expanduser()
    write_bundle(from_run(find_checkpoint(folder, checkpoint), license, find_model(name) if name else None), out)
    return out


@kept_generators()
def convert(source: str | Path, to: str, out: str | Path) -> Converted:
    """Writes a backbone for another framework.

    Args:
        source: as in `clove_hub.weights.load`.
        to: `detectron2`, `torchvision`, `timm` or `mmseg`.
        out: the file to write.

    Raises:
        ValueError: as `convert_source`.

    Example:
        >>> import clove_hub
        >>> clove_hub.convert(folder / "run", "timm", folder / "backbone.safetensors").architecture
        'test_resnet'
    """
    return convert_source(str(source), to, Path(out).expanduser())


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=user_path, help="the folder that run.output named")
    parser.add_argument("--out", type=user_path, help="the bundle's folder (default: bundle, within the run)")
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="of this step instead of the newest one that is whole"
    )
    parser.add_argument("--license", help="of the weights, as the Hub spells it: mit, apache-2.0, cc-by-nc-4.0, ...")
    parser.add_argument(
        "--as", dest="name", metavar="MODEL", help="the model of the zoo that the run reproduces (`clove-hub models`)"
    )


def run_export(options: argparse.Namespace) -> int:
    out = export_run(options.run, options.out, options.checkpoint, options.license, options.name)
    state, bundle = find_checkpoint(options.run, options.checkpoint), repr(f"local-dir:{out}")
    print(
        f"{out}: {state.backbone}, the {state.exported} of {state.method} after step {state.step} of "
        f"{state.steps_total}. timm loaded it back, bit for bit.\n"
        f"{WEIGHTS} has sha256 {sha256(out / WEIGHTS)}\n\n"
        "    import timm\n\n"
        f"    model = timm.create_model({bundle}, pretrained=True)  # (B, 3, H, W) -> (B, C)\n"
        f"    maps = timm.create_model({bundle}, pretrained=True, features_only=True)  # -> feature maps\n"
    )
    return 0


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    endings = "; ".join(f"{target}: {' or '.join(suffixes)}" for target, suffixes in SUFFIXES.items())
    parser.add_argument(
        "source",
        help=SOURCE,
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the framework")
    parser.add_argument("--out", required=True, type=user_path, help=f"the file to write ({endings})")


def run_convert(options: argparse.Namespace) -> int:
    converted = convert(options.source, options.to, options.out)
    print(f"{converted.path}: {converted.architecture}, {converted.tensors} tensors, each placed, for {options.to}")
    for note in converted.notes:
        print(note)
    if converted.fragment is not None:
        print(f"{converted.fragment}: the settings that belong to it:")
    print(f"\n{converted.how_to_load}")
    return 0


EXPORT = Command("Turn a run into a bundle that timm loads as it is.", export_arguments, run_export)
CONVERT = Command(
    "Turn a backbone into what another framework starts from, values unchanged.", convert_arguments, run_convert
)
