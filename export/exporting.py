"""`clove-hub export`: a bundle of a run, or the folder of a fine-tuned model."""

from __future__ import annotations

import argparse
from pathlib import Path

from clove_hub.command import Command, user_path
from clove_hub.global_state import kept_generators
from clove_hub.runs import sha256
from clove_hub.weights.finetuned import is_finetuned
from clove_hub.weights.run import find_checkpoint
from clove_hub.zoo.models import find_model

from .bundle import write_bundle
from .card_files import WEIGHTS
from .contents import from_run
from .finetuned import export_finetuned
from .license import add_license_arguments


@kept_generators()
def export_run(
    run: str | Path,
    out: str | Path | None = None,
    checkpoint: int | None = None,
    license: str | None = None,
    name: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> Path:
    """Write the backbone of a run as a bundle, or the model of a fine-tuning; return the bundle's folder.

    Args:
        run: the run's folder.
        out: the bundle's folder; `bundle` within the run by default.
        checkpoint: the step whose checkpoint to export; the newest valid one by default.
        license: license of the weights, by its id on the Hub; without one, the card says that none was chosen.
        name: the model of the zoo that the run reproduces, if it does.
        license_name: with the license `other`: a short name, such as `my-license-1.0`.
        license_link: with the license `other`: the URL of its text.

    Raises:
        ValueError: as `find_checkpoint`, `find_model`, `from_run` and `write_bundle`.

    Examples:
        >>> import clove_hub
        >>> bundle = clove_hub.export_run(folder / "run", license="mit")
        >>> (bundle / "config.json").is_file()  # for timm.create_model(f"local-dir:{bundle}", pretrained=True)
        True
    """
    folder = Path(run).expanduser()
    out = folder / "bundle" if out is None else Path(out).expanduser()
    if is_finetuned(folder):
        if checkpoint is not None or name is not None:
            raise ValueError(
                f"{folder} is a fine-tuning run, whose final network is exported: leave out --checkpoint and --as"
            )
        export_finetuned(folder, out, license, license_name, license_link)
        return out
    model = find_model(name) if name else None
    write_bundle(from_run(find_checkpoint(folder, checkpoint), license, model, license_name, license_link), out)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=user_path, help="the run's folder (run.output)")
    parser.add_argument("--out", type=user_path, help="the bundle's folder (default: bundle, within the run)")
    step, model = (
        "export this step instead of the newest valid checkpoint",
        "the model of the zoo that the run reproduces",
    )
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help=step)
    add_license_arguments(
        parser, "license of the weights, by its id on the Hub: mit, apache-2.0, cc-by-nc-4.0, other, ..."
    )
    parser.add_argument("--as", dest="name", metavar="MODEL", help=f"{model} (`clove-hub models`)")


def run(options: argparse.Namespace) -> int:
    license = options.license, options.license_name, options.license_link
    out = export_run(options.run, options.out, options.checkpoint, license[0], options.name, *license[1:])
    if is_finetuned(options.run):
        print(
            f"{out}: the fine-tuned model; clove-hub loaded it back, bit for bit.\n\n    clove-hub predict {out} PHOTOS --out DIR\n"
        )
        return 0
    state, bundle = find_checkpoint(options.run, options.checkpoint), repr(f"local-dir:{out}")
    print(
        f"{out}: {state.backbone}, the {state.exported} of {state.method} after step {state.step} of "
        f"{state.steps_total}. timm loaded it back, bit for bit.\n"
        f"{WEIGHTS} has sha256 {sha256(out / WEIGHTS)}\n\n"
        "    import timm\n\n"
        f"    model = timm.create_model({bundle}, pretrained=True)  # (B, {state.model_args.get('in_chans', 3)}, H, W) -> (B, C)\n"
        f"    maps = timm.create_model({bundle}, pretrained=True, features_only=True)  # -> feature maps\n"
    )
    return 0


EXPORT = Command(
    "Turn a run into a bundle that timm loads as it is, or a fine-tuning into a model that `predict` loads.",
    add_arguments,
    run,
)
