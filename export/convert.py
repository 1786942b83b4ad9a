"""`clove-hub convert`: write a backbone as a file that another framework trains from or runs, with its settings."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pprint
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import clove_hub
from clove_hub.command import Command, user_path
from clove_hub.global_state import kept_generators
from clove_hub.weights import SOURCE, Preprocessing, Weights, load
from clove_hub.weights.finetuned import find_finetuned
from clove_hub.weights.hub import HUB
from clove_hub.weights.source import LOCAL
from clove_hub.weights.transformers import MODELS, require_transformers, write_model
from clove_hub.zoo.resnets import FORMATS, RESNETS, Format, rename

from .container import container, copied
from .detectron2.base import find_base, require_held_by, require_place
from .detectron2.settings import MARK, Base, as_lazy, as_yaml, of_255
from .detectron2.verify import placed_names
from .onnx import require_packages, to_onnx
from .onnx_detector import to_onnx_detector

Target = Format | Literal["onnx", "transformers"]
TARGETS: tuple[Target, ...] = (*FORMATS, "onnx", "transformers")
FRAGMENT_MARK = MARK
SUFFIXES: dict[Target, tuple[str, ...]] = {
    "timm": (".safetensors",),
    "torchvision": (".pth", ".safetensors"),
    "mmseg": (".pth",),
    "detectron2": (".pth", ".pkl"),
    "onnx": (".onnx",),
}
"""File suffixes by target; transformers' output is a folder."""
FRAGMENTS: dict[Target, tuple[str, ...]] = {"detectron2": (".yaml", ".py"), "mmseg": (".py",)}
"""Frameworks that need settings beside the weights, and the suffixes of their config files."""


@dataclass(frozen=True)
class Converted:
    """The output of a conversion."""

    path: Path
    architecture: str
    tensors: int
    fragment: Path | None
    """The file with the settings that the framework needs; None if it needs none. For Detectron2 a second file, with
    the suffix .py, has the same settings for LazyConfig."""
    how_to_load: str
    """Those settings; if none are needed, the Python code that loads the file."""
    notes: tuple[str, ...]
    """What was left out or assumed, in sentences."""


@kept_generators()
def convert(
    source: str | Path,
    to: str,
    out: str | Path,
    *,
    model: str | None = None,
    base: str | None = None,
    weights: str | None = None,
) -> Converted:
    """Write a backbone for another framework, with its settings beside it, or a fine-tuned model as ONNX.

    The output is reproducible byte for byte.

    Values and types are unchanged; only names change. An ONNX file computes in float32, and is compared with torch
    before it replaces an older file (`clove_hub.export.onnx`).

    Args:
        source: as in `clove_hub.weights.load`; for ONNX also a fine-tuned model, as in `clove_hub.load_detector`.
        to: `detectron2`, `torchvision`, `timm`, `mmseg`, `onnx` or `transformers`.
        out: the file to write; its suffix selects the container if there is a choice (`.pkl` holds numpy arrays).
            For transformers the folder to write, which must be new or empty.
        model: for transformers, the kind of model to put the backbone into: `detr`, `rt_detr_v2`, `d_fine`,
            `mask2former` or `upernet`.
        base: for Detectron2, a config file or the name of one in its model zoo, which the settings extend; the detector
            is then built, and compared with timm.
        weights: for Detectron2, the path of the file in the settings if it will be stored elsewhere; a relative path
            starts from Detectron2's working directory.

    Raises:
        ValueError: the source is refused (`load`), the framework has no such network, `out` cannot be
            written, or as `to_onnx` and `write_model`.

    Examples:
        >>> import clove_hub
        >>> clove_hub.convert(folder / "run", "timm", folder / "backbone.safetensors").architecture
        'test_resnet'
    """
    out = Path(out).expanduser()
    target, _ = _target(to, out, model, str(source))  # before anything is read
    if to != "detectron2" and (base or weights):
        raise ValueError(f"--base and --weights need --to detectron2: leave them out for {to}")
    if _could_be_finetuned(str(source)) and find_finetuned(source):
        return _write_detector(source, target, out)
    below = find_base(base) if base else None
    return write_converted(load(str(source)), to, out, model, below, weights)


