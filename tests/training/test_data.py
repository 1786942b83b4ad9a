"""What a step sees depends on the seed and the step alone, not on workers, processes or restarts."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from loading import IMAGES, SEED, SPEC, InMemory, assert_same, load, png, samples
from patience import PATIENCE
from PIL import Image

from clove_hub.training.data import (
    Broken,
    EpochOrder,
    Item,
    ViewDataset,
    steps_per_epoch,
)
from clove_hub.training.run.loader import WorkerFailed
from clove_hub.training.run.sampler import StepSampler
from clove_hub.training.sources import BrokenImage, DataSettings, Encoded, Source, Stream, open_source, shards
from clove_hub.training.sources.source import shuffled, shuffled_in_blocks
from clove_hub.views import allocate, draw, write_sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        (path / f"{number:02}.png").write_bytes(png(number))
    (path / "05.png").write_bytes(png(5)[:200])
    source = open_source(DataSettings(str(path)))
    assert not isinstance(source, Stream)
    return source


@pytest.fixture(scope="module")
def row_stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    path = tmp_path_factory.mktemp("table")
    cells = [png(number) for number in range(IMAGES)]
    cells[5] = cells[5][:200]
    table = datasets.Dataset.from_dict({"image": cells})
    for part in range(2):
        table.shard(2, part).to_parquet(path / f"train-{part}.parquet")
    datasets.disable_progress_bars()
    source = open_source(DataSettings(str(path), source="huggingface", streaming=True, length=IMAGES))
    assert isinstance(source, Stream)
    return source


@pytest.fixture(scope="module")
def tar_shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """Three shards whose blocks hold three images or so."""
    path = tmp_path_factory.mktemp("shards")
    for number in range(3):
        with tarfile.open(path / f"{number}.tar", "w") as tar:
            for image in range(number * 9, min(number * 9 + 9, IMAGES)):
                data = png(image)[: 200 if image == 5 else None]
                info = tarfile.TarInfo(f"{image:02}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_BLOCK", 16384)
        patch.setattr(shards, "_WINDOW", 8)
        source = open_source(DataSettings(str(path), source="shards"))
        assert isinstance(source, shards.Shards)
        assert 6 < len(source.blocks) < 13
        yield source


@pytest.fixture(params=["folder", "tar_shards", "row_stream"])
def source(request: pytest.FixtureRequest) -> Source | Stream:
    """The ways in which images come: by index, in any order or block by block, and one after the other.

    One of the images is broken.
    """
    found: Source | Stream = request.getfixturevalue(request.param)
    return found


# ---- the order -------------------------------------------------------------------------------------------


BLOCKS = np.sort(np.random.default_rng(0).choice(np.arange(1, 1000), 39, replace=False)).tolist()


def in_blocks(seed: int, epoch: int, length: int, window: int = 90) -> np.ndarray:
    """Forty blocks of different sizes, or as many as begin before `length`."""
    starts = np.array([0, *(start for start in BLOCKS if start < length)])
    return shuffled_in_blocks(seed, epoch, starts, length, window)


@pytest.mark.parametrize("order", [shuffled, in_blocks])
def test_the_order_is_a_permutation_of_seed_and_epoch(order: Callable[[int, int, int], np.ndarray]) -> None:
    first = order(SEED, 0, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert np.array_equal(first, order(SEED, 0, 1000))
    assert not np.array_equal(first, order(SEED, 1, 1000))
    assert not np.array_equal(first, order(SEED + 1, 0, 1000))


def test_every_place_in_the_order_is_as_likely_as_any_other() -> None:
    """Chi-square of where image 0 lands among 8, over 4,000 epochs: 7 degrees of freedom, 0.1 % at 24.3."""
    two_blocks = np.array([0, 3])
    for order in (
        lambda epoch: shuffled(SEED, epoch, 8),
        lambda epoch: shuffled_in_blocks(SEED, epoch, two_blocks, 8, 5),
    ):
        places = Counter(order(epoch).tolist().index(0) for epoch in range(4000))
        assert sum((places[place] - 500) ** 2 / 500 for place in range(8)) < 24.3


def test_the_order_never_changes() -> None:
    """A run that resumes under another version of NumPy or of this package must find the same order."""
    assert shuffled(0, 0, 10).tolist() == [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]
    assert shuffled_in_blocks(0, 0, np.array([0, 4, 7]), 10, 5).tolist() == [0, 9, 2, 3, 4, 1, 6, 5, 7, 8]


def test_a_window_as_large_as_the_set_shuffles_it_completely() -> None:
    """Neighbors in the set are as far apart in the order as any two: a third of its length on average."""
    places = in_blocks(SEED, 0, 3000, window=8192).argsort()
    assert abs(np.abs(np.diff(places)).mean() / 1000 - 1) < 0.05
    assert abs(np.corrcoef(np.arange(3000), places)[0, 1]) < 0.06


def fetches(order: np.ndarray, starts: np.ndarray, kept: int) -> int:
    """How often a block must be read as a whole, where the `kept` blocks used last are still in memory."""
    memory: dict[int, None] = {}
    count = 0
    for block in (np.searchsorted(starts, order, side="right") - 1).tolist():
        count += block not in memory
        memory.pop(block, None)
        memory[block] = None
        if len(memory) > kept:
            del memory[next(iter(memory))]
    return count


def test_an_order_in_blocks_reads_each_block_about_once_and_mixes_as_many_as_its_window_holds() -> None:
    """400 blocks of 75 images, as ImageNet has in 8 MiB, with a window of a fifteenth of the images."""
    starts, length, window = np.arange(0, 30_000, 75), 30_000, 2000
    for epoch in range(2):
        order = shuffled_in_blocks(SEED, epoch, starts, length, window)
        in_window = window // 75 + 1
        # At first the blocks are read that go around the end, at last they are read again.
        assert fetches(order, starts, 2 * in_window) <= 400 + in_window + 1
        assert fetches(shuffled(SEED, epoch, length), starts, 2 * in_window) > 25_000
        # A batch of 256 comes from nearly all of the blocks that are open, at the ends of an epoch too.
        for batch in np.split(order[: length // 256 * 256], length // 256):
            assert len(np.unique(batch // 75)) > 0.8 * in_window
        # No trace is left of the place in the set, neither from far nor near.
        places = order.argsort()
        assert abs(np.corrcoef(np.arange(length), places)[0, 1]) < 0.2  # by chance, from 400 blocks: 0.05
        steps = np.diff(places.reshape(400, 75), axis=1)
        assert abs((steps > 0).mean() - 0.5) < 0.02


# ---- the sampler -----------------------------------------------------------------------------------------


def indices(sampler: StepSampler) -> list[list[int]]:
    return [[item.index for item in items] for items in sampler]


def test_steps_take_the_epochs_order_in_turn_and_drop_the_rest(folder: Source) -> None:
    sampler = StepSampler(EpochOrder(folder, SEED, 8), 8, 8, 0, 1, 0, 5)
    expected = [folder.order(SEED, step // 3)[step % 3 * 8 :][:8].tolist() for step in range(5)]
    assert indices(sampler) == expected
    assert [items[0].epoch for items in sampler] == [0, 0, 0, 1, 1]


def test_micro_batches_are_dealt_to_the_ranks_in_turn(folder: Source) -> None:
    whole = folder.order(SEED, 0)[:8].tolist()
    dealt = [indices(StepSampler(EpochOrder(folder, SEED, 8), 8, 2, rank, 2, 0, 1)) for rank in range(2)]
    assert dealt == [[whole[0:2], whole[4:6]], [whole[2:4], whole[6:8]]]


def test_the_sampler_gives_the_micro_batches_of_all_its_steps(source: Source | Stream) -> None:
    sampler = StepSampler(EpochOrder(source, SEED, 8), 8, 2, 1, 2, 2, 7)
    assert len(list(sampler)) == 5 * 2
    assert list(StepSampler(EpochOrder(source, SEED, 8), 8, 2, 0, 2, 7, 7)) == []


def test_a_global_batch_that_does_not_divide_is_refused(folder: Source) -> None:
    with pytest.raises(ValueError, match=r"batch.total=8 .* 3 processes x 2 images.*multiple of 6"):
        StepSampler(EpochOrder(folder, SEED, 8), 8, 2, 0, 3, 0, 1)


def test_a_source_smaller_than_one_global_batch_is_refused(source: Source | Stream) -> None:
    assert steps_per_epoch(source, IMAGES) == 1
    with pytest.raises(ValueError, match=r"has 26 images, fewer than one global batch \(batch.total=27\)"):
        steps_per_epoch(source, IMAGES + 1)
    with pytest.raises(ValueError, match=r"batch.total=32"):
        load(source, global_batch=32)


def test_an_epoch_may_be_exactly_one_global_batch(folder: Source) -> None:
    batches = indices(StepSampler(EpochOrder(folder, SEED, IMAGES), IMAGES, IMAGES, 0, 1, 0, 3))
    assert [sorted(batch) for batch in batches] == [list(range(IMAGES))] * 3
    assert batches[0] != batches[1]


def test_a_stream_shorter_than_it_was_said_to_be_is_an_error(row_stream: Stream) -> None:
    longer = replace(row_stream, length=40)
    with pytest.raises(
        ValueError, match=r"ended after 26 images instead of 40: set data.length=26 and another run\.output"
    ):
        list(StepSampler(EpochOrder(longer, SEED, 8), 8, 8, 0, 1, 0, 5))


# ---- what a step sees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source: Source | Stream, workers: int) -> None:
    alone = list(load(source))
    assert len(alone) == 16
    for left, right in zip(alone, load(source, workers=workers), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("start", [1, 3, 5, 7])
def test_a_start_in_the_middle_continues_as_if_nothing_had_happened(source: Source | Stream, start: int) -> None:
    whole = list(load(source))
    resumed = list(load(source, start))
    assert len(resumed) == len(whole) - 2 * start
    for left, right in zip(whole[2 * start :], resumed, strict=True):
        assert_same(left, right)


def test_a_resumed_run_with_other_workers_sees_the_same(source: Source | Stream) -> None:
    for left, right in zip(list(load(source))[8:], load(source, 4, workers=2), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize(("world", "micro_batch"), [(2, 4), (2, 2), (4, 1)])
def test_several_processes_together_see_what_one_sees(source: Source | Stream, world: int, micro_batch: int) -> None:
    for step in range(4):
        alone = list(samples(load(source, step, step + 1)))
        dealt = [
            list(samples(load(source, step, step + 1, rank=rank, world=world, micro_batch=micro_batch)))
            for rank in range(world)
        ]
        assert sorted(alone) == sorted(sample for of_rank in dealt for sample in of_rank)
        assert len({index for index, *_ in alone}) == 8


@pytest.mark.slow
def test_two_real_processes_with_workers_see_what_one_sees(folder: Source) -> None:
    """Two processes at the same time, each with its own worker, against this one without."""
    script = textwrap.dedent(
        """
        import hashlib, sys
        sys.path[:0] = [sys.argv[1]]
        from loading import load, samples
        from clove_hub.training.sources import DataSettings, open_source
        source = open_source(DataSettings(sys.argv[2]))
        for sample in samples(load(source, 1, 3, rank=int(sys.argv[3]), world=2, workers=1)):
            print(sample[0], hashlib.sha256(b"".join(sample[1:])).hexdigest())
        """
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1] / "support"), folder.roots[0]]
    running = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    lines = [line for process in running for line in process.communicate(timeout=PATIENCE)[0].splitlines()]
    alone = [f"{index} {sha256(b''.join(rest)).hexdigest()}" for index, *rest in samples(load(folder, 1, 3))]
    assert sorted(lines) == sorted(alone)


def test_the_crops_are_those_of_the_image_at_its_index(folder: Source) -> None:
    (batch,) = load(InMemory([png(number) for number in range(8)]), 1, 2, micro_batch=8)
    for position, index in enumerate(batch.indices):
        with Image.open(io.BytesIO(png(index))) as image:
            pixels = np.array(image)
        alone = allocate(SPEC, 1)
        write_sample(alone, 0, pixels, draw(SPEC, SEED, 1, index, *pixels.shape[:2]))
        for got, expected in zip(batch.crops.crops, alone.crops, strict=True):
            assert torch.equal(got[:, position], expected[:, 0])


def test_another_epoch_crops_the_same_image_differently(folder: Source) -> None:
    dataset = ViewDataset(folder, SPEC, SEED)
    first, second = (dataset.__getitems__([Item(epoch, 3)]).crops for epoch in range(2))
    assert not torch.equal(first.boxes[0], second.boxes[0])


def test_making_and_reading_a_loader_leaves_the_global_random_state_alone(folder: Source) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # the state that must not change
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(load(folder, stop=1, workers=1))
    list(load(folder, stop=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


# ---- broken images ---------------------------------------------------------------------------------------


def test_a_broken_image_is_replaced_the_same_way_every_time_and_named() -> None:
    images = [png(number) for number in range(8)]
    images[3], images[6] = b"not an image", b""
    (batch,) = load(InMemory(images), stop=1, micro_batch=8)
    (again,) = load(InMemory(images), stop=1, micro_batch=8, workers=1)
    assert_same(batch, again)
    assert {"3.png", "6.png"} <= {name for name, _ in batch.broken}
    reasons = dict(batch.broken)
    assert "not an image" in reasons["3.png"]
    assert reasons["6.png"] == "the file is empty"
    (whole,) = load(InMemory([png(number) for number in range(8)]), stop=1, micro_batch=8)
    assert batch.indices == whole.indices
    for position, index in enumerate(batch.indices):
        same = torch.equal(batch.crops.crops[0][:, position], whole.crops.crops[0][:, position])
        assert same == (index not in (3, 6))


def test_broken_images_get_different_substitutes_with_their_own_crops() -> None:
    images = [png(0)[:100]] * 100 + [png(number) for number in range(1, 9)] * 25
    dataset = ViewDataset(InMemory(images), SPEC, SEED)
    read: list[int] = []
    original = InMemory.read
    dataset.source.read = lambda index: read.append(index) or original(dataset.source, index)
    batch = dataset.__getitems__([Item(0, index) for index in range(20)])
    substitutes = [index for index in read if index >= 100]
    assert len(substitutes) == 20
    assert len(set(substitutes)) > 15
    assert Counter(batch.broken)[Broken("5.png", batch.broken[0].reason)] >= 1
    assert len(torch.unique(batch.crops.boxes[0][0], dim=0)) == 20


def test_in_a_stream_the_first_good_image_takes_the_place_of_a_broken_one(row_stream: Stream) -> None:
    dataset = ViewDataset(row_stream, SPEC, SEED)
    item = next(
        Item(0, index, image) for index, image in enumerate(row_stream.walk(SEED, 0)) if image.data == png(5)[:200]
    )
    batch = dataset.__getitems__([item])
    assert batch.broken == [Broken(item.image.name, batch.broken[0].reason)]
    assert "truncated" in batch.broken[0].reason
    good = Item(0, item.index, item.image._replace(data=row_stream.spare.data))
    assert torch.equal(batch.crops.crops[0], dataset.__getitems__([good]).crops.crops[0])


def test_a_source_of_nothing_but_broken_images_stops_with_the_reasons() -> None:
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"17 images of 'in memory' in a row.*\.png: not an image"):
            list(load(InMemory([b"torn"] * 8), workers=workers))


def test_an_image_that_cannot_be_read_is_replaced_too() -> None:
    class Unreadable(InMemory):
        def read(self, index: int) -> Encoded:
            if index == 2:
                raise BrokenImage("2.png", "cannot be read: Input/output error")
            return super().read(index)

    (batch,) = load(Unreadable([png(number) for number in range(8)]), stop=1, micro_batch=8)
    assert Broken("2.png", "cannot be read: Input/output error") in batch.broken


# ---- workers and the machine -----------------------------------------------------------------------------


class InWorker(InMemory):
    """Does something to the worker that reads from it."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__([png(0)] * 8)
        self.act = act

    def read(self, index: int) -> Encoded:
        self.act()
        return super().read(index)


