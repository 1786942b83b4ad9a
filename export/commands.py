"""`clove-hub export` and `clove-hub convert`: what they do, and what they say."""

from __future__ import annotations

from pathlib import Path

from .bundle import WEIGHTS, build_bundle
from .convert import Converted, convert_source
from .runs import find_checkpoint, sha256


def export_run(run: Path, out: Path | None = None, checkpoint: int | None = None, license: str | None = None) -> Path:
    """Writes the backbone of a run as a bundle, says how to load it, and returns the bundle's folder.

    Args:
        out: the bundle's folder; `bundle` within the run by default.
        checkpoint: the step whose checkpoint to take; the newest whole one by default.
        license: of the weights, as the Hub spells it; without one the card says that none was chosen.

    Raises:
        ValueError: as `find_checkpoint` and `build_bundle`.
    """
    found = find_checkpoint(run, checkpoint)
    out = run / "bundle" if out is None else out
    build_bundle(found, out, license)
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
        source: a bundle, a run, `hf-hub:organisation/name[@revision]`, a released checkpoint or a file of
        weights. to: `detectron2`, `torchvision`, `timm` or `mmseg`.

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