def write_converted(
    loaded: Weights,
    to: str,
    out: Path,
    model: str | None = None,
    base: Base | None = None,
    weights: str | None = None,
) -> Converted:
    """As `convert`, for a backbone that is already loaded."""
    target, fragments = _target(to, out, model)
    if target == "transformers":
        assert model is not None  # ensured by _target
        return _write_folder(loaded, model, out)
    if target == "onnx":
        return _write_onnx(loaded, out)
    if target == "detectron2":
        return _write_detectron2(loaded, out, base, weights)
    tensors = copied(loaded.tensors)
    if target != "timm":
        loaded.resnet(target)
        tensors = rename(tensors, "timm", target, f"{loaded.what} ({loaded.architecture})")
    how_to_load = _how_to_load(target, loaded, out)
    _replace(out, container(target, out.suffix, tensors))
    for fragment in fragments:
        _replace(fragment, how_to_load.encode())
    return Converted(
        out, loaded.architecture, len(tensors), fragments[0] if fragments else None, how_to_load, loaded.notes
    )


def _write_detectron2(loaded: Weights, out: Path, base: Base | None, weights: str | None) -> Converted:
    """Write the weights and two config files; with a base, all three are tested in a temporary folder first."""
    if len(loaded.preprocessing.mean) != 3:
        raise ValueError(
            f"{loaded.what} takes images of {len(loaded.preprocessing.mean)} bands, but Detectron2 reads only color images: "
            "give a backbone with three bands"
        )
    tensors, notes = copied(placed_names(loaded)), loaded.notes
    if loaded.plain_resnet is None:
        notes += (
            f"Detectron2 has no {loaded.architecture} of its own: the config uses timm's, which needs clove-hub where it runs.",
        )
    if base is not None:
        require_place(base, loaded)
    below, under = (None if base is None or base.lazy is not lazy else base for lazy in (False, True))
    yaml = as_yaml(loaded, weights or str(out.resolve()), out, below)
    files = {
        out.name: container("detectron2", out.suffix, tensors),
        out.with_suffix(".yaml").name: yaml.encode(),
        out.with_suffix(".py").name: as_lazy(loaded, weights, out, under).encode(),
    }
    if base is not None:
        trial = out.with_name(f".{out.name}.{os.getpid()}.trial")
        try:
            for name, content in files.items():
                _replace(trial / name, content)
            difference = require_held_by(base, loaded, trial, out.name)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        notes += (
            f"The detector of {base.path.name} was built: it holds every tensor, and its feature maps differ from timm's by "
            f"{difference:.1g} at most.",
        )
    for name, content in files.items():
        _replace(out.with_name(name), content)
    fragment = out.with_suffix(".py" if under else ".yaml")
    return Converted(out, loaded.architecture, len(tensors), fragment, files[fragment.name].decode(), notes)


def _write_onnx(loaded: Weights, out: Path) -> Converted:
    file = to_onnx(loaded)
    _replace(out, file.content)
    seen = loaded.preprocessing
    bands = len(seen.mean)
    how_to_load = f"""import numpy
import onnxruntime

session = onnxruntime.InferenceSession({_quoted(str(out))})
image = numpy.zeros(({file.side}, {file.side}, {bands}))  # height, width, {"RGB" if bands == 3 else "bands"}; white is 255
pixels = (image / 255 - {list(seen.mean)}) / {list(seen.std)}
pixels = pixels.transpose(2, 0, 1)[None].astype("float32")
{", ".join(file.outputs)} = session.run(None, {{"pixels": pixels}})
"""
    notes = (*loaded.notes, *file.notes)
    return Converted(out, loaded.architecture, len(loaded.tensors), None, how_to_load, notes)


