"""`clove-hub downstream mmseg TASK --backbone SOURCE --out DIR`: config and weights for MMSegmentation's own command."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from clove_hub.command import Command, user_path
from clove_hub.weights import SOURCE, Weights, load

from ..convert import FRAGMENT_MARK, mmseg_settings, write_converted

TASKS = {
    "voc12aug": "VOC 2012, train and aug -> val: 513 pixels, 30k iterations, learning rate 0.003",
    "cityscapes": "Cityscapes, train -> val: 769 pixels, 90k iterations, learning rate 0.01",
    "ade20k": "ADE20K, train -> val: 512 pixels, 80k iterations, learning rate 0.01",
}
SHARED = "fcn"
"""What the protocols have in common."""
CONFIGS = "https://mmsegmentation.readthedocs.io/en/latest/get_started.html"


@dataclass(frozen=True)
class Written:
    config: Path
    """What MMSegmentation is started with."""
    weights: Path
    notes: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, TASKS))
    parser.epilog = "tasks:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in TASKS.items())
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of those below")
    parser.add_argument("--backbone", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument("--out", required=True, type=user_path, metavar="DIR", help="the folder to write")


def run(options: argparse.Namespace) -> int:
    backbone = load(options.backbone)
    written = write_protocol(options.task, backbone, options.out)
    print(f"{written.weights}: {backbone.architecture} of {backbone.what}, every tensor in its place")
    for note in written.notes:
        print(f"note: {note}")
    print(
        f"{written.config}: {TASKS[options.task]}\n\n"
        f"With MMSegmentation 1.x ({CONFIGS}), where its data/ is, on 4 GPUs with 4 images each:\n\n"
        f"    mim train mmsegmentation {written.config} --launcher pytorch --gpus 4"
    )
    return 0


MMSEG = Command(
    "FCN on a backbone, as SlotCon's paper fine-tunes it: writes what MMSegmentation 1.x runs.", add_arguments, run
)


def write_protocol(task: str, backbone: Weights, out: Path) -> Written:
    """Writes the protocol's config, ours on top of it with what the backbone needs, and the weights.

    Raises:
        ValueError: MMSegmentation has no such network, or a file cannot be written or is not ours to replace.
    """
    backbone.resnet("MMSegmentation")
    config = out / f"{task}.py"
    if config.exists() and not config.read_text(encoding="utf-8").startswith(FRAGMENT_MARK):
        raise ValueError(f"{config} exists and was not written here: choose another --out")
    weights = out / "backbone.pth"
    text = settings(task, backbone, weights)
    converted = write_converted(backbone, "mmseg", weights)
    protocols = files(__package__).joinpath("protocols")
    for name in (SHARED, task):
        folder = out / "protocols"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(
            protocols.joinpath(f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8"
        )
    config.write_text(text, encoding="utf-8")
    return Written(config, converted.path, (*backbone.notes,))


def settings(task: str, backbone: Weights, weights: Path) -> str:
    """The config that is run: what the backbone needs, on top of the protocol.

    Raises:
        ValueError: MMSegmentation has no such network.
    """
    needed = mmseg_settings(backbone.architecture, backbone.preprocessing, weights)
    file = json.dumps(str(weights.resolve()), ensure_ascii=False)
    return f"""{FRAGMENT_MARK}: {task} on {backbone.architecture}.
_base_ = ["./protocols/{task}.py"]
{needed}model["decode_head"] = dict(in_channels={backbone.resnet("MMSegmentation").channels})
# MMEngine only logs what it cannot place; this stops a training that would start from something else.
# Both lines need clove-hub where MMSegmentation runs.
custom_imports = dict(imports=["clove_hub.export.mmseg.strict"], allow_failed_imports=False)
custom_hooks = [dict(type="RequireBackbone", file={file})]
"""
