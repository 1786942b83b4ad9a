"""All runs of a task: check everything, write config and weights, train each seed, and write results.json."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from clove_hub.data.files import Data
from clove_hub.evaluation.collected import collect, markdown
from clove_hub.evaluation.result import (
    CHANGED,
    Record,
    fine_tuning_record,
    mean_items,
    versions,
    write,
    write_text,
)
from clove_hub.processes import STOPPED
from clove_hub.weights import Weights, load

from ..convert import FRAGMENT_MARK, as_assignments, write_converted
from ..seeds import SCORES, Found, Trained, count_gpus, finished, require_same, run_seed, run_seeds, unlike
from .config import OURS, Config, plain, resolve
from .layouts import PUBLISHED, require_layout
from .tasks import TASKS, Order

VERSION = 1
RULE = "slotcon"
INSTALL = "https://mmsegmentation.readthedocs.io/en/latest/get_started.html"
METRICS = {"mIoU": "mIoU", "aAcc": "pixel accuracy", "mAcc": "mean class accuracy"}
PLAIN = "config.py"
"""File in a seed's folder that MMSegmentation's own tools open."""
USUAL_GPUS = 4
"""Number of GPUs for a config that is only written, not run."""


def prepare(order: Order, backbone: Weights, gpus: int) -> tuple[Config, tuple[str, ...]]:
    """The config of the task on the backbone, and its deviations from the protocol.

    Raises:
        ValueError: as `resolve`.
    """
    data = "data" if order.data is None else str(order.data.resolve())
    chosen = order.normalization
    return resolve(TASKS[order.task], backbone, order.weights, data, gpus, chosen, order.overrides)


def write_protocol(order: Order, backbone: Weights, config: Config) -> None:
    """Write the converted backbone and the config that starts from it.

    Raises:
        ValueError: a file cannot be written, or exists and was not written by clove-hub.
    """
    path = order.config
    if path.exists() and not path.read_text(encoding="utf-8").startswith(FRAGMENT_MARK):
        raise ValueError(f"{path} exists and was not written by clove-hub: choose another --out")
    write_converted(backbone, "mmseg", order.weights)
    head = (
        f"{FRAGMENT_MARK}: {order.task} on {backbone.architecture}. Needs clove-hub installed beside MMSegmentation.\n"
    )
    write_text(path, head + as_assignments(config))


def run(order: Order, data: Path) -> int:
    """Train and score every seed that is not done, and write results.json.

    Returns:
        The exit code: 0, or STOPPED after a signal.

    Raises:
        ValueError: something is missing or wrong; found before anything is written.
        ChildProcessError, KeyboardInterrupt: from `run_seed`.
        FloatingPointError: every seed has diverged, or a figure has no value.
    """
    require_packages()
    from .rehearsal import rehearse_task

    task = TASKS[order.task]
    found = require_layout(task.layout, data)
    gpus = count_gpus(order.gpus)
    backbone = load(order.backbone)
    config, notes = prepare(order, backbone, gpus)
    facts = json.loads(json.dumps({"config": config, "backbone": backbone.fingerprint, "data": found.fingerprint}))
    require_same(order.out / "setup.json", facts)
    write_protocol(order, backbone, config)
    if not all(finished(order.out, seed) for seed in range(order.runs)):
        rehearse_task(order, data, backbone, gpus)
    write_text(order.out / "setup.json", json.dumps(facts, indent=1) + "\n")
    for note in (*backbone.notes, *notes):
        print(f"note: {note}", flush=True)
    notes = (*notes, *unlike(found, PUBLISHED[task.layout]))

    def train_seed(seed: int, folder: Path) -> bool:
        write_text(folder / PLAIN, as_assignments(plain(config)))
        words = ["-m", f"{__package__}.train", str(order.config), "--seed", str(seed), "--work-dir", str(folder)]
        return run_seed([*words, "--gpus", str(gpus), "--parent", str(os.getpid())], folder, "*/*.log")

    if (trained := run_seeds(order.out, order.runs, train_seed)) is None:
        return STOPPED
    record = summarize(order, backbone, config, notes, found, trained, gpus)
    path = order.out / "results.json"
    write(record, path)
    print(f"\n{markdown(collect([(path, record)]))}\n\n{path}")
    seed = order.out / f"seed_{record.seeds[0]}"
    model = f"{seed / PLAIN} {seed / 'iter_{}.pth'.format(config['train_cfg']['max_iters'])}"
    print(f"To see its predictions with MMSegmentation: python demo/image_demo.py IMAGE {model} --out-file FILE")
    return 0


def summarize(
    order: Order, backbone: Weights, config: Config, notes: tuple[str, ...], found: Found, trained: Trained, gpus: int
) -> Record:
    """The record; figures of single classes are means over the seeds.

    Raises:
        FloatingPointError: a figure has no value.
    """
    for seed, left in trained.scores.items():
        if without := [theirs for theirs in METRICS if left["metrics"].get(theirs) is None]:
            path = order.out / f"seed_{seed}" / SCORES
            raise FloatingPointError(f"{path} has no {', '.join(without)}: the log beside it says why")
    notes, first, each = (*notes, *trained.diverged), next(iter(trained.scores.values())), trained.scores.items()
    batch = config["train_dataloader"]["batch_size"] * max(gpus, 1)
    preprocessor = config["model"]["data_preprocessor"]
    shown = {key: value for key, value in config.items() if key not in OURS}
    return fine_tuning_record(
        *(order.backbone, backbone),
        {seed: {ours: left["metrics"][theirs] for theirs, ours in METRICS.items()} for seed, left in each},
        protocol=f"mmseg-{order.task}",
        version=VERSION,
        rule=CHANGED if notes else RULE,
        split="val",
        data=Data(order.task, found.fingerprint, found.test),
        settings={
            "engine": "mmsegmentation",
            "steps": config["train_cfg"]["max_iters"],
            "batch": {"total": batch},
            "train_images": found.train,
            "learning_rate": config["optim_wrapper"]["optimizer"]["lr"],
            "gpus": gpus,
            "notes": list(notes),
            "config": hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest(),
        },
        versions=versions("mmsegmentation", "mmengine"),
        seconds=trained.seconds,
        items=mean_items([{"class": left["class"]} for _, left in each]),
        absent=tuple(name for name in first["classes"] if not first["class"].get(name, {}).get("pixels")),
        # On MMSegmentation's scale, for pixels of 0 to 255.
        preprocessing={"mean": preprocessor["mean"], "std": preprocessor["std"]},
    )


def require_packages() -> None:
    """Raise ValueError naming the packages that are not installed and their install pages."""
    if absent := [name for name in ("mmengine", "mmcv", "mmseg") if find_spec(name) is None]:
        raise ValueError(
            f"not installed in this Python ({sys.executable}): {', '.join(absent)}, see {INSTALL}. Without --data, config "
            "and weights are written for training on another machine. (`clove-hub downstream torchvision` needs none of these.)"
        )
