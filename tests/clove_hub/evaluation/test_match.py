"""The protocol `match`: keypoints of SPair-71k by the rules of DIFT and of sd-dino."""

import json
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image
from torch.nn import functional as F

from clove_hub.data.pairs import View, read_pairs
from clove_hub.evaluation.match import (
    in_square,
    nearest_cells,
    nearest_pixels,
    pck,
    pixel_norms,
    pixel_vectors,
    placed,
)
from clove_hub.evaluation.run import run_protocol
from clove_hub.weights import Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


def maps(stored, name):
    return (torch.from_numpy(stored[f"{name}_{side}"]).float().permute(2, 0, 1) for side in ("source", "target"))


def test_errors_and_figures_are_those_of_difts_program(golden):
    stored = golden["spair_pck"]
    errors: dict[str, list[np.ndarray]] = {}
    for name, category in zip(stored["pairs"], stored["categories"], strict=True):
        source, target = maps(stored, name)
        (height, width), target_size = (stored[f"{name}_{side}_size"].tolist() for side in ("source", "target"))
        vectors = pixel_vectors(source, stored[f"{name}_source_points"].astype(float), (width, height))
        found = nearest_pixels(vectors, target, pixel_norms(target, (target_size[1], target_size[0])))
        x0, y0, x1, y1 = stored[f"{name}_target_box"]
        error = np.linalg.norm(found - stored[f"{name}_target_points"], axis=1) / max(x1 - x0, y1 - y0)
        np.testing.assert_allclose(error, stored[f"{name}_upsampled_error"], atol=1e-6)
        errors.setdefault(str(category), []).append(error)
    metrics, _ = pck(errors, inclusive=True)
    assert metrics["PCK@0.1 image"] == pytest.approx(100 * float(stored["upsampled_per_image"]), abs=1e-4)
    assert metrics["PCK@0.1 point"] == pytest.approx(100 * float(stored["upsampled_per_point"]), abs=1e-4)


def test_errors_are_those_of_sd_dinos_program(golden):
    stored = golden["spair_pck"]
    source, target = maps(stored, "cat0_cells")
    begin, end = stored["cat0_cells_source_points"], stored["cat0_cells_target_points"]
    visible = begin[:, 2] * end[:, 2] > 0
    found = nearest_cells(source, target, begin[visible, :2].astype(float), 840)
    error = np.linalg.norm(found - end[visible, :2], axis=1) / float(stored["cat0_cells_box"])
    np.testing.assert_allclose(error, stored["cat0_cells_error"], atol=1e-6)


