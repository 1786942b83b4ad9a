"""The trainers that `resume_peers` kills: how each is started, what it saves, and how it resumes.

Each is used as its documentation says: ours and lightly-train by their commands, timm by its train.py, Accelerate by its
own example on images with checkpoints (its example on checkpoints alone trains on text that has to be downloaded).
"""

from __future__ import annotations

import importlib.util
import os
import pickletools
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import report
from .setting import RECIPE

BACKBONE = "test_resnet"  # timm's smallest ResNet
SIZE = 64  # pixels of an image that the backbone sees
BATCH = 4
EPOCHS = 3
SAVE_EVERY = 3  # steps between checkpoints, for those that save within epochs; does not divide an epoch of 80 photos
WHOLE = 20  # photos of which both all and 80 % are whole batches; Accelerate's example keeps 20 % for its evaluation

OURS = {
    "backbone.model": BACKBONE,
    "method.global_size": SIZE,
    "method.local_size": SIZE // 2,
    "method.local_views": 2,
    "method.projector_hidden": 32,
    "method.feature_dim": 16,
    "method.attention_heads": 2,
    "method.hard_negatives": 3,
    "batch.total": BATCH,
    "batch.norm_group": BATCH,
    "schedule.epochs": EPOCHS,
    "schedule.warmup_epochs": 0.5,
    "data.workers": 0,
    "run.precision": "fp32",
    "run.save_every": SAVE_EVERY,
}
EXAMPLE = {
    '"resnet50d", pretrained=True': f'"{BACKBONE}", pretrained=False',
    "num_workers=4": "num_workers=0",
    '"num_epochs": 3': f'"num_epochs": {EPOCHS}',
    '"batch_size": 64': f'"batch_size": {BATCH}',
    '"image_size": 224': f'"image_size": {SIZE}',
}
"""The sizes that Accelerate's example has no option for, and what they become."""
SEEDED = {
    "DataLoaderConfiguration(": "DataLoaderConfiguration(use_seedable_sampler=True, ",
    "        for batch in active_dataloader": "        active_dataloader.set_epoch(epoch)\n        for batch in active_dataloader",
}
"""Accelerate's own means for an order that is a function of seed and epoch, which its examples do not use."""
STATEFUL = {
    "active_dataloader = accelerator.skip_first_batches(train_dataloader, resume_step)": (
        "active_dataloader = train_dataloader  # load_state has skipped them"
    )
}
"""What its other examples do with --use_stateful_dataloader and this one forgets: it would skip batches twice."""

Checkpoints = Callable[[Path, int], list[tuple[int, list[str]]]]
"""From a run's folder and the steps of an epoch to the checkpoints, newest first: the steps in each and what the command
needs besides to resume from it."""


@dataclass(frozen=True)
class Trainer:
    """A trainer, and how it saves and resumes."""

    name: str
    version: str | None
    saves: str
    """When it saves, in words."""
    photos: Path
    """The folder it reads."""
    start: Callable[[Path], list[str]]
    """From a run's folder to what follows `python` in the command."""
    checkpoints: Checkpoints
    python: str = sys.executable
    changes: Mapping[str, str] = field(default_factory=dict)
    """Of the program's text: what it says, and what is put there."""


def ours(photos: Path) -> Trainer:
    def start(run: Path) -> list[str]:
        changes = OURS | {"data.path": photos, "run.output": run}
        return ["-m", "clove_hub.cli", "pretrain", RECIPE, *(f"{key}={value}" for key, value in changes.items())]

    def checkpoints(run: Path, epoch: int) -> list[tuple[int, list[str]]]:
        """The same command resumes, from the newest."""
        return [(numbered(run / "checkpoints", r"step_(\d+)")[0][0], [])]

    return Trainer("clove-hub", report.commit(report.ROOT), f"{SAVE_EVERY} steps", photos, start, checkpoints)


def accelerate_example(example: Path, photos: Path, work: Path) -> list[Trainer]:
    """Its two ways to save and to resume, and with each of two loaders that Accelerate has for an order that resumes.

    Raises:
        ValueError: the example cannot be read, or does not say what is to be changed.
    """

    def trainer(name: str, every: str, changes: Mapping[str, str], *options: str) -> Trainer:
        script = work / f"{name}.py"
        script.write_text(changed(example, changes))
        words = ["--data_dir", str(photos), "--cpu", "--checkpointing_steps", every, *options]

        def checkpoints(run: Path, epoch: int) -> list[tuple[int, list[str]]]:
            pattern, of_epoch = (r"epoch_(\d+)", True) if every == "epoch" else (r"step_(\d+)", False)
            return [
                ((number + 1) * epoch if of_epoch else number, ["--resume_from_checkpoint", str(path)])
                for number, path in numbered(run, pattern)
            ]

        return Trainer(
            f"Accelerate, {name}",
            report.commit(example.parent),
            "epoch" if every == "epoch" else f"{every} steps",
            photos,
            lambda run: [str(script), *words, "--output_dir", str(run)],
            checkpoints,
            changes=changes,
        )

    steps = str(SAVE_EVERY)
    trainers = [
        trainer(example.stem, "epoch", EXAMPLE),
        trainer(example.stem, steps, EXAMPLE),
        trainer("seedable sampler", steps, EXAMPLE | SEEDED),
    ]
    if importlib.util.find_spec("torchdata"):
        trainers.append(trainer("stateful loader", steps, EXAMPLE | STATEFUL, "--use_stateful_dataloader"))
    else:
        print("left out: Accelerate's --use_stateful_dataloader, which needs torchdata (pip install torchdata)")
    return trainers


