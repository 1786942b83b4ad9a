"""What a benchmark leaves: a table on the screen, and a JSON file that says on what, with what and when."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .measure import Spread, times_faster

PEERS = ("lightly",)
"""Sides of a measurement beside ours and the released code."""

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One thing that was measured: ours, the released code's where it was measured, and how many times faster ours is."""

    name: str
    unit: str
    ours: float
    released: float | None = None
    faster: Spread | None = None
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each of `PEERS` reached where it was measured, and how many times faster ours is: `{"lightly": {"rate": ..., "faster": ...}}`."""


def milliseconds(name: str, seconds: Mapping[str, Sequence[float]], ours: str = "ours") -> Row:
    """A row of what takes time, from the seconds of each turn; `ours` may name a variant."""
    return _row(name, "ms", seconds, ours, lambda second: 1000 * second)


def images_per_second(name: str, seconds: Mapping[str, Sequence[float]], images: int = 1, ours: str = "ours") -> Row:
    """A row of a rate, from the seconds that `images` images took in each turn."""
    return _row(name, "images/s", seconds, ours, lambda second: images / second)


def _row(name: str, unit: str, seconds: Mapping[str, Sequence[float]], ours: str, convert: Any) -> Row:
    released = seconds.get("released")
    return Row(
        name,
        unit,
        convert(statistics.median(seconds[ours])),
        convert(statistics.median(released)) if released else None,
        times_faster(seconds[ours], released) if released else None,
        {
            peer: {"rate": convert(statistics.median(of_peer)), "faster": times_faster(seconds[ours], of_peer)}
            for peer in PEERS
            if (of_peer := seconds.get(peer))
        },
    )


def write(
    benchmark: str,
    device: torch.device,
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    reference: Path | None,
    folder: Path,
    **more: Any,
) -> Path:
    """Prints the table and writes `<benchmark>_<device>.json` into the folder."""
    print(table(f"{benchmark} on {hardware(device)['device']}", rows, reference is not None), flush=True)
    return save(
        benchmark,
        device,
        folder,
        reference=commit(reference) if reference else None,
        settings=settings,
        rows=[dataclasses.asdict(row) for row in rows],
        **more,
    )


def save(benchmark: str, device: torch.device, folder: Path, **measured: Any) -> Path:
    """Writes `<benchmark>_<device>.json` into the folder: what was measured, on what, with what and when."""
    record = {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(ROOT),
        "hardware": hardware(device),
        "versions": versions(),
        **measured,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}_{device.type}.json"
    path.write_text(json.dumps(rounded(record), indent=2) + "\n")
    print(f"-> {path}\n", flush=True)
    return path


def table(title: str, rows: Sequence[Row], compared: bool) -> str:
    """Fixed columns: what, ours, released, how many times faster (median, and the extremes of the turns)."""
    lines = [title, f"{'':52}{'ours':>12}{'released':>12}  {'':9}{'times faster (min-max)'}"]
    for row in rows:
        released = f"{row.released:>12.4g}" if row.released is not None else f"{'-':>12}"
        lines.append(f"{row.name:52}{row.ours:>12.4g}{released}  {row.unit:9}{_in_words(row.faster)}".rstrip())
        for name, peer in row.peers.items():
            lines.append(f"{'  beside ' + name:64}{peer['rate']:>12.4g}  {row.unit:9}{_in_words(peer['faster'])}")
    if not compared:
        lines.append("The released code was not measured: give a clone of it with --reference.")
    return "\n".join(lines)


def _in_words(faster: Spread | None) -> str:
    return f"{faster['median']:.2f} ({faster['min']:.2f}-{faster['max']:.2f})" if faster else ""


def hardware(device: torch.device) -> dict[str, Any]:
    cpu = cpu_name()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": gpu or cpu, "cpu": cpu, "cores": cores, "gpu": gpu, "threads": torch.get_num_threads()}


def versions() -> dict[str, str | None]:
    """Of what the figures depend on; None for what is not installed."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "simplejpeg")
    return {"python": platform.python_version()} | {name: installed(name) for name in packages}


def cpu_name() -> str:
    """The model of the processor; Linux alone tells more than the architecture."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(folder: Path) -> str | None:
    """What git says is checked out in the folder, `+` behind it where Python files differ; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def rounded(value: Any) -> Any:
    """Five significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