@pytest.mark.parametrize("covered", [1.0, 0.9])
def test_lengths_and_nearest_pixels_are_those_of_the_map_at_full_size(covered):
    """Written out: the map is brought to the padded size, and the padding is cut off."""
    torch.manual_seed(0)
    target, source = torch.randn(16, 10, 10), torch.randn(16, 10, 10)
    size = 90 if covered < 1 else 100
    full, other = (
        F.interpolate(one[None], size=(100, 100), mode="bilinear", align_corners=False)[0, :, :size, :size]
        for one in (target, source)
    )
    norms = pixel_norms(target, (size, size), covered)
    torch.testing.assert_close(norms, full.norm(dim=0), atol=1e-4, rtol=1e-4)
    points = np.array([[3.0, 70.0], [size, size], [40.0, 0.0]])
    vectors = pixel_vectors(source, points, (size, size), covered)
    torch.testing.assert_close(vectors[0], F.normalize(other[:, 70, 3], dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vectors[1], F.normalize(other[:, -1, -1], dim=0), atol=1e-4, rtol=1e-4)
    best = torch.einsum("kc,chw->khw", vectors, F.normalize(full, dim=0)).flatten(1).argmax(1)
    assert nearest_pixels(vectors, target, norms, covered).tolist() == [
        [float(i % size), float(i // size)] for i in best
    ]


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (40, 40), (41, 17)])
def test_points_come_into_the_square_with_their_photo(size):
    """A white dot is where `placed` says, to a pixel."""
    x, y = size[0] // 2, size[1] // 3
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    image[y, x] = 255
    square = np.asarray(in_square(Image.fromarray(image), 200))[:, :, 0].astype(float)
    rows, columns = np.mgrid[:200, :200]
    center = np.array([(columns * square).sum(), (rows * square).sum()]) / square.sum()
    scale, offset = placed(View(Path("x"), size, np.empty((0, 2)), (0, 0, 1, 1)), 200)
    np.testing.assert_allclose(center, np.array([x + 0.5, y + 0.5]) * scale + offset - 0.5, atol=0.6)


def test_means_are_over_pairs_points_and_categories():
    errors = {"a": [np.array([0.1, 0.2]), np.array([0.0])], "b": [np.array([0.3, 0.3, 0.04, 0.3])]}
    metrics, items = pck(errors, inclusive=True)
    assert metrics["PCK@0.1 image"] == pytest.approx(100 * (1 / 2 + 1 + 1 / 4) / 3)
    assert metrics["PCK@0.1 point"] == pytest.approx(100 * 3 / 7)
    assert metrics["PCK@0.1 category"] == pytest.approx(100 * (2 / 3 + 1 / 4) / 2)
    assert metrics["PCK@0.05 point"] == pytest.approx(100 * 2 / 7)
    assert metrics["PCK@0.01 point"] == pytest.approx(100 / 7)
    assert items["category"]["b"]["PCK@0.1 point"] == 25
    assert (items["category"]["a"]["pairs"], items["category"]["a"]["points"]) == (2, 3)
    assert pck(errors, inclusive=False)[0]["PCK@0.1 point"] == pytest.approx(100 * 2 / 7)


@pytest.mark.parametrize("settings", [{"size": 64}, {"rule": "sd-dino", "size": 64}, {"size": 60}])
def test_a_moved_pattern_is_found_and_another_one_is_not(settings, tmp_path):
    data = scenes.keypoint_pairs(tmp_path)
    found = run_protocol("match", scenes.Colors(4), PLAIN, data, settings)
    assert found.metrics["PCK@0.1 point"] > (55 if settings["size"] == 60 else 75)
    assert (found.data.samples, found.split, found.rule) == (6, "test", settings.get("rule", "dift"))
    assert {name: one["pairs"] for name, one in (found.items or {})["category"].items()} == {"bus": 3, "cat": 3}
    for photo in (data / "JPEGImages").rglob("*[13579].jpg"):  # the targets
        Image.fromarray(scenes.noise(np.random.default_rng(1), 64, 64)).save(photo)
    assert run_protocol("match", scenes.Colors(4), PLAIN, data, settings).metrics["PCK@0.1 point"] < 40


@pytest.mark.parametrize("settings", [{"size": 192}, {"rule": "sd-dino", "size": 192}])
def test_a_photo_of_another_shape_than_its_partner_is_searched_in_its_own_pixels(settings, tmp_path):
    """The targets become the lower half of photos twice as high."""
    data = scenes.keypoint_pairs(tmp_path)
    for path in (data / "PairAnnotation" / "test").iterdir():
        document = json.loads(path.read_text())
        photo = data / "JPEGImages" / document["category"] / document["trg_imname"]
        with Image.open(photo) as image:
            pixels = np.array(image)
        Image.fromarray(np.concatenate([np.full_like(pixels, 127), pixels])).save(photo, quality=95)
        x0, y0, x1, y1 = document["trg_bndbox"]
        document |= {"trg_imsize": [64, 128, 3], "trg_bndbox": [x0, y0 + 64, x1, y1 + 64]}
        document["trg_kps"] = [[x, y + 64] for x, y in document["trg_kps"]]
        path.write_text(json.dumps(document))
    assert run_protocol("match", scenes.Colors(4), PLAIN, data, settings).metrics["PCK@0.1 point"] > 70


def test_pairs_are_read_without_their_list_too(tmp_path):
    data = scenes.keypoint_pairs(tmp_path)
    listed = read_pairs(data, "test")
    (data / "Layout" / "large" / "test.txt").unlink()
    assert [pair.annotation for pair in read_pairs(data, "test")] == [pair.annotation for pair in listed]
    assert listed[0].source.points.tolist()[1] == [4, 20]
    assert (listed[0].category, listed[0].target.box) == ("cat", (16, 8, 56, 56))


def changed(**values):
    def change(data: Path) -> None:
        path = sorted((data / "PairAnnotation" / "test").iterdir())[2]
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (changed(category=None), r"000003-.*:cat\.json has no category"),
        (changed(src_kps=[[1, 2]]), r"has 1 points in the source and 7 in the target"),
        (changed(trg_kps=[[1, 2, 3]]), r"has trg_kps \[\[1, 2, 3\]\]; expected a list with x and y of each point"),
        (changed(trg_bndbox=[5, 5, 5, 9]), r"has trg_bndbox .*expected x0, y0, x1, y1 with x0 < x1"),
        (changed(src_imsize="64"), r"has src_imsize '64'; expected width and height"),
        (changed(src_imsize=[32, 64, 3]), r"2008_000004\.jpg is 64x64 pixels, but .*000003.* has points in 32x64"),
        (changed(src_imname="nowhere.jpg"), r"1 photos are missing, the first is .*cat/nowhere\.jpg"),
        (
            lambda data: (data / "PairAnnotation" / "test").rename(data / "PairAnnotation" / "val"),
            "it has the splits val",
        ),
    ],
)
def test_a_bad_folder_is_explained(break_it, expected, tmp_path):
    data = scenes.keypoint_pairs(tmp_path)
    break_it(data)
    with pytest.raises(ValueError, match=expected):
        run_protocol("match", scenes.Colors(), PLAIN, data, {"size": 64})


def test_a_size_or_a_number_of_pairs_below_one_is_refused(tmp_path):
    for settings in ({"size": 0}, {"pairs": 0}, {"levels": []}):
        with pytest.raises(ValueError, match="size and pairs must be positive, with at least one level"):
            run_protocol("match", scenes.Colors(), PLAIN, tmp_path, settings)
