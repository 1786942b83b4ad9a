"""`clove-hub downstream mmseg TASK --backbone SOURCE --out DIR`: config and weights for MMSegmentation's own command."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path

from clove_hub.command import Command, user_path
from clove_hub.evaluation.result import write_text
from clove_hub.weights import SOURCE, Weights, load

from ..convert import FRAGMENT_MARK, mmseg_settings, write_converted

TASKS = {
    "voc12aug": "VOC 2012, train and aug -> val: 513 pixels, 30k iterations, learning rate 0.003",
    "cityscapes": "Cityscapes, train -> val: 769 pixels, 90k iterations, learning rate 0.01",
    "ade20k": "ADE20K, train -> val: 512 pixels, 80k iterations, learning rate 0.01",
}
CONFIGS = "https://mmsegmentation.readthedocs.io/en/latest/get_started.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    width = max(map(len, TASKS))
    parser.epilog = "tasks:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in TASKS.items())
    parser.add_argument("task", choices=TASKS, metavar="TASK", help="one of those below")
    parser.add_argument("--backbone", required=True, metavar="SOURCE", help=SOURCE)
    parser.add_argument("--out", required=True, type=user_path, metavar="DIR", help="the folder to write")


def run(options: argparse.Namespace) -> int:
    backbone = load(options.backbone)
    config, weights = write_protocol(options.task, backbone, options.out)
    print(f"{weights}: {backbone.architecture} of {backbone.what}, every tensor in its place")
    for note in backbone.notes:
        print(f"note: {note}")
    print(
        f"{config}: {TASKS[options.task]}\n\n"
        f"With MMSegmentation 1.x ({CONFIGS}), where its data/ is, on 4 GPUs with 4 images each:\n\n"
        f"    mim train mmsegmentation {config} --launcher pytorch --gpus 4"
    )
    return 0


MMSEG = Command(
    "FCN on a backbone, as SlotCon's paper fine-tunes it: writes what MMSegmentation 1.x runs.", add_arguments, run
)


def write_protocol(task: str, backbone: Weights, out: Path) -> tuple[Path, Path]:
    """Writes the protocol's config, ours on top of it with what the backbone needs, and the weights.

    Returns:
        The config that MMSegmentation is started with, and the weights.

    Raises:
        ValueError: MMSegmentation has no such network, or a file cannot be written or is not ours to replace.
    """
    network = backbone.resnet("MMSegmentation")
    config, weights = out / f"{task}.py", out / "backbone.pth"
    if config.exists() and not config.read_text(encoding="utf-8").startswith(FRAGMENT_MARK):
        raise ValueError(f"{config} exists and was not written here: choose another --out")
    file = json.dumps(str(weights.resolve()), ensure_ascii=False)
    text = f"""{FRAGMENT_MARK}: {task} on {backbone.architecture}.
_base_ = ["./protocols/{task}.py"]
{mmseg_settings(backbone.architecture, backbone.preprocessing, weights)}\
model["decode_head"] = dict(in_channels={network.channels})
# MMEngine only logs what it cannot place; this stops a training that would start from something else.
# Both lines need clove-hub where MMSegmentation runs.
custom_imports = dict(imports=["clove_hub.export.mmseg.strict"], allow_failed_imports=False)
custom_hooks = [dict(type="RequireBackbone", file={file})]
"""
    write_converted(backbone, "mmseg", weights)
    for name in ("fcn", task):
        protocol = files(__package__).joinpath(f"protocols/{name}.py").read_text(encoding="utf-8")
        write_text(out / "protocols" / f"{name}.py", protocol)
    write_text(config, text)
    return config, weights
