"""Evaluations that are cut off go on: the same numbers, bit for bit, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import pytest
import scenes
import torch

from clove_hub.data.depth import open_distances
from clove_hub.data.images import BrokenImage
from clove_hub.data.masks import open_segmented
from clove_hub.evaluation import dense_probe, depth, linear_seg, linear_svm, unfinished
from clove_hub.evaluation.reading import each_readable
from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.evaluation.unfinished import once
from clove_hub.weights import Backbone, Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


class CutOffError(Exception):
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    return tmp_path / "cache/clove-hub/features"


@contextmanager
def cut_off_at(module, name: str, call: int):
    """The function of a module raises when it is called for the `call`-th time, counted from 0, which is expected."""
    whole, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(0)
        if len(calls) > call:
            raise CutOffError
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, name, counted)
        with pytest.raises(CutOffError):
            yield


def test_what_is_kept_is_read_and_not_made_again(tmp_path):
    value = {"a": [torch.arange(3.0), (1, "x", None)], "b": 2.5}
    assert once(tmp_path / "deep/one", lambda: value) is value
    found = once(tmp_path / "deep/one", pytest.fail)
    assert torch.equal(found["a"][0], value["a"][0])
    assert (found["a"][1], found["b"]) == ((1, "x", None), 2.5)
    assert once(None, lambda: 3) == 3


def test_batches_that_are_done_are_neither_loaded_nor_worked_on_again(tmp_path):
    loaded, worked = [], []

    def load(item):
        loaded.append(item)
        if item == 4:
            raise BrokenImage("four.png", "is broken")
        return item

    def work(items):
        worked.append(items)
        if 7 in items and len(worked) == 3:
            raise CutOffError
        return sum(items)

    with pytest.raises(CutOffError):
        each_readable(list(range(12)), load, work, 3, kept=tmp_path)
    loaded.clear()
    found = each_readable(list(range(12)), load, work, 3, kept=tmp_path)
    assert found == ([3, 8, 21, 30], [0, 1, 2, 3, *range(5, 12)], (("four.png", "is broken"),))
    assert sorted(loaded) == list(range(6, 12))
    assert worked == [[0, 1, 2], [3, 5], [6, 7, 8], [6, 7, 8], [9, 10, 11]]


# ---- trainings -------------------------------------------------------------------------------------------------------

SEGMENTED = {"steps": 9, "batch": 2, "crop": 64, "stride": 43, "learning_rate": 0.05, "test": "test"}


@pytest.mark.parametrize("after", [1, 5, 8])
def test_a_linear_layer_ends_where_it_would_have_ended(after, tmp_path, monkeypatch):
    part = open_segmented(scenes.segmented_images(tmp_path / "data", size=(64, 96)), "train")
    backbone, settings = Backbone(scenes.Colors(), PLAIN, "colors"), make_settings("linear-seg", SEGMENTED)
    with torch.no_grad():
        whole = linear_seg.trained(backbone, part, settings, 3).state_dict()
        with cut_off_at(linear_seg, "learn", after):
            linear_seg.trained(backbone, part, settings, 3, tmp_path / "state")
        seen = []
        draw = linear_seg._drawn
        monkeypatch.setattr(linear_seg, "_drawn", lambda *args: seen.append(args[-1]) or draw(*args))
        resumed = linear_seg.trained(backbone, part, settings, 3, tmp_path / "state").state_dict()
    assert sorted(seen) == list(range(2 * after, 18))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("after", [1, 4])
def test_the_bins_end_where_they_would_have_ended(after, tmp_path, monkeypatch):
    part = open_distances(scenes.distant_blocks(tmp_path / "data"), "train")
    settings = make_settings("depth", {"crop": [64, 96], "steps": 6, "batch": 2, "learning_rate": 0.2})
    backbone = Backbone(scenes.Colors(), PLAIN, "colors")
    with torch.no_grad():
        whole = depth.fit(backbone, part, settings, 3).state_dict()
        with cut_off_at(depth, "learn", after):
            depth.fit(backbone, part, settings, 3, tmp_path / "state")
        monkeypatch.setattr(depth, "in_threads", counted := Counted(depth.in_threads))
        resumed = depth.fit(backbone, part, settings, 3, tmp_path / "state").state_dict()
    assert counted.units == 6 - after
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Counted:
    """`in_threads`, which says of how many batches it was asked for."""

    def __init__(self, threads):
        self.threads, self.units = threads, 0

    def __call__(self, load, units):
        self.units += len(units)
        return self.threads(load, units)


def test_a_probe_ends_where_it_would_have_ended(tmp_path, monkeypatch):
    torch.manual_seed(0)
    features, targets = [torch.randn(6, 5, 4, 6), torch.randn(6, 3, 8, 12)], torch.randint(0, 3, (6, 16, 24))
    settings = make_settings("dense-probe", {"height": 64, "width": 96, "epochs": 5, "batch": 4})
    given = (features, targets, 3, settings, 7, torch.device("cpu"))
    with torch.no_grad():
        whole = dense_probe.fit(*given)
        with cut_off_at(dense_probe, "_folded", 6):  # in the fourth of five epochs of two steps
            dense_probe.fit(*given, kept=tmp_path / "state")
        resumed = dense_probe.fit(*given, kept=tmp_path / "state")
    assert unfinished.state_in(tmp_path / "state")["steps"] == 5
    assert torch.equal(whole.bias, resumed.bias)
    assert all(map(torch.equal, whole.weights, resumed.weights))


# ---- whole evaluations -----------------------------------------------------------------------------------------------


def masks(folder):
    return scenes.segmented_images(folder, size=(64, 96))


LONG = {
    "linear-seg": (masks, SEGMENTED | {"seeds": 2, "batch": 1}, "linear_seg.slid", 6),
    "dense-probe": (masks, {"height": 64, "width": 96, "epochs": 2, "seeds": 2}, "dense_probe.confusion", 6),
    "in-context": (masks, {"size": 64, "passes": 1, "seeds": 2, "test": "test"}, "in_context.asked", 1),
    "cluster": (
        masks,
        {"size": 64, "clusters": [0, 5], "components": 2, "seeds": 2, "test": "test"},
        "cluster.taken",
        2,
    ),
    "retrieve": (masks, {"regions": 2, "test": "test"}, "retrieve.describe", 8),
    "depth": (
        scenes.distant_blocks,
        {"crop": [64, 96], "steps": 3, "batch": 2, "seeds": 2},
        "depth.sig_loss",
        4,
    ),
    "linear-svm": (scenes.class_images, {"resize": 32, "crop": 32, "batch": 2}, "linear_svm.trained", 2),
    "knn": (scenes.class_images, {"neighbors": [3], "batch": 2}, "reading.normalized", 20),
    "discover": (partial(scenes.boxed_objects, images=12), {"patches": 4}, "discover.lost", 9),
    "propagate": (scenes.moving_clips, {"frames": 4}, "propagate.score", 1),
    "match": (scenes.keypoint_pairs, {"size": 64}, "match.relative_errors", 4),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_an_evaluation_that_was_cut_off_gives_the_same_and_leaves_nothing(name, tmp_path, monkeypatch, cache):
    make, settings, function, call = LONG[name]
    data = make(tmp_path / "data")
    if name in ("linear-svm", "cluster"):
        pytest.importorskip("sklearn")

    def figures():
        found = run_protocol(name, scenes.Colors(), PLAIN, data, settings)
        return found.metrics, found.items, found.deviations

    whole = figures()
    module, word = function.split(".")
    with cut_off_at(import_module(f"clove_hub.evaluation.{module}"), word, call):
        figures()
    kept = {path for path in cache.rglob("*") if path.is_file() and path.name != "lock"}
    assert kept
    written, write = [], unfinished._write
    monkeypatch.setattr(unfinished, "_write", lambda path, value: written.append(path) or write(path, value))
    assert figures() == whole
    assert not [path for path in written if path in kept and path.suffix != ".unfinished"]  # nothing is done twice
    assert not list(cache.iterdir())


def test_other_labels_begin_anew(tmp_path, monkeypatch, cache):
    pytest.importorskip("sklearn")
    data = scenes.class_images(tmp_path / "data", clean=True)
    settings = {"resize": 32, "crop": 32}
    with cut_off_at(linear_svm, "trained", 2):
        run_protocol("linear-svm", scenes.Colors(), PLAIN, data, settings)
    (folder,) = cache.iterdir()
    for split in ("train", "val"):
        (data / split / "class0").rename(data / split / "between")
        (data / split / "class1").rename(data / split / "class0")
        (data / split / "between").rename(data / split / "class1")
    found = run_protocol("linear-svm", scenes.Colors(), PLAIN, data, settings)
    assert found.metrics["top1"] == 100
    assert folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["linear-seg", "depth"])
def test_a_killed_training_goes_on_from_its_last_state(protocol, tmp_path, cache):
    """With signal 9, in the middle of the training; the figures are those of a run that was left alone."""
    if protocol == "depth":
        data = scenes.distant_blocks(tmp_path / "data")
        settings = ["crop=[64,96]", "steps=120", "batch=2", "seeds=2"]
    else:
        data = scenes.segmented_images(tmp_path / "data", size=(64, 96))
        settings = ["steps=120", "batch=2", "crop=64", "seeds=2", "test=test"]
    started = (
        "from clove_hub.evaluation import unfinished; unfinished.EVERY = 0.0; from clove_hub.cli import main; main()"
    )
    where = ["--model", "random:test_resnet", "--data", str(data), "--json"]

    def command(out):
        return [sys.executable, "-c", started, "evaluate", protocol, *where, str(out), *settings]

    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(command(tmp_path / "killed.json"), env=environment, stdout=subprocess.DEVNULL)
    while not list(cache.glob("*/1.unfinished")):  # the second seed's
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = cache.iterdir()
    done = [unfinished.state_in(folder / f"{seed}.unfinished")["steps"] for seed in (0, 1)]
    assert done[0] == 120
    assert 0 < done[1] < 120
    records = []
    for name in ("resumed", "alone"):
        subprocess.run(command(tmp_path / name), env=environment, check=True, stdout=subprocess.DEVNULL)
        records.append(json.loads((tmp_path / name).read_text()))
        assert not list(cache.iterdir())
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["items"] == records[1]["items"]
