"""Faults that a run has to survive: `python -m benchmarks.faults --data PHOTOS [--parts PART ...]`.

    kills     SIGKILL at random moments, of every method, with 0 to 3 workers: the run ends bit for bit as one left alone
    signals   five signals to rank 0, rank 1, the launcher and all of them, under torchrun
    starts    two starts into one folder at once
    damage    seven kinds of damage to each file of each checkpoint
    ranks     two ranks that were not started alike

Each part prints what it counted, and all go into one JSON file. Linux only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from clove_hub.cli import main as clove_hub
from clove_hub.runs import METRICS, checkpoint_folders, read_rows, read_state

from . import report
from .setting import arguments, command
from .small import small

RECIPES = {
    "clove": "demo",
    "slotcon": "slotcon_r50_in1k_100ep",
    "pixpro": "pixpro_r50_in1k_100ep",
    "moco": "moco_knn_r50_coco_800ep",
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
TARGETS = ("rank 0", "rank 1", "launcher", "group")
PATIENCE = 600.0
"""Seconds for what takes a few: machines may be busy."""
TIMING = ("images_per_second", "waiting_for_data", "host_memory_gb", "device_memory_gb")


def main(given: list[str] | None = None) -> None:
    parser = arguments("faults", __doc__ or "", data=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do (default: all)")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs in all (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=20, help="pairs of starts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args(given)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            folder_of_part = Path(folder, name)
            folder_of_part.mkdir()
            found[name] = PARTS[name](options, folder_of_part)
            print(f"{name}: {json.dumps(found[name]['counts'])}", flush=True)
    report.save(options.name, torch.device("cpu"), options.results, parts=found)


# ---- parts -----------------------------------------------------------------------------------------------------------


def kills(options: Any, folder: Path) -> dict[str, Any]:
    """Kills runs of each method at random moments until they are finished, and holds them against one left alone."""
    rng, cases = random.Random(options.seed), list[dict[str, Any]]()
    each = -(-options.kills // len(RECIPES))
    for method in RECIPES:
        steps = {"schedule__steps": 12, "run__save_every": 1, "run__keep": 2}
        began = time.monotonic()
        with started(method, options.data, folder / method / "whole", **steps) as process:
            assert ended(process) == 0
        whole, done, number = time.monotonic() - began, 0, 0
        while done < each:
            run = folder / method / str(number)
            case: dict[str, Any] = {"method": method, "kills": 0, "partial": 0, "orphans": 0}
            while True:
                workers = rng.randrange(4)
                with started(method, options.data, run, data__workers=workers, **steps) as process:
                    if done < each:
                        process.join(rng.uniform(0.1, 1.2) * whole)
                    else:
                        ended(process)
                    if process.exitcode is not None:
                        break
                    try:
                        family = psutil.Process(process.pid).children(recursive=True)
                    except psutil.NoSuchProcess:  # it ended by itself a moment ago
                        process.join()
                        break
                    process.kill()
                    process.join()
                    done, case["kills"] = done + 1, case["kills"] + 1
                    case["partial"] += bool(list(run.glob("checkpoints/.*")))
                    case["orphans"] += len(psutil.wait_procs(family, timeout=10)[1])
            cases.append(case | {"exit": process.exitcode, "same": same_run(folder / method / "whole", run)})
            number += 1
    wrong = [case for case in cases if case["exit"] or case["orphans"] or not case["same"]]
    totals = {key: sum(case[key] for case in cases) for key in ("kills", "partial", "orphans")}
    return {"counts": totals | {"runs": len(cases), "wrong": len(wrong)}, "cases": cases}


def signals(options: Any, folder: Path) -> dict[str, Any]:
    """Sends each signal to each process of a run of two ranks, and looks at what is saved and who is left."""
    cases = []
    for number in SIGNALS:
        for target in TARGETS:
            cases.append(signaled(options.data, folder / f"{number}_{target}", number, target))
            print(f"  {json.dumps(cases[-1])}", flush=True)
    saved = sum(case["lost"] == 0 for case in cases)
    left = sum(case["left"] for case in cases)
    return {"counts": {"cases": len(cases), "nothing lost": saved, "processes left": left}, "cases": cases}


def signaled(data: str, run: Path, number: signal.Signals, target: str) -> dict[str, Any]:
    """One case: the launcher's exit code, seconds until all processes had ended, steps lost, what was said."""
    changes = {"schedule__steps": 100_000, "run__save_every": 100_000, "batch__per_device": 4}
    words = ["demo", *small("clove", data__path=data, run__output=run, **changes)]
    with launched(words, log_of(run)) as launcher:
        wait_until(lambda: len(read_rows(run / METRICS)) > 2, launcher)
        ranks = sorted(launcher.children(), key=lambda process: int(process.environ()["RANK"]))
        family = [launcher, *launcher.children(recursive=True)]
        began = time.monotonic()
        if target == "group":
            os.killpg(launcher.pid, number)
            if number == signal.SIGKILL:  # a launcher gives its processes sessions of their own
                for process in ranks:
                    process.send_signal(number)
        else:
            {"rank 0": ranks[0], "rank 1": ranks[1], "launcher": launcher}[target].send_signal(number)
        _, alive = psutil.wait_procs(family, timeout=120)
        seconds, code = time.monotonic() - began, launcher.wait() if launcher not in alive else None
    rows, folders = read_rows(run / METRICS), checkpoint_folders(run)
    saved = read_state(folders[0])["step"] if folders else 0
    text = log_of(run).read_text(errors="replace")
    words_said = re.findall(
        r"(asked to stop: saved after step \d+|saved after step \d+|stopping at once|error[^\n]{0,120})", text
    )
    return {
        "signal": number.name,
        "target": target,
        "exit": code,
        "seconds": seconds,
        "lost": rows[-1]["step"] - saved,
        "left": len(alive),
        "said": list(dict.fromkeys(words_said))[:3],
    }


