"""A step on an accelerator never waits for it: known without one, on tensors that have no values.

On torch's meta device whatever would bring a value to the host (`.item()`, `.cpu()`, `if tensor`, `nonzero`, a mask as an index: shapes
that depend on data) raises. Copies the other way, from memory that is not page-locked, wait too, and are counted. Known exceptions:
optimizers of timm, which have no gate, so that the host decides at every step; float16's scaler, which is a GPU's own.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.curves import RECIPE
from benchmarks.setting import made_crops
from benchmarks.small import small
from benchmarks.train_state import step, step_on
from clove_hub.batch_norm import group_batch_norms
from clove_hub.methods import METHODS
from clove_hub.training.optimizer import make_optimizer
from clove_hub.training.recipe import load
from clove_hub.training.run.rescue import Undo, untrained
from clove_hub.training.step import TrainState, assemble

META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Records which operations read memory of the host and write the device's."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        out = function(*arguments, **(settings or {}))
        sources = [one for one in arguments if isinstance(one, torch.Tensor) and one.device.type == "cpu" and one.ndim]
        if sources and isinstance(out, torch.Tensor) and out.device == META:
            self.found.append(str(function))
        return out


class Made(TorchFunctionMode):
    """Records tensors that are made of the host's numbers, which no dispatch shows."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, arguments=(), settings=None):
        if function in (torch.tensor, torch.as_tensor, torch.asarray):
            self.found.append(function.__name__)
        return function(*arguments, **(settings or {}))


@contextlib.contextmanager
def copies() -> Iterator[list[str]]:
    """What is copied to the device within the context."""
    found: list[str] = []
    with Copies(found), Made(found):
        yield found


@contextlib.contextmanager
def no_values() -> Iterator[None]:
    """What the meta device lacks: autocast, and a kernel that reads and writes without asking the host."""
    with (
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
        mock.patch.object(torch, "_fused_sgd_", lambda *_, **settings: settings["found_inf"].shape),
    ):
        yield


def on_meta(name: str) -> TrainState:
    """The method as the loop steps with it on an accelerator, with an Accelerator's few words that a step needs."""
    recipe = load(RECIPE[name], [*small(name), "data.path=x", "run.output=x"])
    method = assemble(recipe, Accelerator(cpu=True)).method
    group_batch_norms(method, 4, 8)
    method.to(META)
    optimizer = make_optimizer(method, recipe.optimizer, {})
    accelerator = SimpleNamespace(
        device=META,
        scaler=None,
        backward=lambda loss: loss.backward(),
        unscale_gradients=lambda _: None,
        reduce=lambda values, _: values,
        no_sync=lambda _: contextlib.nullcontext(),
    )
    return TrainState(accelerator, method, method, optimizer, optimizer, Undo(untrained(method)), deferred=True)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_asks_the_device_for_nothing(name):
    train_state = on_meta(name)
    crops = made_crops(train_state.method.view_spec, 8).to(META)
    with no_values():
        for _ in range(2):
            step(train_state, crops)
        views = train_state.make_views(crops)  # their plan is copied from page-locked memory
        with copies() as found:
            step_on(train_state, views, crops)
    assert not found


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
    ],
)
def test_what_would_wait_is_found(wait):
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.empty(3, device=META))


@pytest.mark.parametrize(
    "copy",
    [
        lambda: torch.ones(3).to(META),
        lambda: torch.tensor([1.0, 2.0], device=META),
        lambda: torch.empty(3, device=META).copy_(torch.ones(3)),
    ],
)
def test_what_would_be_copied_is_counted(copy):
    with copies() as found:
        copy()
    assert found
