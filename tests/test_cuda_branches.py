"""Branches that CUDA alone takes, on a stand-in for it (`pretended_cuda`): each device, stream and wait is the right one, in order."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from pretended_cuda import DEVICE, pretended_cuda
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from training_runs import assert_same_run, last_checkpoint, overrides, rows

from benchmarks.setting import made_crops
from clove_hub import batch_norm
from clove_hub.evaluation.processes import process_group
from clove_hub.evaluation.run import private_state
from clove_hub.export.seeds import count_gpus
from clove_hub.global_state import kept_generators
from clove_hub.methods import METHODS
from clove_hub.methods.clove import view_spec
from clove_hub.training import loop, sizing
from clove_hub.training.data import LoadedBatch
from clove_hub.training.outlook import memory, memory_in_words
from clove_hub.training.recipe import load
from clove_hub.training.run.device import make_accelerator, synchronized
from clove_hub.training.run.folder import RunFolder
from clove_hub.training.run.peers import PeerFailed, Peers
from clove_hub.training.run.rescue import Undo
from clove_hub.training.step import on_device
from clove_hub.views import color

# ---- a run -----------------------------------------------------------------------------------------------------------


def trained(photos: Path, run: Path, **changes: object) -> dict:
    """Trains; what the loader was asked for."""
    recipe = load("demo", overrides(photos, run, run__log_every=1, **changes))
    with mock.patch.object(loop, "make_loader", side_effect=loop.make_loader) as made:
        assert loop.train(recipe) == 0
    return made.call_args.kwargs


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_run_is_the_same_and_takes_the_devices_ways(made_photos, tmp_path):
    """The pass is sized by the device's memory, batches come page-locked and on a stream of their own."""
    asked = trained(made_photos, tmp_path / "cpu", batch__per_device=8)
    assert asked["pin_memory"] is False
    with pretended_cuda() as cuda:
        cuda.peak = 3 * 10**9
        asked = trained(made_photos, tmp_path / "cuda", batch__per_device="auto")
    assert (asked["pin_memory"], asked["micro_batch"]) == (True, 8)
    assert [what for what, _ in cuda.said].count("wait") == 4  # one of each step
    assert json.loads((last_checkpoint(tmp_path / "cuda") / "state.json").read_text())["hardware"] == "1 x a GPU (cuda)"
    assert {row.pop("device_memory_gb") for row in rows(tmp_path / "cuda")} == {3.0}
    assert_same_run(tmp_path / "cpu", tmp_path / "cuda", without={"device_memory_gb"})


# ---- the copy to the device ------------------------------------------------------------------------------------------


def test_a_batch_is_copied_while_the_one_before_is_worked_on():
    spec = view_spec(METHODS["clove"].settings(global_size=32, local_size=32, local_views=1))
    batches = [LoadedBatch(made_crops(spec, 2), [], [number]) for number in range(3)]
    with pretended_cuda() as cuda:

        def moved(batch: LoadedBatch, device: torch.device) -> LoadedBatch:
            assert device == DEVICE
            cuda.said.append(("copy", cuda.current))
            return batch

        with mock.patch("clove_hub.training.step.moved", moved):
            for batch in on_device(iter(batches), DEVICE):
                cuda.said.append(("use", cuda.current))
                tensors = [*batch.crops.crops, *batch.crops.boxes, *batch.crops.flipped]
                recorded = [value for what, value in cuda.said if what == "record"]
                assert {(id(one), "computing") for one in tensors} <= set(recorded)
    order = [what for what, _ in cuda.said if what != "record"]
    assert order == ["copy", "wait", "copy", "use", "wait", "copy", "use", "wait", "use"]
    assert {value for what, value in cuda.said if what == "copy"} == {"copying"}
    assert {value for what, value in cuda.said if what == "wait"} == {("computing", "copying")}
    assert {value for what, value in cuda.said if what == "use"} == {"computing"}


def test_the_plan_of_the_views_comes_from_page_locked_memory():
    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: mock.Mock(to=lambda *a, **k: (tensor, a, k))):
        sent, where, how = color._send(np.arange(3), DEVICE)
    assert sent.tolist() == [0, 1, 2]
    assert (where, how) == ((DEVICE,), {"non_blocking": True})


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_read_after_the_device_is_done():
    with pretended_cuda() as cuda:
        cuda.held, cuda.peak = 5, 7
        assert (sizing.held(DEVICE), sizing.peak(DEVICE)) == (5, 7)
        assert sizing.cleared(DEVICE) == 5
        assert memory(DEVICE).device == 7e-9
    assert [what for what, _ in cuda.said] == [
        *("synchronize", "memory_allocated", "max_memory_allocated"),
        *("reset_peak_memory_stats", "synchronize", "memory_allocated", "max_memory_allocated"),
    ]


