"""Benchmarks as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: object, ok: bool = True) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (result.returncode == 0) is ok, result.stdout + result.stderr
    return result.stdout + result.stderr
