"""Is a pre-trained backbone a better start than random weights? torchvision's FCN and detector, by the command that users type.

The backbone is what the part `learn` has left of CLoVE, or `--backbone`; both sides go beside each other on the device.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from clove_hub import cli
from clove_hub.weights import load

from ..downstream import CPU_DETECTION, CPU_SEGMENTATION
from .children import Children
from .journal import Journal
from .learn import ENDING
from .learn_run import run_of
from .place import Place

SEEDS = 3
STEPS = {"segmentation": 150, "detection": 150}
ON_GPU = {
    "run.precision": "bf16",
    "data.workers": "2",
    "run.pictures": "0",
    "optimizer.learning_rate": "0.02",  # for the preset's batch of 16, which is this one's; the CPU's is for 4
    "schedule.warmup_steps": "75",
}


def run(journal: Journal, place: Place, backbone: str | None = None) -> None:
    source = backbone or str(run_of(place, "clove"))
    data = {"segmentation": place.segmentation, "detection": place.detection}
    architecture = journal.item("the backbone", lambda: load(source).architecture)
    if architecture is None:
        return
    sides = {"pre-trained": source, "random": f"random:{architecture}"}
    with Children(place) as children:
        for seed in range(1 if place.rehearse else SEEDS):
            names = []
            for task, folder in data.items():
                if folder is None:
                    continue
                for side, one in sides.items():
                    name = f"{task}, {side}, seed {seed}"
                    if name not in journal.items and journal.left > ENDING:
                        children.start(name, fine_tuned, task=task, side=side, source=one, data=str(folder), seed=seed)
                        names.append(name)
            for name in names:  # a seed is complete before the next begins
                left = max(journal.left - ENDING / 2, 1.0)
                journal.item(name, partial(children.result, name, left), limit=left + ENDING, least=0.0)


def fine_tuned(place: Place, task: str, side: str, source: str, data: str, seed: int) -> dict[str, Any]:
    """The metrics of one run, and its seconds."""
    settings = dict(CPU_SEGMENTATION if task == "segmentation" else CPU_DETECTION)
    settings |= {"schedule.steps": "4", "schedule.warmup_steps": "1", "run.precise_bn": "1", "run.pictures": "0"}
    settings |= {"data.train_images": "8", "data.test_images": "4"}
    if not place.rehearse:
        for key in ("data.train_images", "data.test_images"):
            del settings[key]
        settings |= ON_GPU | {"schedule.steps": str(STEPS[task]), "batch.total": "16", "run.precise_bn": "20"}
    out = place.work / "fine_tuned" / f"{task}_{side}_{seed}"
    words = [f"{key}={value}" for key, value in settings.items()]
    given = ["downstream", "torchvision", task, "--backbone", source, "--data", data, "--out", str(out)]
    if code := cli.main([*given, *words, f"run.seed={seed}"]):
        raise RuntimeError(f"exit code {code}; the reason is at the end of the log")
    results = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"metrics": results["metrics"], "loss": rows[-1]["loss"], "steps": rows[-1]["step"]}
