"""The largest forward pass that fits, found with a stand-in for a device's memory; cores by affinity and quota."""

from __future__ import annotations

import json
import math
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from patience import PATIENCE
from small_methods import run_command
from training_runs import assert_same_run, last_checkpoint, overrides

from clove_hub.training import recipe
from clove_hub.training.run.host import core_quota, default_workers, own_cores, share_of_cores
from clove_hub.training.run.sampler import possible_passes
from clove_hub.training.sizing import OutOfMemory, largest, made_crops, memory_explained, step_memory, workers_of
from clove_hub.training.step import assemble
from clove_hub.views import DeviceViews


def device(room: int, tried: list[int]):
    """A device with memory for so many images."""

    def need(size: int) -> tuple[float, float]:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return 10.0, 10.0 + size

    return need


@pytest.mark.parametrize(("room", "found"), [(1, 1), (5, 4), (48, 48), (63, 48), (1000, 96)])
def test_the_largest_that_fits_is_found_where_memory_ends_with_an_error(room, found):
    assert largest(possible_passes(None, 96, 1), device(room, []))[0] == found


@pytest.mark.parametrize(("budget", "found"), [(11.5, 1), (26, 16), (33.5, 16), (34, 24), (1e9, 96)])
def test_what_would_not_fit_a_known_budget_is_never_tried(budget, found):
    tried: list[int] = []
    assert largest(possible_passes(None, 96, 1), device(10**6, tried), budget)[0] == found
    assert max(tried) == found


def test_no_size_is_found_where_the_smallest_does_not_fit():
    assert largest([8, 16], device(4, [])) == (None, math.inf)


def test_another_error_passes():
    def need(size: int) -> tuple[float, float]:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        largest([8, 16], need)


def test_a_step_that_does_not_fit_names_what_does():
    asked = recipe.load("demo", ["data.path=x", "batch.total=64", "batch.per_device=64", "batch.norm_group=8"])
    message = r"64 images \(batch.per_device=64\).*batch.per_device=auto, .* or with batch.per_device=32 or 16 or 8;"
    with pytest.raises(OutOfMemory, match=message), memory_explained(asked, 64, 1, normalizes=True):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_cores_are_shared_by_the_processes_that_may_use_them():
    four = frozenset(range(4))
    assert share_of_cores(four, [four, four], math.inf) == 2
    assert share_of_cores(frozenset({0, 1}), [frozenset({0, 1}), frozenset({2, 3})], math.inf) == 2
    assert share_of_cores(four, [four], 1.5) == 1.5
    assert [default_workers(share) for share in (1, 2, 8, 200)] == [1, 1, 7, 16]


def test_a_control_groups_quota_counts(tmp_path: Path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/job").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "sys/fs/cgroup/job/cpu.max").write_text("150000 100000\n")
    assert core_quota(tmp_path) == 1.5
    (tmp_path / "sys/fs/cgroup/job/cpu.max").write_text("max 100000\n")
    assert core_quota(tmp_path) == math.inf


@pytest.mark.slow
def test_a_run_that_measures_is_the_run_of_the_number_that_it_found(photos, tmp_path):
    """Nothing of the trial stays, bit for bit; the number is part of the state."""
    for name, asked in (("auto", "auto"), ("given", 8)):
        changes = overrides(photos, tmp_path / name, batch__per_device=asked, schedule__warmup_epochs=0)
        assert run_command("pretrain", "demo", *changes) == 0
    assert_same_run(tmp_path / "auto", tmp_path / "given")
    assert json.loads((last_checkpoint(tmp_path / "auto") / "state.json").read_text())["per_device"] == 8


@pytest.mark.slow
def test_a_step_takes_the_memory_of_what_autograd_keeps(tmp_path):
    """What is tried of two sizes, beside the tensors that a forward pass keeps for each image; the rest are gradients on their way back.

    In a process of its own: one that has done much has memory to spare, which a step takes without growing.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        tried, computed = pool.submit(memory_of_an_image, tmp_path).result(PATIENCE)
    assert 0.8 * computed < tried < 1.7 * computed


def memory_of_an_image(folder: Path) -> tuple[float, float]:
    """Bytes as a step is tried, and of what autograd keeps."""
    sizes = {"backbone__model": "resnet18", "batch__total": 32, "batch__norm_group": 32}
    changes = overrides(folder, folder, **sizes)
    asked, accelerator = recipe.load("demo", changes), Accelerator(cpu=True)
    method, kept = assemble(asked, accelerator).method, {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*method.parameters(), *method.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = method(DeviceViews(method.view_spec)(made_crops(method.view_spec, 8)))
    assert loss.requires_grad
    need = step_memory(asked, accelerator)
    (_, few), (_, many) = need(8), need(32)
    return (many - few) / 24, sum(kept.values()) / 8


def test_too_many_workers_are_reported_once_for_each_host(caplog):
    hosts = [("", (name, own_cores())) for name in ("elsewhere", socket.gethostname(), socket.gethostname())]
    said = []
    for rank in (1, 2):
        caplog.clear()
        assert workers_of(1000, SimpleNamespace(rank=rank, gathered=lambda own: hosts)) == 1000
        said.append("data.workers=1000 is more than" in caplog.text)
    assert said == [True, False]
