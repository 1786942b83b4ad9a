"""Run a protocol on a model and record the result, without changing the model or the random state."""

from __future__ import annotations

import logging
import random
import shlex
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from clove_hub.global_state import kept_generators
from clove_hub.settings import build, nearest, plain

from ..backbones import evaluating
from ..weights.backbone import Backbone, Precision
from ..weights.weights import Preprocessing, architecture_of, fingerprint
from . import PROTOCOLS
from .result import RANDOM, Outcome, Record, now, versions

log = logging.getLogger(__name__)


def run_protocol(
    name: str,
    model: nn.Module,
    preprocessing: Preprocessing,
    data: str | Path,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    what: str = "a model in memory",
    model_args: Mapping[str, Any] | None = None,
    precision: Precision = "fp32",
) -> Record:
    """Evaluate a model by a protocol.

    It changes neither the model (parameters, buffers, modes, gradients) nor any global random state (torch, NumPy,
    Python), so a training run may call it at any step. In a process group all processes call it, and all get the
    record.

    Args:
        name: one of `PROTOCOLS`.
        model: a timm model without a classifier.
        data: the folder that the protocol reads; `docs/protocols` describes its layout.
        settings: settings that differ from the protocol's defaults, by name.
        seed: random seed of the protocol.
        what: the model's name in the record.
        model_args: arguments of `timm.create_model`, besides the name, with which the model was made.
        precision: of the forward pass; the record has it among the preprocessing where it is not fp32.

    Raises:
        ValueError: there is no such protocol, setting or precision, or something is wrong with the data.
    """
    protocol = find_protocol(name)
    chosen = make_settings(name, settings or {})
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; expected a whole number from 0 to {2**32 - 1}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; expected {' or '.join(get_args(Precision))}")
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"the data {data} is not a folder")
    device = next(model.parameters()).device
    architecture = architecture_of(model)
    weights = fingerprint(architecture, model.state_dict(), model_args)
    unmixed = torch.autocast(device.type, enabled=False)
    began = time.perf_counter()
    with evaluating(model), private_state(seed, device), unmixed, torch.no_grad():
        outcome: Outcome = protocol.evaluate(
            Backbone(model, preprocessing, what, precision=precision), folder, chosen, seed
        )
    if outcome.absent:
        log.warning("%s: classes that never occur in the ground truth of %s: %s", name, data, ", ".join(outcome.absent))
    seen = {key: value for key, value in plain(preprocessing).items() if key in protocol.PREPROCESSING}
    return Record(
        protocol=name,
        version=protocol.VERSION,
        rule=getattr(chosen, "rule", protocol.RULE),
        model=what,
        architecture=architecture,
        weights=weights,
        randomness=getattr(chosen, "randomness", protocol.RANDOMNESS),
        random_weights=what.startswith(RANDOM),
        settings=plain(chosen) | outcome.chosen,
        preprocessing=seen | ({"precision": precision} if precision != "fp32" else {}),
        seconds=round(time.perf_counter() - began, 3),
        versions=versions(),
        date=now(),
        **{key: value for key, value in vars(outcome).items() if key != "chosen"},
    )


def find_protocol(name: str) -> types.ModuleType:
    """The module of a protocol.

    Raises:
        ValueError: there is none of this name.
    """
    if name == "fcn":
        raise ValueError(fine_tuned("SOURCE", data="DIR"))
    if name not in PROTOCOLS:
        raise ValueError(
            f"there is no protocol {name!r}{nearest(name, list(PROTOCOLS))}: choose one of {', '.join(PROTOCOLS)}"
        )
    return import_module(f".{name.replace('-', '_')}", __package__)


def fine_tuned(source: str, data: str | Path, schedule: str = "revisiting_voc") -> str:
    """The replacement of the protocol `fcn` of version 0.1, whose schedules were `voc` and `cityscapes`."""
    preset = f"fcn_revisiting_{schedule.removeprefix('revisiting_')}"
    command = f"clove-hub downstream torchvision segmentation --preset {preset}"
    return f"fcn is fine-tuning, not an evaluation protocol: {command} --backbone {shlex.quote(source)} --data {shlex.quote(str(data))}"


def make_settings(name: str, given: Mapping[str, Any]) -> Any:
    """The protocol's settings, with the given ones.

    Raises:
        ValueError: a name is unknown, or a value is of another type or outside what it can be.
    """
    return build(find_protocol(name).Settings, given, name)


@contextmanager
def private_state(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's, NumPy's and Python's global generators start from the seed, and are restored afterwards.

    Meanwhile, convolutions use cuDNN's deterministic algorithms.
    """
    cudnn = torch.backends.cudnn
    algorithms = cudnn.deterministic, cudnn.benchmark
    with kept_generators():
        try:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed every accelerator as well
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            cudnn.deterministic, cudnn.benchmark = True, False
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = algorithms
