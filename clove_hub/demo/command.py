"""Photos -> pre-training -> bundle -> timm and Detectron2 -> a detector that finds coins, and a page that shows it all.

It starts the commands as separate processes, so that it shows what they really do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm

from clove_hub.command import Command, require_installed, user_path
from clove_hub.data.finder import some_images
from clove_hub.processes import die_with_parent
from clove_hub.runs import read_rows

from .coins import write_coins
from .page import Demo, Typed, page

# The photographs, not the test charts, among the pictures that scikit-image installs.
SCIKIT_IMAGE = """
astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png gravel.png
hubble_deep_field.jpg moon.png motorcycle_left.png motorcycle_right.png retina.jpg rocket.jpg
"""
SHOWN = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
DETECTOR = (
    *("images.shortest_edge=192", "images.longest_edge=416", "network.rois=64", "network.proposals=200"),
    *("optimizer.name=adamw", "optimizer.learning_rate=5e-4", "batch.total=4", "schedule.steps=30"),
    *("run.precision=fp32", "data.workers=0"),
)
"""Enough for round things on a dark ground: a minute on two cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=user_path, default=Path("runs/demo"), help="the folder for all output")
    parser.add_argument("--data", type=user_path, help="a folder of your own photos instead of scikit-image's")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def run(options: argparse.Namespace) -> int:
    """Write everything below --out, and the page that shows it.

    Raises:
        ValueError: --data holds no photos, or what the demo needs is not installed.
        SystemExit: one of the commands ended with this exit code, and has printed why.
    """
    require_installed(("skimage", "pycocotools", "torchvision"), "demo")
    began, out = time.monotonic(), options.out
    run, bundle, detectron2, detector = (
        out / "run",
        out / "bundle",
        out / "detectron2" / "backbone.pth",
        out / "detector",
    )
    folder = options.data or example_photos(out / "photos")
    photos = some_images(folder).paths
    shown = [str(photo) for photo in photos if photo.name in SHOWN] or [str(photo) for photo in photos[:5]]
    one = shown[min(1, len(shown) - 1)]
    unseen = write_coins(out / "coins")
    detectron2.parent.mkdir(parents=True, exist_ok=True)
    typed: list[Typed] = []

    def type_in(*words: str | Path) -> None:
        command = [str(word) for word in words]
        print(f"\n$ clove-hub {shlex.join(command)}", flush=True)
        start = time.monotonic()
        if code := started([sys.executable, "-m", "clove_hub.cli", *command]):
            raise SystemExit(code)
        typed.append(Typed(command, time.monotonic() - start))

    type_in("pretrain", "demo", f"data.path={folder}", f"run.output={run}", *options.overrides)
    type_in("export", run, "--out", bundle)
    architecture = json.loads((bundle / "config.json").read_text())["architecture"]
    random = f"random:{architecture}"
    for name, model in (("random", random), ("pretrained", bundle)):
        type_in("evaluate", "correspond", "--model", model, "--data", folder, "--json", out / f"{name}.json")
    type_in("figures", "curves", run, "--out", out / "curves.png")
    names = ["--names", "random weights", "pre-trained"]
    type_in(
        *("figures", "compare", "--model", random, "--model", bundle, *names, "--data", *shown[:3]),
        *("--out", out / "compare.png"),
    )
    type_in("figures", "matches", run, "--data", one, "--out", out / "matches.png")
    type_in("figures", "attention", run, "--data", one, "--out", out / "attention.png")
    type_in("convert", bundle, "--to", "detectron2", "--out", detectron2)
    type_in(
        *("downstream", "torchvision", "detection", "--backbone", bundle, "--data", out / "coins", "--out", detector),
        *DETECTOR,
    )
    type_in("predict", detector, unseen, "--out", out / "found")

    print(f"\n>>> timm.create_model('local-dir:{bundle}', pretrained=True)", flush=True)
    model = timm.create_model(f"local-dir:{bundle}", pretrained=True).eval()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e6:.1f} M parameters, {model.num_features} features")

    figures = {name: json.loads((out / f"{name}.json").read_text())["metrics"] for name in ("random", "pretrained")}
    made = Demo(
        rows=read_rows(run / "metrics.jsonl"),
        correspond=(figures["random"]["correspond"], figures["pretrained"]["correspond"]),
        found=sum(row["score"] >= 0.5 for row in json.loads((out / "found" / "coco_results.json").read_text())),
        picture=next((out / "found" / "pictures").iterdir()).relative_to(out),
        typed=typed,
        folders=[path.relative_to(out) for path in (run, bundle, detectron2.parent, detector)],
        bundle=bundle,
        seconds=time.monotonic() - began,
    )
    (out / "index.html").write_text(page(made))
    print(f"\nOpen {out / 'index.html'} in a browser")
    return 0


DEMO = Command(__doc__, add_arguments, run)


def started(command: Sequence[str]) -> int:
    """Run a command in a process that ends with this one, and return its exit code.

    Ctrl-C in a terminal reaches both: the command saves what it has to before it ends.
    """
    process = subprocess.Popen(command, preexec_fn=partial(die_with_parent, signal.SIGTERM, os.getpid()))
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def example_photos(folder: Path) -> Path:
    """Copy the photographs that come with scikit-image into a folder, as a user would have them."""
    import skimage

    folder.mkdir(parents=True, exist_ok=True)
    for name in SCIKIT_IMAGE.split():
        if (photo := Path(skimage.__file__).parent / "data" / name).is_file():
            (folder / name).write_bytes(photo.read_bytes())
    return folder
