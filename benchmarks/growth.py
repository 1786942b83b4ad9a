"""How memory and time of each protocol grow with the images: `python -m benchmarks.growth --streets DIR --clips DIR --coco DIR`.

Each protocol runs on n, 2n and 4n images (clips, pairs) in a process of its own, whose peak of resident memory and time are taken.
The images are links to the same few hundred, for what they show does not matter here. `dense-probe-513` is `dense-probe` with a
ResNet-50 at 513x513, the size of PASCAL VOC's literature.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clove_hub.data.finder import some_images

from . import labeled, report
from .report import RESULTS
from .setting import command

TIMES = (1, 2, 4)
LARGE = "dense-probe-513"
Many = Callable[[int], tuple[Path, dict[str, Any]]]
"""The folder and the settings for so many images."""


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description="Memory and time over images.")
    parser.add_argument("--model", default="random:resnet18", metavar="SOURCE", help="(default: %(default)s)")
    parser.add_argument("--streets", type=Path, required=True, metavar="DIR", help="images with masks, as CamVid's")
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="clips with masks, as DAVIS's")
    parser.add_argument("--coco", type=Path, required=True, metavar="DIR", help="photos with COCO's annotations")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="the fewest (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON file goes")
    parser.add_argument("protocols", nargs="*", metavar="PROTOCOL", help="those to measure (default: all)")
    options = parser.parse_args(given)
    before = options.results / "growth_cpu.json"
    rows: list[dict[str, Any]] = json.loads(before.read_text())["rows"] if before.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        many = protocols(Path(folder), options.streets, options.clips, options.coco)
        for name in options.protocols or many:
            rows = [row for row in rows if row["protocol"] != name]
            protocol, model = ("dense-probe", "random:resnet50") if name == LARGE else (name, options.model)
            for times in TIMES:
                data, settings = many[name](times * options.images)
                row = measured(protocol, model, data, settings)
                rows.append({"protocol": name, "times": times, "model": model, "images": options.images, **row})
                print(
                    f"{name:<16}{times:>3}x {row['samples']:>6} samples {row['seconds']:9.1f} s {row['memory_mb']:8.0f} MB",
                    flush=True,
                )
            # After each, so that one that is cut off loses nothing; the rows of protocols that are not asked for stay.
            report.save("growth", torch.device("cpu"), options.results, rows=rows)


def protocols(made: Path, streets: Path, clips: Path, coco: Path) -> dict[str, Many]:
    """What each protocol is given for so many images."""
    photos = some_images(coco / "train").paths
    small = {"height": 180, "width": 240}

    def masks(**settings: Any) -> Many:
        return lambda images: (
            repeated(streets, made / f"streets-{images}", images),
            {"train_images": images, "test_images": images // 2, **settings},
        )

    def kinds(images: int) -> tuple[Path, dict[str, Any]]:
        folder = made / f"kinds-{images}"
        for split in ("train", "val"):
            for number in range(images):
                place = folder / split / str(number % 2)
                place.mkdir(parents=True, exist_ok=True)
                link(photos[number % len(photos)], place / f"{number:06}.jpg")
        return folder, {}

    def loose(images: int) -> tuple[Path, dict[str, Any]]:
        folder = made / f"photos-{images}"
        folder.mkdir(exist_ok=True)
        for number in range(images):
            link(photos[number % len(photos)], folder / f"{number:06}.jpg")
        return folder, {"images": images}

    def followed(images: int) -> tuple[Path, dict[str, Any]]:
        folder, names = made / f"clips-{images}", []
        for number in range(images // 25):
            for part in ("JPEGImages", "Annotations"):
                (folder / part).mkdir(parents=True, exist_ok=True)
                first = next(path for path in sorted((clips / part).iterdir()) if path.is_dir())
                link(first, folder / part / f"clip{number}")
            names.append(f"clip{number}")
        (folder / "val.txt").write_text("\n".join(names) + "\n")
        return folder, {"frames": 6}

    def views(images: int) -> tuple[Path, dict[str, Any]]:
        chosen = [photos[number % len(photos)] for number in range(images // 4)]
        return labeled.pairs(chosen, made / f"views-{images}"), {"size": 256}

    def objects(images: int) -> tuple[Path, dict[str, Any]]:
        if not (made / "objects").exists():
            labeled.voc_like(coco, made / "objects")
        return made / "objects", {"images": images // 4}

    def distances(images: int) -> tuple[Path, dict[str, Any]]:
        whole = repeated(streets, made / f"streets-{images}", images)
        return labeled.depths(whole, made / f"rows-{images}", images, images // 4), {
            "steps": images,
            "crop": [128, 128],
            "batch": 4,
            "seeds": 1,
        }

    return {
        "correspond": loose,
        "knn": kinds,
        "linear-svm": kinds,
        "dense-probe": masks(**small, epochs=2, seeds=1),
        LARGE: lambda images: (
            repeated(streets, made / f"streets-{images}", images),
            {
                "train_images": images,
                "test_images": images // 10,
                "height": 513,
                "width": 513,
                "epochs": 1,
                "seeds": 1,
            },
        ),
        "retrieve": masks(),
        "propagate": followed,
        "in-context": masks(size=224),
        "linear-seg": masks(steps=100, crop=128, batch=4, seeds=1),
        "cluster": lambda images: (repeated(streets, made / f"streets-{images}", images), {"test_images": images}),
        "depth": distances,
        "match": views,
        "discover": objects,
    }


def repeated(streets: Path, out: Path, images: int) -> Path:
    """The folder with so many images in `train` and `test`: links to those that there are, again and again."""
    if out.exists():
        return out
    for part in ("images", "labels"):
        (out / part).mkdir(parents=True)
    (out / "classes.json").write_text((streets / "classes.json").read_text())
    names = (streets / "train.txt").read_text().split()
    found = {path.stem: path for path in (streets / "images").iterdir()}
    listed = []
    for number in range(images):
        name = names[number % len(names)]
        link(found[name], out / f"images/{number:06}{found[name].suffix}")
        link(streets / f"labels/{name}.png", out / f"labels/{number:06}.png")
        listed.append(f"{number:06}")
    for split in ("train", "val", "test"):
        (out / f"{split}.txt").write_text("\n".join(listed) + "\n")
    return out


def link(target: Path, path: Path) -> None:
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def measured(protocol: str, model: str, data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Samples, seconds and the peak of resident memory of one evaluation in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        where = ["--model", model, "--data", str(data), "--json", str(out), "--device", "cpu"]
        process = subprocess.Popen(
            [sys.executable, "-m", "clove_hub.cli", "evaluate", protocol, *where, *words],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"XDG_CACHE_HOME": folder},
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{protocol} on {data} failed: see above")
        record = json.loads(out.read_text())
    kilo = 1024 if sys.platform == "linux" else 1024**2  # macOS counts bytes
    return {
        "samples": record["data"]["samples"],
        "seconds": record["seconds"],
        "memory_mb": usage.ru_maxrss * 1024 / kilo / 1024,
        "settings": settings,
    }


if __name__ == "__main__":
    command(main)
