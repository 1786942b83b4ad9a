"""Pre-training runs in miniature, started as a user starts them, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from patience import PATIENCE
from safetensors.torch import load_file

# A complete CLoVE run in miniature: timm's smallest ResNet, 2x2 cells in a global view.
TINY = {
    "method.global_size": 64,
    "method.local_size": 32,
    "method.local_views": 2,
    "method.projector_hidden": 32,
    "method.feature_dim": 16,
    "method.attention_heads": 2,
    "method.hard_negatives": 3,
    "backbone.model": "test_resnet",
    "batch.total": 8,
    "batch.per_device": 4,
    "batch.norm_group": 4,
    "data.workers": 0,
    "schedule.steps": 4,
    "schedule.warmup_epochs": 0.4,
    "run.log_every": 1,
    "run.save_every": 2,
}


def overrides(photos: Path, run: Path, **changes: object) -> list[str]:
    settings = TINY | {"data.path": photos, "run.output": run}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items()]


def launch(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The command that a user types."""
    python = [sys.executable, "-m"]
    command = [*python, "clove_hub.training"]
    if processes > 1:  # `accelerate launch` starts several processes on GPUs alone
        command = [
            *python,
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            "-m",
            "clove_hub.training",
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False
    )


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def assert_same_run(one: Path, other: Path, without: frozenset[str] | set[str] = frozenset()) -> None:
    """Parameters, teacher, optimizer and the loss of every step, bit for bit."""
    assert last_checkpoint(one).name == last_checkpoint(other).name
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(last_checkpoint(one) / file), load_file(last_checkpoint(other) / file)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    timing = {"images_per_second", "waiting_for_data", "host_memory_gb", *without}
    left, right = ([{k: v for k, v in row.items() if k not in timing} for row in rows(run)] for run in (one, other))
    assert left == right
