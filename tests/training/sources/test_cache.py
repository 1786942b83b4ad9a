"""Decoded images that are kept in memory are the same images, decoded once, and refuse to start where they cannot fit."""

from __future__ import annotations

import io
import logging
import multiprocessing
import sys
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path

import numpy as np
import pytest
from loading import IMAGES, SEED, SPEC, InMemory, assert_same, load, png
from patience import PATIENCE
from PIL import Image

from clove_hub.data.bands import Reading
from clove_hub.data.images import decode
from clove_hub.training.data import make_loader
from clove_hub.training.run.host import available_memory
from clove_hub.training.sources import Encoded, cache, open_cache


class Counting(InMemory):
    """Counts how often each image is read, over all processes."""

    def __init__(self, images: list[bytes]) -> None:
        super().__init__(images)
        self.reads = RawArray("i", len(images))

    def read(self, index: int) -> Encoded:
        self.reads[index] += 1
        return super().read(index)


@pytest.fixture
def source() -> Counting:
    images = [png(number) for number in range(24)]
    images[5] = images[5][:200]
    return Counting(images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_changes_nothing_but_how_often_images_are_read(source: Counting, workers: int) -> None:
    plain = list(load(source, stop=12))  # four epochs of three steps
    assert min(source.reads) >= 4
    before = list(source.reads)
    cached = list(load(source, stop=12, workers=workers, cache=True))
    for left, right in zip(plain, cached, strict=True):
        assert_same(left, right)
    assert any(name == "5.png" for batch in cached for name, _ in batch.broken)
    again = [after - earlier for after, earlier in zip(source.reads, before, strict=True)]
    # Once for its size, once to decode it; a second worker may be at it at the same moment.
    assert max(count for index, count in enumerate(again) if index != 5) <= (3 if workers else 2)
    assert again[5] >= 4  # a broken image is not kept: it is named each time


def test_the_workers_share_one_copy() -> None:
    source = Counting([png(number) for number in range(4)])
    kept = open_cache(source, Reading())
    done = RawValue("i", 0)

    def work() -> None:
        kept.put(2, decode(png(2)))
        done.value = 1

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join(PATIENCE)
    assert done.value == 1
    np.testing.assert_array_equal(kept.get(2), decode(png(2)))
    assert kept.get(1) is None


def test_an_image_is_kept_once_and_at_its_own_place() -> None:
    kept = open_cache(InMemory([png(number) for number in range(4)]), Reading())
    for number in (3, 0, 3, 2):
        kept.put(number, decode(png(number)))
    kept.put(3, decode(png(3)) ^ 255)
    for number in (3, 0, 2):
        np.testing.assert_array_equal(kept.get(number), decode(png(number)))
    assert kept.used[0] == sum(decode(png(number)).nbytes for number in (3, 0, 2))


def test_a_cache_is_as_large_as_the_images_that_fit_are_together() -> None:
    images = [png(number) for number in range(4)]
    kept = open_cache(InMemory([*images, b"not an image", images[0][:200]]), Reading())
    # Of a truncated file the head still says a size.
    assert len(kept.pixels) == sum(decode(data).nbytes for data in [*images, images[0]])


def test_a_cache_that_is_full_says_so_once_and_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SAMPLED", 2)
    monkeypatch.setattr(cache, "_SLACK", 0.5)  # as if the two had been small by chance
    source = Counting([png(number) for number in range(24)])
    plain = list(load(source, stop=9))
    with caplog.at_level(logging.WARNING):
        for left, right in zip(plain, load(source, stop=9, cache=True), strict=True):
            assert_same(left, right)
    (record,) = caplog.records
    assert "are full" in record.getMessage()


def test_images_that_cannot_fit_are_refused_at_start_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    source = InMemory([png(20)] * 100)  # 50 x 40 x 3 bytes each: 600 kB together
    monkeypatch.setattr(cache, "available_memory", lambda: 700_000)
    load(source, cache=True)
    monkeypatch.setattr(cache, "available_memory", lambda: 650_000)
    with pytest.raises(
        ValueError, match=r"needs about 0.0006 GB for 100 .*0.00065 GB of memory are available.*data.draft"
    ):
        load(source, cache=True)
    monkeypatch.setattr(cache, "available_memory", lambda: 1_300_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"0.0006 GB in each of 2 processes"):
        load(source, cache=True)


def test_a_cache_needs_workers_that_share_memory(source: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match=r"data.cache=true .*data.workers=0"):
        load(source, cache=True, workers=1)
    load(source, cache=True, workers=0)


def test_draft_makes_the_cached_images_smaller_and_their_boxes_stay_fractions(made_photos: Path) -> None:
    images = []
    for path in sorted(made_photos.iterdir())[:8]:
        file = io.BytesIO()
        Image.open(path).resize((1200, 900)).save(file, "JPEG", quality=95)
        images.append(file.getvalue())
    source = InMemory(images)
    assert 4 * len(open_cache(source, Reading(draft=300)).pixels) == len(open_cache(source, Reading()).pixels)
    whole, small = (list(load(source, stop=1, draft=draft, cache=True)) for draft in (None, 300))
    for left, right in zip(whole, small, strict=True):
        for one, other in zip(left.crops.boxes, right.crops.boxes, strict=True):
            assert (one - other).abs().max() < 0.003
        for one, other in zip(left.crops.crops, right.crops.crops, strict=True):
            assert 0 < (one.float() - other.float()).abs().mean() < 3


def test_a_draft_smaller_than_a_view_is_refused() -> None:
    source = InMemory([png(number) for number in range(IMAGES)])
    load(source, draft=24)
    with pytest.raises(ValueError, match=r"data.draft=23 is smaller than the largest view \(24 pixels\)"):
        load(source, draft=23)


def test_the_log_says_once_which_decoder_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clove_hub.training.data"):
        load(InMemory([png(0)] * 8))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(("JPEGs are decoded by Pillow", "JPEGs are decoded by simplejpeg"))


# ---- memory ----------------------------------------------------------------------------------------------


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        (
            {  # version 2, the limit on the group above
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/memory.max": "500000\n",
                "sys/fs/cgroup/job/memory.current": "200000\n",
                "sys/fs/cgroup/job/memory.stat": "anon 100\ninactive_file 50000\n",
            },
            350_000,
        ),
        (
            {  # version 1 inside a container, where the path is the host's
                "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 20000\n",
            },
            0,
        ),
        (
            {  # no limit
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 1\n",
            },
            1_024_000,
        ),
    ],
    ids=["no groups", "version 2", "version 1", "unlimited"],
)
def test_the_available_memory_is_the_systems_or_the_control_groups(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert available_memory(system(tmp_path, MEMINFO | files)) == expected


def test_this_machine_has_memory_to_speak_of() -> None:
    assert 2**24 < available_memory() < 2**50


def test_without_a_cache_nothing_is_read_before_the_first_step(source: Counting) -> None:
    make_loader(
        source,
        SPEC,
        seed=SEED,
        global_batch=8,
        micro_batch=8,
        rank=0,
        world=1,
        start_step=0,
        stop_step=1,
        workers=0,
        pin_memory=False,
    )
    assert list(source.reads) == [0] * 24
