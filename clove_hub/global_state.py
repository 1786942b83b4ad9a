"""Preserving global state: random generators and environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_generators() -> Iterator[None]:
    """Allow drawing and seeding global random numbers within the context (or a decorated function).

    The generators of torch, NumPy and Python are restored afterwards. Accelerators that were not in use before have no
    generator to restore.
    """
    import random

    import numpy as np
    import torch

    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002  # libraries may use it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


@contextmanager
def kept_environment() -> Iterator[None]:
    """Allow setting environment variables within the context; they are restored afterwards."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if dict(os.environ) != before:
            os.environ.clear()
            os.environ.update(before)