def _could_be_finetuned(source: str) -> bool:
    """Whether it is a folder or a repository; all other sources hold only a backbone."""
    return source.startswith((HUB, LOCAL)) or Path(source).expanduser().is_dir()


def _write_detector(source: str | Path, target: Target, out: Path) -> Converted:
    """Write a fine-tuned model as an ONNX file.

    Raises:
        ValueError: the target is another framework, or as `to_onnx_detector`.
    """
    if target != "onnx":
        raise ValueError(
            f"{source} is a fine-tuned model, which converts only with --to onnx; --to {target} takes backbones"
        )
    detector = clove_hub.load_detector(source, device="cpu")
    file, stored = to_onnx_detector(detector), detector.stored
    _replace(out, file.content)
    how_to_load = f"""import numpy
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession({_quoted(str(out))})
image = numpy.asarray(Image.open("photo.jpg").convert("RGB"), "float32") / 255
{", ".join(file.outputs)} = session.run(None, {{"image": image.transpose(2, 0, 1)}}){"[0]" if len(file.outputs) == 1 else ""}
"""
    return Converted(out, stored.architecture, len(stored.tensors), None, how_to_load, file.notes)


def _write_folder(loaded: Weights, model: str, out: Path) -> Converted:
    """Write to a temporary folder beside `out`, which is renamed to `out` after it was loaded and compared."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        written = write_model(loaded, model, partial, out)
        partial.replace(out)
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}; give another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(out, loaded.architecture, written.tensors, None, written.how_to_load, written.notes)


def _target(to: str, out: Path, model: str | None, source: str = "") -> tuple[Target, tuple[Path, ...]]:
    """The framework, and its config files if it needs any.

    Raises:
        ValueError: there is no such framework; the file has another one's suffix, is a folder or the source, or would
            overwrite settings written by hand; the folder is not empty; `model` is missing, unknown or unused.
    """
    target = next((name for name in TARGETS if name == to), None)
    if target is None:
        raise ValueError(f"cannot convert to {to!r}: choose one of {', '.join(TARGETS)}")
    if target != "transformers" and model is not None:
        raise ValueError(f"--model {model} needs --to transformers: leave it out for {target}")
    if target == "transformers":
        if model not in MODELS:
            problem = f"--model {model} is unknown" if model else "--to transformers needs --model"
            raise ValueError(f"{problem}: choose one of {', '.join(MODELS)}")
        require_transformers("--to transformers")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"{out} exists and is not an empty folder; give a new folder with --out")
        return target, ()
    if target == "onnx":
        require_packages()
    if out.suffix not in SUFFIXES[target]:
        raise ValueError(f"--out {out}: a file for {target} ends in {' or '.join(SUFFIXES[target])}")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give a file with --out")
    given = Path(source).expanduser()
    if source and out.exists() and given.exists() and out.samefile(given):
        raise ValueError(f"{out} is the source itself; give another --out")
    fragments = tuple(out.with_suffix(suffix) for suffix in FRAGMENTS.get(target, ()))
    for fragment in fragments:
        if fragment.exists() and not fragment.read_bytes().startswith(FRAGMENT_MARK.encode()):
            raise ValueError(f"{fragment} exists and was not written by clove-hub; give another --out than {out.name}")
    return target, fragments


def mmseg_model(architecture: str, seen: Preprocessing, weights: Path) -> dict[str, Any]:
    """MMSegmentation's `model` config for a backbone. Its usual ResNetV1c has another stem: this is `ResNet`.

    Raises:
        ValueError: MMSegmentation has no such network.
    """
    network = RESNETS[architecture]
    if network.groups == 1 and network.width != 64:
        raise ValueError(f"MMSegmentation has no wide ResNet such as {architecture}: choose another backbone")
    kind: dict[str, Any] = {"type": "ResNet", "depth": network.depth}
    if network.groups > 1:
        kind |= {"type": "ResNeXt", "groups": network.groups, "base_width": network.width}
    return {
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "bgr_to_rgb": True,
            "mean": of_255(seen.mean),
            "std": of_255(seen.std),
            "pad_val": 0,
            "seg_pad_val": 255,
        },
        "pretrained": None,
        "backbone": kind
        | {
            "style": "pytorch",
            "frozen_stages": -1,
            "init_cfg": {"type": "Pretrained", "checkpoint": str(weights.resolve())},
        },
    }


def mmseg_settings(architecture: str, seen: Preprocessing, weights: Path) -> str:
    """`mmseg_model` as a Python config.

    Raises:
        ValueError: MMSegmentation has no such network.
    """
    model = mmseg_model(architecture, seen, weights)
    said = f'{FRAGMENT_MARK}. Merge into a config of MMSegmentation that uses ResNet ("r50", not "r50-v1c").\n'
    return said + as_assignments({"data_preprocessor": model["data_preprocessor"], "model": model})


def as_assignments(values: Mapping[str, Any]) -> str:
    """Plain data as Python assignments, the config format of MMEngine."""
    lines = (f"{name} = {pprint.pformat(value, width=110, sort_dicts=False)}\n" for name, value in values.items())
    return "".join(lines)


def _how_to_load(target: Format, loaded: Weights, out: Path) -> str:
    """The settings that belong to the file, or the Python code that loads it."""
    if target == "mmseg":
        return mmseg_settings(loaded.architecture, loaded.preprocessing, out)
    name, file = loaded.architecture, _quoted(str(out))
    if target == "timm":
        more = "".join(f", {key}={value!r}" for key, value in loaded.model_args.items())
        return f'import timm\n\nmodel = timm.create_model("{name}", num_classes=0{more}, checkpoint_path={file})\n'
    module, read = "torch", f"torch.load({file}, weights_only=True)"
    if out.suffix == ".safetensors":
        module, read = "safetensors.torch", f"safetensors.torch.load_file({file})"
    return (
        f"import {module}\nimport torchvision\n\nmodel = torchvision.models.{name}()\n"
        f"model.load_state_dict({read}, strict=False)  # lacks only fc, the classifier\n"
    )


def _replace(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ValueError(f"cannot write {path}: {error.strerror}; give another --out") from error


def _quoted(text: str) -> str:
    """Quote a string so that it is valid in Python, JSON and YAML."""
    return json.dumps(text, ensure_ascii=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    endings = "; ".join(f"{target}: {' or '.join(suffixes)}" for target, suffixes in SUFFIXES.items())
    parser.add_argument("source", help=SOURCE)
    parser.add_argument("--to", required=True, choices=TARGETS, help="the framework")
    parser.add_argument(
        "--out", required=True, type=user_path, help=f"the file to write ({endings}; transformers: a folder)"
    )
    parser.add_argument("--model", choices=MODELS, help="for transformers: the detector or segmenter to put it into")
    parser.add_argument(
        "--base",
        metavar="CONFIG",
        help="for detectron2: a file, or one of its model zoo, to put the settings on top of; the detector is built and compared",
    )
    parser.add_argument(
        "--weights", metavar="PATH", help="for detectron2: what the settings call the file, where it will lie elsewhere"
    )


def run(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ("model", "base", "weights")}
    converted = convert(options.source, options.to, options.out, **given)
    print(f"{converted.path}: {converted.architecture} for {options.to}, {converted.tensors} tensors")
    for note in converted.notes:
        print(note)
    if converted.fragment is not None:
        print(f"{converted.fragment}: the config that loads it:")
    print(f"\n{converted.how_to_load}")
    return 0


CONVERT = Command(
    "Turn a backbone into what another framework starts from or runs, or a fine-tuned model into ONNX.",
    add_arguments,
    run,
)