def timm_train(script: Path, photos: Path) -> list[Trainer]:
    """With the checkpoints of epochs alone, and with those for recovery within epochs too.

    Raises:
        ValueError: there is no such file.
    """
    if not script.is_file():
        raise ValueError(f"--timm-train {script} is not a file: give train.py of a clone of pytorch-image-models")

    def trainer(saves: str, *options: str) -> Trainer:
        def start(run: Path) -> list[str]:
            data = [
                "--data-dir",
                str(photos.parent),
                "--train-split",
                photos.name,
                "--val-split",
                "",
                "--num-classes",
                "2",
            ]
            model = ["--model", BACKBONE, "--img-size", str(SIZE), "--batch-size", str(BATCH), "--device", "cpu"]
            # train.py keeps workers between epochs, which torch refuses where there are none.
            length = ["--epochs", str(EPOCHS), "--warmup-epochs", "0", "--workers", "1"]
            return [
                str(script),
                *data,
                *model,
                *length,
                "--output",
                str(run.parent),
                "--experiment",
                run.name,
                *options,
            ]

        def checkpoints(run: Path, epoch: int) -> list[tuple[int, list[str]]]:
            found = [((number + 1) * epoch, path) for number, path in numbered(run, r"checkpoint-(\d+)\.pth\.tar")]
            for path in run.glob("recovery-*-*.pth.tar"):
                of_epoch, update = map(int, path.name.removesuffix(".pth.tar").split("-")[1:])
                found.append((of_epoch * epoch + update + 1, path))
            return [(step, ["--resume", str(path)]) for step, path in sorted(found, reverse=True)]

        return Trainer("timm, train.py", report.commit(script.parent), saves, photos, start, checkpoints)

    return [trainer("epoch"), trainer(f"{SAVE_EVERY} steps", "--recovery-interval", str(SAVE_EVERY))]


def lightly_train(python: str, photos: Path) -> list[Trainer]:
    """As it saves by default, and within epochs.

    Raises:
        ValueError: it is not installed in that Python.
    """
    program, version = python_with(python, "lightly-train", "--lightly-train", "lightly-train[timm]")

    def trainer(saves: str, *options: str) -> Trainer:
        def start(run: Path) -> list[str]:
            model = [f"model=timm/{BACKBONE}", "model_args.pretrained=false", "method=simclr"]
            sizes = [f"epochs={EPOCHS}", f"batch_size={BATCH}", f"transform_args.image_size=[{SIZE},{SIZE}]"]
            machine = ["num_workers=0", "accelerator=cpu", "precision=32-true"]
            return [
                str(Path(program).with_name("lightly-train")),
                *("pretrain", f"out={run}", f"data={photos}", *model, *sizes, *machine, *options),
            ]

        def checkpoints(run: Path, epoch: int) -> list[tuple[int, list[str]]]:
            return [(lightning_step(run / "checkpoints" / "last.ckpt"), ["resume_interrupted=true"])]

        return Trainer("lightly-train", version, saves, photos, start, checkpoints, program)

    return [
        trainer("epoch"),
        trainer(f"{SAVE_EVERY} steps", f"callbacks.model_checkpoint.every_n_train_steps={SAVE_EVERY}"),
    ]


def python_with(python: str, package: str, option: str, install: str) -> tuple[str, str]:
    """The path of another Python that has a package, and the package's version.

    Args:
        option: of the command, for the message.
        install: what pip is told.

    Raises:
        ValueError: it is not installed in that Python.
    """
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    program = os.path.abspath(shutil.which(python) or python)  # not what a link leads to: that is another environment
    try:
        said = subprocess.run([program, "-I", "-c", asked], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{option} {python} has no {package}: install it with {python} -m pip install {install!r}"
        ) from error
    return program, said.strip()


def changed(file: Path, changes: Mapping[str, str]) -> str:
    """The text of an example with other sizes.

    Raises:
        ValueError: it cannot be read, or does not say what is to be changed.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror}): give the one in a clone of its repository"
        ) from error
    for old, new in changes.items():
        if old not in text:
            raise ValueError(f"{file} does not contain {old!r}: give the one of another version")
        text = text.replace(old, new)
    return text


def numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """What is in the folder under a name with a number, the highest first."""
    found = [(re.fullmatch(pattern, path.name), path) for path in folder.iterdir()]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def lightning_step(checkpoint: Path) -> int:
    """The steps in a checkpoint of Lightning, from its pickle's text: loading it would need the trainer's classes."""
    with zipfile.ZipFile(checkpoint) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        words = pickletools.genops(archive.read(name))
        next(value for _, value, _ in words if value == "global_step")
        # BINPUT's number is not a value of the checkpoint.
        return next(value for code, value, _ in words if isinstance(value, int) and code.name.startswith("BININT"))