def starts(options: Any, folder: Path) -> dict[str, Any]:
    """Starts the same run twice at the same moment."""
    cases: list[dict[str, Any]] = []
    for number in range(options.starts):
        run, steps = folder / str(number), {"schedule__steps": 6, "run__save_every": 1}
        with (
            started("clove", options.data, run, **steps) as one,
            started("clove", options.data, run, **steps) as other,
        ):
            codes = sorted((ended(one), ended(other)))
        rows = [row["step"] for row in read_rows(run / METRICS)]
        cases.append({"codes": codes, "rows": rows == list(range(1, 7))})
    refused = sum(case["codes"] == [0, 1] for case in cases)
    counts = {"pairs": len(cases), "one ran, one refused": refused, "all rows": sum(case["rows"] for case in cases)}
    return {"counts": counts, "cases": cases}


def damage(options: Any, folder: Path) -> dict[str, Any]:
    """Damages one file of one checkpoint of a finished run, and starts the run again."""
    steps = {"schedule__steps": 4, "run__save_every": 2, "run__keep": 2}
    with started("clove", options.data, folder / "whole", **steps) as process:
        assert ended(process) == 0
    cases: list[dict[str, Any]] = []
    for checkpoint in sorted(path.name for path in checkpoint_folders(folder / "whole")):
        for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
            for kind, spoil in DAMAGE.items():
                run = folder / f"{checkpoint}_{file}_{kind.replace(' ', '_')}"
                shutil.copytree(folder / "whole", run)
                spoil(run / "checkpoints" / checkpoint / file)
                with started("clove", options.data, run, **steps) as process:
                    code = ended(process)
                newest = is_good(max(run.glob("checkpoints/step_*")))
                same = newest and same_run(folder / "whole", run)
                said = f"checkpoints/{checkpoint}" in log_of(run).read_text()
                cases.append(
                    {"checkpoint": checkpoint, "file": file, "damage": kind, "exit": code, "same": same, "said": said}
                )
                shutil.rmtree(run)
    whole = sum(case["exit"] == 0 and case["same"] for case in cases)
    counts = {"cases": len(cases), "run whole afterwards": whole, "damage named": sum(case["said"] for case in cases)}
    return {"counts": counts, "cases": cases}


