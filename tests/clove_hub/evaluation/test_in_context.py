"""`in-context`: the numbers of open-hummingbird-eval, and what it does with photos, memory and disk."""

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from torch.nn import functional as F

from clove_hub.data.masks import open_segmented
from clove_hub.evaluation import in_context
from clove_hub.evaluation.augment import jittered, random_box
from clove_hub.evaluation.in_context import Memory, class_shares, least_common, neighbors, vote
from clove_hub.evaluation.run import run_protocol
from clove_hub.evaluation.scores import class_ious, confusion, zero_miou
from clove_hub.evaluation.segmenting import classes_at
from clove_hub.weights import Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SMALL = {"size": 64, "neighbors": 5, "test": "test"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clove-hub" / "features"


@pytest.fixture(scope="module")
def segmented(tmp_path_factory) -> Path:
    return scenes.segmented_images(tmp_path_factory.mktemp("segmented"), size=(64, 96))


# ---- the released code's numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "bounded"])
def test_patches_labels_and_scores_are_the_released_ones(kind, golden, tmp_path, monkeypatch):
    oracle = golden["hummingbird"]
    classes, grid = int(oracle["classes"]), oracle["train_features"].shape[1:3]
    cells, each = grid[0] * grid[1], int(oracle["bounded_per_image"]) if kind == "bounded" else grid[0] * grid[1]
    memory = Memory(
        tmp_path, each * len(oracle["train_masks"]), oracle["train_features"].shape[3], classes
    ).make_files()
    for number, mask in enumerate(oracle["train_masks"]):
        shares = class_shares(torch.from_numpy(mask), grid, classes)
        uniform = oracle["bounded_uniform"][number] if kind == "bounded" else np.ones(cells, np.float32)
        kept = least_common(shares, torch.from_numpy(uniform), each)
        if kind == "bounded":
            assert kept.tolist() == oracle["bounded_chosen"][number].tolist()
        features = torch.from_numpy(oracle["train_features"][number]).float().flatten(0, 1)
        memory.put(number * each, F.normalize(features[kept], dim=1), shares[kept])
    monkeypatch.setattr(in_context, "_VALUES", 12 * 70)  # blocks of 70 patches, parts of 24 queries
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for number, mask in enumerate(oracle["test_masks"]):
        queries = F.normalize(torch.from_numpy(oracle["test_features"][number]).float().flatten(0, 1), dim=1)
        cosines, numbers = neighbors(queries, memory, int(oracle["neighbours"]))  # codespell:ignore neighbours
        labels = vote(cosines, memory.shares_of(numbers.flatten()), float(oracle["temperature"]))
        wrong = (
            labels - torch.from_numpy(oracle[f"{kind}_labels"][number])
        ).abs() > 2e-3  # half precision of the memory
        assert float(wrong.float().mean()) < 1e-2  # the 30th and the 31st neighbor may swap
        predicted = classes_at(labels.T.reshape(-1, *grid), mask.shape)
        assert float((predicted != torch.from_numpy(oracle[f"{kind}_predicted"][number])).float().mean()) <= 1e-3
        matrix += confusion(predicted, torch.from_numpy(mask), classes)
    assert zero_miou(matrix) == pytest.approx(100 * oracle[f"{kind}_miou_unmatched"], abs=0.02)
    assert in_context._scores(matrix)["mIoU"] == pytest.approx(100 * oracle[f"{kind}_miou"], abs=0.02)


def test_the_labels_are_exact_where_the_memory_is_not_rounded(golden):
    oracle = golden["hummingbird"]
    classes, grid = int(oracle["classes"]), oracle["train_features"].shape[1:3]
    keys = F.normalize(torch.from_numpy(oracle["train_features"]).float().flatten(0, 2), dim=1)
    shares = torch.cat([class_shares(torch.from_numpy(mask), grid, classes) for mask in oracle["train_masks"]])
    queries = F.normalize(torch.from_numpy(oracle["test_features"]).float().flatten(0, 2), dim=1)
    cosines, numbers = (queries @ keys.T).topk(30, dim=1)
    labels = vote(cosines, shares[numbers.flatten()], 0.02).view(5, 100, classes)
    wrong = (labels - torch.from_numpy(oracle["whole_labels"])).abs() > 1e-5
    assert float(wrong.float().mean()) <= 1e-3


# ---- the memory ------------------------------------------------------------------------------------------------------


def test_void_pixels_are_class_0_of_a_patch():
    mask = torch.tensor([[0, 1, 2, 2], [255, 1, 2, 255]], dtype=torch.uint8)
    assert class_shares(mask, (1, 2), 3).tolist() == [[0.5, 0.5, 0], [0.25, 0, 0.75]]


def test_the_memory_holds_as_many_patches_of_each_image_and_pass(segmented, monkeypatch):
    made = []
    make = Memory.make_files
    monkeypatch.setattr(Memory, "make_files", lambda self: made.append(self.patches) or make(self))
    for memory, expected in ((10_000, 6 * 2 * 64), (6 * 2 * 10 + 11, 6 * 2 * 10)):
        run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL | {"memory": memory})
        assert made.pop() == expected
    with pytest.raises(
        ValueError, match=r"memory=11 holds less than one patch of each of 6 images in 2 passes: set it to 12"
    ):
        run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL | {"memory": 11})
    run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL | {"memory": 12})