def test_what_a_run_says_of_memory_names_what_the_device_has():
    with pretended_cuda(80 * 10**9):
        assert memory_in_words(memory(DEVICE)._replace(device=12.34), DEVICE).startswith(
            "12.3 of 80.0 GB of the device's"
        )


def test_a_trial_does_without_a_tenth_of_the_devices_memory(tmp_path):
    asked, empty = [], torch.empty

    def emptied(*size: object, **settings: object) -> torch.Tensor:
        if size == (40,):
            asked.append(settings)
        return empty(*size, **settings)

    with pretended_cuda(total=400) as cuda, mock.patch.object(torch, "empty", emptied):
        cuda.held = 11
        recipe = load("demo", overrides(tmp_path, tmp_path))
        assert sizing.try_steps(recipe, make_accelerator("fp32", 1.0), 4) == 11
    assert asked == [{"dtype": torch.uint8, "device": DEVICE}]


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "backend"), [(None, "nccl"), ("cuda", "nccl"), ("cpu", "gloo")])
def test_each_process_that_evaluates_has_the_device_of_its_local_rank(monkeypatch, asked, backend):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.append(device))
    monkeypatch.setattr(dist, "init_process_group", said.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: said.append("left"))
    with process_group(asked) as device:
        assert device == ("cpu" if asked == "cpu" else str(DEVICE))
    assert said == [*([] if asked == "cpu" else [DEVICE]), backend, "left"]  # nccl takes the device that is set before


def test_batch_norm_over_gpus_is_torchs_own(monkeypatch):
    """With the group's processes, their number, and the statistics that come back in the place of those of one step."""
    said = {}

    class OnGpu(torch.Tensor):
        is_cuda = True

    def synchronized_norm(x, weight, bias, mean, variance, eps, momentum, processes, span):
        said.update(processes=processes, span=span, momentum=momentum, kind=mean.dtype)
        plain = x.as_subclass(torch.Tensor)
        return F.batch_norm(plain, mean, variance, weight, bias, training=True, momentum=momentum, eps=eps)

    monkeypatch.setattr(batch_norm.SyncBatchNormFunction, "apply", synchronized_norm)
    processes = object()
    layer = nn.BatchNorm2d(3)
    groups = batch_norm.NormGroups(group=8, images=4, rank=0, world=2, processes=processes)
    norm = batch_norm.GroupedBatchNorm(layer, groups)
    x = torch.randn(4, 3, 2, 2)
    found = norm(x.as_subclass(OnGpu))
    assert torch.allclose(found, nn.BatchNorm2d(3)(x))
    assert said == {"processes": processes, "span": 2, "momentum": 1.0, "kind": torch.float32}
    assert torch.allclose(norm.taken[0][0, 0], x.mean((0, 2, 3)))


def test_fine_tuning_over_gpus_synchronizes_batch_norm():
    for processes, device, over_all in ((1, DEVICE, False), (2, torch.device("cpu"), False), (2, DEVICE, True)):
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        done = synchronized(network, SimpleNamespace(num_processes=processes, device=device))
        assert any(isinstance(one, nn.SyncBatchNorm) for one in done.modules()) is over_all


@pytest.mark.parametrize("on_gpu", [True, False])
def test_nothing_is_read_from_a_device_that_waits_for_a_process_that_is_gone(tmp_path, on_gpu):
    undo, rescued = Undo([]), []
    undo.tensors = [SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=on_gpu)]
    folder = RunFolder(tmp_path / "run", Peers(1.0), 2, "run.output")
    with pytest.raises(PeerFailed), folder, folder.rescuing(undo, lambda: rescued.append(True)):
        raise PeerFailed("process 1 is gone")
    assert rescued == [True] * (not on_gpu)


# ---- random numbers and counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("initialized", [True, False])
def test_the_generators_of_all_devices_in_use_are_put_back(monkeypatch, initialized):
    forked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda devices: forked.append(list(devices)) or contextlib.nullcontext()
    )
    with kept_generators():
        pass
    assert forked == [[0, 1, 2] if initialized else []]


def test_an_evaluation_on_a_gpu_seeds_its_generator(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    for device in (torch.device("cpu"), DEVICE):
        with private_state(5, device):
            pass
    assert seeded == [5]


def test_detectron2_trains_on_the_gpus_that_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [count_gpus(wanted) for wanted in (None, 0, 3, 4)] == [4, 0, 3, 4]
    with pytest.raises(ValueError, match="--gpus 5, but PyTorch finds 4"):
        count_gpus(5)