def die_of_a_bus_error() -> None:
    time.sleep(0.5)  # until the training process waits for the batch
    os.kill(os.getpid(), signal.SIGBUS)


def no_space() -> None:
    raise OSError(28, "No space left on device")


def resize() -> None:
    raise RuntimeError("unable to resize file </torch_1_2_3> to the right size: No space left on device (28)")


@pytest.mark.parametrize("act", [die_of_a_bus_error, no_space, resize])
def test_a_lack_of_shared_memory_names_shm_size(act: Callable[[], None]) -> None:
    with pytest.raises(WorkerFailed, match=r"shared memory.*1 workers.*--shm-size=1g.*data.workers") as caught:
        list(load(InWorker(act), workers=1))
    assert caught.value.__cause__ is not None


@pytest.mark.slow
def test_a_full_shared_memory_ends_in_that_error_and_never_in_waiting() -> None:
    """With a real /dev/shm of one megabyte, in a mount namespace of its own."""
    script = """
        import sys
        sys.path[:0] = [sys.argv[1]]
        from loading import SEED, InMemory, png
        from clove_hub.training.data import make_loader
        from clove_hub.training.run.loader import WorkerFailed
        from clove_hub.views import View, ViewSpec
        spec = ViewSpec((View(size=224, scale=(0.2, 1.0)),))
        try:
            list(make_loader(InMemory([png(0)] * 32), spec, seed=SEED, global_batch=32, micro_batch=32,
                             rank=0, world=1, start_step=0, stop_step=4, workers=1, pin_memory=False))
        except WorkerFailed as error:
            print(error)
    """
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    isolated = ["unshare", "-Urm", "sh", "-c"]
    try:
        subprocess.run([*isolated, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let a test mount a file system of its own")
    code = textwrap.dedent(script)
    done = subprocess.run(
        [
            *isolated,
            f'{mount} && exec "$@"',
            "sh",
            sys.executable,
            "-c",
            code,
            str(Path(__file__).parents[1] / "support"),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "--shm-size" in done.stdout, done.stderr


def test_other_errors_of_a_worker_are_left_as_they_are() -> None:
    def fail() -> None:
        raise RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)")

    with pytest.raises(RuntimeError, match="Too many open files") as caught:
        list(load(InWorker(fail), workers=1))
    assert "--shm-size" not in str(caught.value)


def test_the_workers_of_a_loader_that_failed_have_ended() -> None:
    before = multiprocessing.active_children()
    with pytest.raises(WorkerFailed, match="--shm-size") as caught:
        list(load(InWorker(no_space), workers=1))
    assert set(multiprocessing.active_children()) <= set(before)
    assert caught.value is not None  # holds the loader


def test_crops_wait_in_shared_memory_so_that_nothing_copies_them(folder: Source) -> None:
    for workers, shared in ((0, False), (1, True)):
        (batch,) = load(folder, stop=1, micro_batch=8, workers=workers)
        tensors = [*batch.crops.crops, *batch.crops.boxes, *batch.crops.flipped]
        assert {tensor.is_shared() for tensor in tensors} == {shared}


def test_workers_outlive_the_signals_that_ask_a_run_to_end(folder: Source) -> None:
    before = multiprocessing.active_children()
    batches = iter(load(folder, stop=300, workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()).difference(before)
    stop = threading.Event()

    def pester() -> None:  # at any moment, also while the worker is inside a system call
        while not stop.wait(0.0003):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(worker.pid, number)

    pest = threading.Thread(target=pester)
    pest.start()
    try:
        for _ in range(200):
            next(batches)
    finally:
        stop.set()
        pest.join()
    assert worker.is_alive()
    del batches
    worker.join(PATIENCE)
    assert not worker.is_alive()


def test_a_run_that_fails_does_not_wait_for_its_workers() -> None:
    """Python ends daemonic processes with SIGTERM and waits: a worker that ignored it would hang the exit."""
    script = """
        import sys
        sys.path[:0] = [sys.argv[1]]
        from loading import InMemory, load, png
        batches = iter(load(InMemory([png(number) for number in range(8)]), stop=1000, workers=1))
        next(batches)
        raise RuntimeError("the loss is not finite")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parents[1] / "support")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert "the loss is not finite" in done.stderr


def test_a_loader_gives_the_micro_batches_of_all_its_steps(folder: Source) -> None:
    assert len(list(load(folder, 2, 8))) == 12