def ranks(options: Any, folder: Path) -> dict[str, Any]:
    """Starts two ranks of which the second has other words or another folder, and sees who says what."""
    other = folder / "photos"
    shutil.copytree(options.data, other)
    next(path for path in sorted(other.rglob("*")) if path.is_file()).unlink()
    cases = {
        "recipe": "batch.total=16",
        "data": f"data.path={other}",
        "run folder": f"run.output={folder / 'elsewhere'}",
        "missing data": "data.path=/does/not/exist",
        "mistyped setting": "batch.totl=8",
        "missing recipe file": "absent.yaml",
    }
    found: list[dict[str, Any]] = []
    for name, word in cases.items():
        run = folder / name.replace(" ", "_")
        words = ["demo", *small("clove", data__path=options.data, run__output=run, batch__per_device=4)]
        second = [word, *words[1:]] if name == "missing recipe file" else [*words, word]
        began = time.monotonic()
        with launched(words, log_of(run), second) as launcher:
            _, alive = psutil.wait_procs([launcher, *launcher.children(recursive=True)], timeout=120)
        text = log_of(run).read_text(errors="replace")
        said = re.findall(r"^error[^\n]*", text, re.MULTILINE)
        named = any(f"process 1 on {socket.gethostname()}" in line for line in said)
        seconds = time.monotonic() - began
        found.append({"case": name, "seconds": seconds, "named": named, "left": len(alive), "said": said})
    counts = {"cases": len(found), "named": sum(case["named"] for case in found)}
    return {"counts": counts | {"processes left": sum(case["left"] for case in found)}, "cases": found}


PARTS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    part.__name__: part for part in (kills, signals, starts, damage, ranks)
}


# ---- damage ----------------------------------------------------------------------------------------------------------


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _zeroed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:4096] = bytes(min(4096, len(data)))
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit flipped": _flipped,
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    "a page of zeros": _zeroed,
    "other content": lambda path: path.write_text('{"format": 1}'),
    "a folder": _folder,
}


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def is_good(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
    except ValueError:
        return False
    return True


# ---- runs ------------------------------------------------------------------------------------------------------------


@functools.cache
def forkserver() -> Any:
    """Processes that start at once, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clove_hub.training.loop"])
    return context


@contextlib.contextmanager
def started(method: str, data: str, run: Path, **changes: object) -> Iterator[Any]:
    """A run in a process of its own, whose output goes into RUN.log."""
    run.parent.mkdir(parents=True, exist_ok=True)
    words = [RECIPES[method], *small(method, data__path=data, run__output=run, **changes)]
    process = forkserver().Process(target=_train, args=(words, log_of(run)))
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _train(words: list[str], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(clove_hub(["pretrain", *words]))


def ended(process: Any) -> int:
    process.join(PATIENCE)
    assert process.exitcode is not None, "the run has not ended"
    code: int = process.exitcode
    return code


@contextlib.contextmanager
def launched(words: Sequence[str], log: Path, second: Sequence[str] | None = None) -> Iterator[psutil.Popen]:
    """Two ranks under torchrun, in a session of their own; the second with words of its own where it has any."""
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tail = ["-m", "clove_hub.training", *words]
    if second is not None:
        script = 'if [ "$RANK" = 1 ]; then exec "$0" -m clove_hub.training "${@:2:$1}"; fi; shift $(($1 + 1)); exec "$PY" "$@"'
        tail = ["--no-python", "bash", "-c", script, sys.executable, str(len(second)), *second, *tail]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PY": sys.executable}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        launcher = psutil.Popen(
            [*python, *tail],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=heard,
        )
        try:
            yield launcher
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (*launcher.children(recursive=True), launcher):
                    process.kill()
            launcher.wait()


def heard() -> None:
    """Ctrl-C is ignored by what starts in the background of a script, as this program may have."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(reached: Callable[[], bool], process: psutil.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None, "the run has ended too soon"
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.05)


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs have the same last checkpoint, bit for bit, and the same rows."""
    left, right = (checkpoint_folders(run)[0] for run in (one, other))
    if left.name != right.name:
        return False
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(left / file), load_file(right / file)
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    rows = [
        [{k: v for k, v in row.items() if k not in TIMING} for row in read_rows(run / METRICS)] for run in (one, other)
    ]
    return rows[0] == rows[1]


if __name__ == "__main__":
    command(main)
