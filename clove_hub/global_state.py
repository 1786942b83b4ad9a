"""What a library leaves as it was: global random generators and environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_generators() -> Iterator[None]:
    """Within the context (or a function decorated with it) global random numbers may be drawn and seeded.

    Torch's, NumPy's and Python's go on afterwards as if nothing had been drawn. Accelerators that were not in use
    before have no generator to put back.
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
    """Within the context environment variables may be set; afterwards they are as before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if dict(os.environ) != before:
            os.environ.clear()
            os.environ.update(before)
