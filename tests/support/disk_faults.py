"""Fails each file operation of a save in turn, and says what is left.

It runs with failing_disk.c preloaded:

LD_PRELOAD=failing_disk.so python disk_faults.py FOLDER     prints a JSON list of cases
"""

import ctypes
import errno
import json
import logging
import os
import sys
from pathlib import Path

import torch
from torch import nn

from clove_hub.runs import checkpoint_folders, read_rows, read_state
from clove_hub.training.run.folder import RunFolder
from clove_hub.training.run.lock import Lock
from clove_hub.training.run.peers import Peers

NUMBERS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.EIO)
KEYS = ("step", "files")
disk = ctypes.CDLL(None)
disk.failing_disk_operation.restype = ctypes.c_char_p


def save(run: Path, nth: int, number: int) -> dict:
    """Saves step 2 of a run that has one of step 1, while one operation fails."""
    torch.manual_seed(0)
    module = nn.Linear(40, 40)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
    said = []
    logging.getLogger("clove_hub").addHandler(handler := logging.Handler())
    handler.emit = lambda record: said.append(record.getMessage())
    Lock._live = lambda self: None  # its operations would be counted at any time
    outcome = {"number": errno.errorcode[number], "error": None}
    try:
        with RunFolder(run, Peers(1.0), 1, "run.output", KEYS) as folder:
            folder.append("metrics.jsonl", {"step": 1})
            folder.save(1, module, optimizer, {})
            disk.failing_disk(os.fsencode(run), nth, number)
            folder.append("metrics.jsonl", {"step": 2})
            module.weight.data += 1
            folder.save(2, module, optimizer, {})
            outcome["count"] = disk.failing_disk_count()
            disk.failing_disk(b"", 0, 0)
    except Exception as error:
        disk.failing_disk(b"", 0, 0)
        outcome["error"] = f"{type(error).__name__}: {error}"
    outcome |= {"operation": disk.failing_disk_operation().decode(), "said": said}
    good = []
    for one in checkpoint_folders(run):
        try:
            good.append(read_state(one, KEYS)["step"])
        except ValueError:
            outcome["damaged"] = one.name
    with RunFolder(run, Peers(1.0), 1, "run.output", KEYS) as folder:  # the next start
        outcome["next"] = folder.found[1]["step"]
        outcome["left"] = sorted(path.name for path in run.rglob(".*"))
    return outcome | {"good": good, "rows": [row["step"] for row in read_rows(run / "metrics.jsonl")]}


def case(folder: Path, nth: int, number: int) -> dict:
    """`save` in a process of its own, which starts at once."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            found = save(folder / f"run_{nth}_{number}", nth, number)
        except BaseException as error:
            found = {"error": f"the next start: {type(error).__name__}: {error}", "broken": True}
        os.write(writer, json.dumps(found | {"nth": nth}).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = json.loads(pipe.read())
    os.wait()
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    count = case(folder, 0, errno.EIO)["count"]
    print(json.dumps([case(folder, nth, number) for number in NUMBERS for nth in range(1, count + 1)]))