def test_a_disk_without_room_is_said_before_the_images_are_seen(segmented, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match=r"a memory of 768 patches with 3 channels needs 0\.0 GB .*or lower memory"):
        run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL)


def test_a_missing_scipy_is_said_before_an_image_is_seen(segmented, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    monkeypatch.setattr(in_context, "open_segmented", None)
    with pytest.raises(ValueError, match=r"needs SciPy: pip install 'clove-hub\[evaluation\]'"):
        run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL)


def test_an_interrupted_evaluation_goes_on_from_what_it_remembers(segmented, monkeypatch, cache):
    settings, stored = SMALL | {"batch": 2}, []
    whole = run_protocol("in-context", scenes.Colors(), PLAIN, segmented, settings)
    assert not list(cache.glob("*/*.half"))
    put = Memory.put

    def until_the_seventh(self, first, features, shares):
        stored.append(first)
        if len(stored) == 7:
            raise KeyboardInterrupt
        put(self, first, features, shares)

    monkeypatch.setattr(Memory, "put", until_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        run_protocol("in-context", scenes.Colors(), PLAIN, segmented, settings)
    again = run_protocol("in-context", scenes.Colors(), PLAIN, segmented, settings)
    assert again.metrics == whole.metrics
    assert len(stored) == 7 + 6  # of the twelve images six had been stored with their batch


# ---- crops -----------------------------------------------------------------------------------------------------------


def test_crops_have_the_areas_and_ratios_of_the_paper():
    boxes = [random_box(300, 200, (0.5, 2), np.random.default_rng(seed)) for seed in range(400)]
    assert all(0 <= x <= 300 - w and 0 <= y <= 200 - h for x, y, w, h in boxes)
    drawn = [(w * h / 60_000, w / h) for _, _, w, h in boxes if (w, h) != (267, 200)]
    assert len(drawn) > 250
    assert all(0.49 < area <= 1 and 0.74 < ratio < 1.345 for area, ratio in drawn)
    assert random_box(300, 200, (1.5, 2), np.random.default_rng(0)) == (16, 0, 267, 200)  # no draw fits: the middle


def test_jitter_is_a_tenth_and_half_of_its_steps_are_left_out():
    photo = torch.randint(30, 220, (3, 24, 24)).float()
    changed = [jittered(photo, 0.1, np.random.default_rng(seed)) for seed in range(200)]
    same = sum(torch.equal(one, photo) for one in changed)
    assert 3 <= same <= 25  # a sixteenth
    brightness = torch.tensor([float(one.mean() / photo.mean()) for one in changed])
    assert 0.88 < float(brightness.min()) < 0.93
    assert 1.07 < float(brightness.max()) < 1.12


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_patches_of_a_color_take_its_class(segmented):
    found = run_protocol("in-context", scenes.Colors(4), PLAIN, segmented, SMALL | {"seeds": 2})
    assert found.metrics["mIoU"] > 80
    assert found.metrics["mIoU"] >= found.metrics["mIoU unmatched"] > 80
    assert found.rule == "hummingbird"
    assert found.seeds == (0, 1)
    assert found.deviations["mIoU"] > 0
    one = run_protocol("in-context", scenes.Colors(4), PLAIN, segmented, SMALL)
    blind = run_protocol("in-context", scenes.Patches(32), PLAIN, segmented, SMALL)
    assert blind.metrics["mIoU"] < one.metrics["mIoU"] - 20


def test_images_are_smaller_where_patches_ask_for_it(segmented, monkeypatch):
    sides = []
    remembered = in_context.remembered
    monkeypatch.setattr(
        in_context, "remembered", lambda b, p, s, side, *rest: sides.append(side) or remembered(b, p, s, side, *rest)
    )
    model = scenes.Colors(14)
    model.feature_info = [{"reduction": 14}]
    run_protocol("in-context", model, PLAIN, segmented, SMALL)
    run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL | {"size": 70})
    assert sides == [56, 64]
    with pytest.raises(ValueError, match="size=31: a model in memory needs a multiple of 32 pixels"):
        run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL | {"size": 31})


def test_what_ade20k_has_no_class_for_is_a_class_here(tmp_path):
    from PIL import Image

    for folder in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / folder).mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / f"images/{folder}/a.jpg")
        Image.fromarray(np.full((32, 32), 0, np.uint8)).save(tmp_path / f"annotations/{folder}/a.png")
    found = run_protocol("in-context", scenes.Colors(), PLAIN, tmp_path, {"size": 32, "passes": 1})
    assert found.items["class"] == {"other": {"IoU": 100.0, "pixels": 1024}}
    assert len(found.absent) == 150
    assert found.metrics["mIoU unmatched"] == pytest.approx(100 / 151)  # classes that are nowhere count 0
    part = in_context._with_other(open_segmented(tmp_path, "train"))
    assert part.classes[:2] == ("other", "wall")


def test_a_class_that_is_nowhere_counts_0():
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert zero_miou(matrix) == pytest.approx(100 * (3 / 4 + 4 / 5) / 3)
    assert bool(class_ious(matrix)[2].isnan())


@pytest.mark.parametrize("settings", [{"neighbors": 0}, {"temperature": 0}, {"memory": 0}, {"levels": []}])
def test_wrong_settings_are_said(settings, segmented):
    with pytest.raises(ValueError, match="all must be positive, with at least one level"):
        run_protocol("in-context", scenes.Colors(), PLAIN, segmented, SMALL | settings)
