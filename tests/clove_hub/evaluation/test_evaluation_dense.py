"""Evaluation by masks: mIoU, the dense probe and segment retrieval."""

import json
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image
from torch.nn import functional as F

from clove_hub.evaluation.dense_probe import Probe, fit
from clove_hub.evaluation.regions import describe, salient, spherical_kmeans
from clove_hub.evaluation.retrieve import Bank
from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.evaluation.scores import class_ious, confusion, segmentation_scores
from clove_hub.geometry import bilinear, upsampled
from clove_hub.weights import Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory) -> Path:
    return scenes.segmented_images(tmp_path_factory.mktemp("segmented"), size=(64, 96))


# ---- the figures -----------------------------------------------------------------------------------------------------


def naive_scores(predicted: np.ndarray, truth: np.ndarray, classes: int) -> tuple[float, float]:
    """Mean intersection over union and accuracy, from sets of pixels."""
    known = {place for place in np.ndindex(truth.shape) if truth[place] != 255}
    ious = []
    for number in range(classes):
        ours = {place for place in known if predicted[place] == number}
        theirs = {place for place in known if truth[place] == number}
        if ours | theirs:
            ious.append(len(ours & theirs) / len(ours | theirs))
    right = sum(predicted[place] == truth[place] for place in known)
    return 100 * sum(ious) / len(ious), 100 * right / len(known)


def test_miou_and_accuracy_are_those_of_sets_of_pixels():
    rng = np.random.default_rng(0)
    for classes, used in ((4, 4), (6, 3)):  # classes that do not occur do not count
        truth = rng.integers(0, used, (3, 12, 10)).astype(np.uint8)
        predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, used, truth.shape))
        truth[rng.random(truth.shape) < 0.1] = 255
        matrix = sum(
            confusion(torch.from_numpy(p), torch.from_numpy(t), classes) for p, t in zip(predicted, truth, strict=True)
        )
        found = segmentation_scores(matrix)
        expected = naive_scores(predicted.reshape(-1, 10), truth.reshape(-1, 10), classes)
        assert (found["mIoU"], found["pixel accuracy"]) == pytest.approx(expected)
        each = class_ious(matrix)
        assert each.isnan().tolist() == [number >= used for number in range(classes)]
        assert 100 * each.nanmean().item() == pytest.approx(expected[0])


def test_rows_of_the_confusion_are_the_truth():
    matrix = confusion(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 2, 255]), 3)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


# ---- dense probe -----------------------------------------------------------------------------------------------------


def test_the_matrix_is_bilinear_interpolation():
    for cells, size in ((4, 9), (8, 3), (1, 5), (5, 5)):
        line = torch.randn(1, 1, 1, cells)
        theirs = F.interpolate(line, size=(1, size), mode="bilinear", align_corners=False)[0, 0, 0]
        torch.testing.assert_close(bilinear(cells, size) @ line[0, 0, 0], theirs, atol=1e-6, rtol=1e-5)
    maps = torch.randn(2, 3, 5, 7)
    theirs = F.interpolate(maps, size=(33, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampled(maps, (33, 20)), theirs, atol=1e-5, rtol=1e-5)
    whole = bilinear(4, 64)
    torch.testing.assert_close(bilinear(4, 50, 50 / 64), whole[:50])  # the rest is padding


def test_the_probe_is_one_layer_on_the_concatenated_upsampled_levels():
    torch.manual_seed(0)
    fine, coarse = torch.randn(2, 5, 8, 12), torch.randn(2, 7, 4, 6)
    probe = Probe([torch.randn(3, 5), torch.randn(3, 7)], torch.randn(3), seen=(60, 90))  # padded to 64 x 96
    both = torch.cat([F.interpolate(level, size=(64, 96), mode="bilinear") for level in (fine, coarse)], 1)
    whole = torch.einsum("kc,bchw->bkhw", torch.cat(probe.weights, 1), both) + probe.bias.view(-1, 1, 1)
    torch.testing.assert_close(probe.logits([fine, coarse], (60, 90)), whole[:, :, :60, :90], atol=1e-5, rtol=1e-5)
    one = probe.predict([fine[:1], coarse[:1]], (60, 90))
    assert torch.equal(one, whole[0, :, :60, :90].argmax(0))


def test_the_layer_learns_what_is_linear_whatever_the_scale_of_a_channel():
    torch.manual_seed(0)
    settings = make_settings("dense-probe", {"height": 64, "width": 64, "epochs": 60, "batch": 4})
    features = torch.randn(12, 6, 2, 2) * torch.tensor([1e-3, 1.0, 100.0, 1.0, 1.0, 1.0]).view(-1, 1, 1) + 5
    cells = ((features - 5) / torch.tensor([1e-3, 1.0, 100.0, 1.0, 1.0, 1.0]).view(-1, 1, 1))[:, :3].argmax(1)
    # One target for each cell, so that a pixel sees its own cell alone.
    probe = fit([features], cells, 3, settings, 0, torch.device("cpu"))
    logits = probe.logits([features], (2, 2))
    assert float((logits.argmax(1) == cells).float().mean()) > 0.9


def test_dense_probe_reads_colors_off_the_map(segmented):
    settings = {"height": 64, "width": 96, "epochs": 40, "seeds": 2, "batch": 3}
    record = run_protocol("dense-probe", scenes.Colors(2), PLAIN, segmented, settings)
    assert record.metrics["mIoU"] > 90
    assert record.metrics["pixel accuracy"] > 95
    assert record.seeds == (0, 1)
    assert 0 < record.deviations["mIoU"] < 5
    assert record.data.samples == 4
    blind = run_protocol("dense-probe", scenes.Patches(32), PLAIN, segmented, settings | {"epochs": 2})
    assert blind.metrics["mIoU"] < 60


def test_the_mean_over_seeds_is_that_of_each_seed_alone(segmented):
    settings = {"height": 64, "width": 96, "epochs": 2, "batch": 3}
    both = run_protocol("dense-probe", scenes.Colors(), PLAIN, segmented, settings | {"seeds": 2}, seed=5)
    alone = [
        run_protocol("dense-probe", scenes.Colors(), PLAIN, segmented, settings | {"seeds": 1}, seed=seed).metrics
        for seed in (5, 6)
    ]
    values = [one["mIoU"] for one in alone]
    assert values[0] != values[1]
    assert both.metrics["mIoU"] == pytest.approx(np.mean(values))
    assert both.deviations["mIoU"] == pytest.approx(np.std(values, ddof=1))


def test_scores_are_taken_at_the_size_of_each_mask(tmp_path):
    """Photos of several sizes, seen at one size; a mask's edge that no cell has is found where it is."""
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    for name in ("test1", "test3"):
        for kind, resample in (("images", Image.Resampling.BICUBIC), ("labels", Image.Resampling.NEAREST)):
            path = folder / kind / f"{name}.png"
            with Image.open(path) as image:
                image.resize((150, 47), resample).save(path)
    settings = {"height": 64, "width": 96, "epochs": 40, "seeds": 1, "batch": 3}
    assert run_protocol("dense-probe", scenes.Colors(2), PLAIN, folder, settings).metrics["mIoU"] > 80


# ---- layouts and bad data --------------------------------------------------------------------------------------------


def change_mask(folder: Path, name: str, change) -> None:
    path = folder / "labels" / f"{name}.png"
    with Image.open(path) as image:
        mask = np.array(image)
    Image.fromarray(change(mask)).save(path)


def with_index_seven(mask: np.ndarray) -> np.ndarray:
    mask[10, 10] = 7
    return mask


@pytest.mark.parametrize("protocol", ["dense-probe", "retrieve"])
@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / "labels" / "train2.png").unlink(), r"the mask of train2\.png is missing: .*labels/train2\.png"),
        (lambda f: (f / "images" / "test1.png").unlink(), r"images/test1\.\* is missing; (val|test)\.txt names it"),
        (lambda f: (f / "labels" / "test0.png").write_bytes(b"torn"), r"labels/test0\.png cannot be read as a mask"),
        (lambda f: change_mask(f, "train3", lambda m: m[:-3]), r"labels/train3\.png is 96x61 pixels, but .*train3\.png is 96x64"),
        (lambda f: change_mask(f, "test2", with_index_seven), r"labels/test2\.png has the class 7; expected 0 to 2, or 255"),
        (lambda f: change_mask(f, "train0", lambda m: np.stack([m, m + 1, m], 2)), r"labels/train0\.png is an image of mode RGB, but it has colors"),
        (lambda f: [change_mask(f, f"test{n}", lambda m: m * 0 + 255) for n in range(4)], r"\((val|test)\) are all void"),
        (lambda f: ((f / "val.txt").write_text("") and (f / "test.txt").write_text("")) or (f / "test.txt").write_text(""),
         r"the list .*(val|test)\.txt is empty"),
        (lambda f: (f / "classes.json").write_text("[]"), r"classes\.json cannot be read"),
        (lambda f: (f / "classes.json").write_text('{"classes": [{"id": 1, "name": "a"}]}'), r"has the ids \[1\]"),
    ],
)  # fmt: skip
def test_bad_segmentation_data_is_named_by_its_path(protocol, break_it, expected, tmp_path):
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    break_it(folder)
    settings = {
        "dense-probe": {"height": 64, "width": 96, "epochs": 1, "seeds": 1},
        "retrieve": {"regions": 2},
    }[protocol]
    with pytest.raises(ValueError, match=expected):
        run_protocol(protocol, scenes.small_resnet(), PLAIN, folder, settings)


def test_a_training_set_without_any_class_is_refused(tmp_path):
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    for number in range(6):
        change_mask(folder, f"train{number}", lambda mask: mask * 0 + 255)
    for protocol, reason in (("dense-probe", "nothing to learn"), ("retrieve", "nothing to retrieve")):
        with pytest.raises(ValueError, match=rf"\(train\) are all void.*{reason}"):
            run_protocol(protocol, scenes.small_resnet(), PLAIN, folder)


@pytest.mark.parametrize("protocol", ["dense-probe", "retrieve"])
def test_classes_that_never_occur_are_named_with_the_score(protocol, tmp_path, caplog):
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    for number in range(4):
        change_mask(folder, f"test{number}", lambda mask: np.where(mask == 1, 0, mask).astype(np.uint8))
    settings = {
        "dense-probe": {"height": 64, "width": 96, "epochs": 1, "seeds": 2},
        "retrieve": {"regions": 2},
    }[protocol]
    run_protocol(protocol, scenes.small_resnet(), PLAIN, folder, settings)
    assert f"{protocol}: classes that never occur in the ground truth of {folder}: color 1" in caplog.text


def test_a_batch_of_nothing_but_void_changes_nothing():
    settings = make_settings("dense-probe", {"height": 64, "width": 64, "epochs": 3, "batch": 1})
    features, targets = torch.randn(2, 4, 2, 2), torch.full((2, 4, 4), 255)
    targets[0] = 1
    probe = fit([features], targets, 2, settings, 0, torch.device("cpu"))
    assert bool(torch.isfinite(probe.weights[0]).all())


# ---- retrieval -------------------------------------------------------------------------------------------------------


def test_clusters_of_directions_are_found_and_follow_the_generator_alone():
    rng = np.random.default_rng(0)
    centers = F.normalize(torch.from_numpy(rng.normal(size=(4, 16))).float(), dim=1)
    truth = torch.from_numpy(rng.integers(0, 4, 200))
    cells = F.normalize(centers[truth] + 0.05 * torch.from_numpy(rng.normal(size=(200, 16))).float(), dim=1)
    found = spherical_kmeans(cells, 4, np.random.default_rng(1))
    assert torch.equal(found, spherical_kmeans(cells, 4, np.random.default_rng(1)))
    assert len({(int(a), int(b)) for a, b in zip(found, truth, strict=True)}) == 4  # one cluster for each direction
    assert spherical_kmeans(torch.ones(5, 1), 3, rng).tolist() == [0] * 5  # fewer directions than clusters
    assert len(spherical_kmeans(cells[:2], 9, rng)) == 2


def test_a_center_that_loses_its_vectors_leaves_no_number_behind():
    rng = np.random.default_rng(3955)
    plane = torch.from_numpy(rng.normal(size=(10, 2)) * [1, 0.3] + [0, 0.2]).float()
    found = spherical_kmeans(F.normalize(plane, dim=1), 5, np.random.default_rng(3955))
    assert sorted(set(found.tolist())) == [0, 1, 2, 3]  # the first of five has lost all of its vectors


def test_a_region_is_the_mean_of_its_cells_and_has_the_class_of_most_pixels():
    cells = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.2]]), dim=1)
    assigned = torch.tensor([0, 0, 1, 1])
    places = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]])
    mask = torch.tensor([[4, 4, 1, 255], [0, 255, 255, 255]], dtype=torch.uint8)
    regions = describe(cells, assigned, places, mask, 5)
    assert regions.classes.tolist() == [4, 255]
    assert regions.counts.tolist() == [[1, 1, 0, 0, 2], [0, 0, 0, 0, 0]]
    for vector, rows in zip(regions.vectors, ([0, 1], [2, 3]), strict=True):
        torch.testing.assert_close(vector, F.normalize(cells[rows].sum(0), dim=0))


def test_regions_of_one_color_retrieve_their_class(segmented):
    record = run_protocol("retrieve", scenes.Colors(4), PLAIN, segmented, {"regions": 12})
    assert record.metrics["mIoU"] > 85
    assert record.data.samples == 4
    assert (record.rule, record.settings["fine"]) == ("regions", False)
    assert run_protocol("retrieve", scenes.small_resnet(), PLAIN, segmented).settings["fine"] is True
    with pytest.raises(ValueError, match=r"layer4 of a ResNet of plain blocks, which .* is not: leave fine out"):
        run_protocol("retrieve", scenes.Colors(4), PLAIN, segmented, {"fine": True})


def test_a_region_without_a_class_is_not_retrieved(tmp_path):
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    for number in range(6):  # the third color has no class in the training images, but it is in the test images
        change_mask(folder, f"train{number}", lambda mask: np.where(mask == 2, 255, mask).astype(np.uint8))
    record = run_protocol("retrieve", scenes.Colors(4), PLAIN, folder, {"regions": 12})
    assert 20 < record.metrics["mIoU"] < 67  # two of three classes at best


def test_objects_are_retrieved_as_by_the_code_of_maskcontrast(golden):
    g = golden["retrieve_maskcontrast"]

    def regions(split):
        parts = zip(
            *(torch.from_numpy(g[f"{split}_{what}"]) for what in ("features", "saliency", "masks")), strict=True
        )
        return [salient(f.float().movedim(2, 0), s / 200, mask, int(g["classes"]), (1.0, 1.0)) for f, s, mask in parts]

    vectors, classes, _, given = (torch.cat(part) for part in zip(*regions("train"), strict=True))
    known = (classes < int(g["classes"])) & (given < 0)
    bank = Bank(vectors[known], classes[known], None, ())
    np.testing.assert_allclose(bank.vectors.numpy(), g["memory"], atol=1e-5)
    assert bank.classes.tolist() == g["memory_labels"].tolist()
    matrix = torch.zeros(6, 6, dtype=torch.int64)
    for one in regions("test"):
        matrix.index_add_(1, bank.classes_of(one), one.counts.T)
    right = matrix.diagonal()
    for name, found in (("tp", right), ("fp", matrix.sum(0) - right), ("fn", matrix.sum(1) - right)):
        assert found.tolist() == g[name].tolist()
    found = segmentation_scores(matrix, absent_as_zero=True)
    assert found["mIoU"] == pytest.approx(100 * g["miou"], abs=1e-6)


def test_a_salient_vector_is_the_sum_over_the_pixels_of_the_upsampled_map():
    torch.manual_seed(0)
    features, saliency = torch.randn(5, 4, 3), torch.rand(50, 44)  # of an image padded to 64 x 48
    full = F.interpolate(features[None], size=(64, 48), mode="bilinear")[0, :, :50, :44]
    expected = (full * (saliency * (saliency > 0.5))).sum((1, 2))
    found = salient(features, saliency, torch.ones(50, 44, dtype=torch.uint8), 3, (50 / 64, 44 / 48))
    torch.testing.assert_close(found.vectors[1], F.normalize(expected, dim=0), atol=1e-5, rtol=1e-4)


def test_a_salient_object_has_its_most_frequent_class_of_equals_the_greatest_and_never_the_first():
    mask = torch.tensor([[0, 0, 0, 1], [1, 3, 3, 255], [2, 2, 2, 2]], dtype=torch.uint8)
    for rows, expected in ((3, 2), (2, 3), (0, 255)):  # of the first rows, the last of which may be empty
        saliency = torch.zeros(3, 4)
        saliency[:rows] = 1
        found = salient(torch.ones(2, 3, 4), saliency, mask, 4, (1.0, 1.0))
        assert found.classes.tolist() == [0, expected]
        assert found.given.tolist() == [0, -1]
        assert int(found.counts.sum()) == 11  # the void pixel is nowhere


def with_saliency(folder: Path, name: str = "saliency", scale: int = 255) -> Path:
    """Masks of what is not of the first color, as a saliency network might give them."""
    (folder / name).mkdir()
    for path in (folder / "labels").iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        Image.fromarray((scale * ((mask > 0) & (mask < 255))).astype(np.uint8)).save(folder / name / path.name)
    return folder


def test_the_saliency_of_an_image_lies_in_a_folder_of_the_data(tmp_path):
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    asked = {"rule": "maskcontrast"}
    with pytest.raises(ValueError, match=r"saliency/train0\.png is missing.*saliency=truth.*or set rule=regions"):
        run_protocol("retrieve", scenes.Colors(4), PLAIN, folder, asked)
    told = run_protocol("retrieve", scenes.Colors(4), PLAIN, folder, asked | {"saliency": "truth"})
    assert (told.rule, told.randomness, told.settings["regions"]) == ("maskcontrast", "", None)
    assert told.items["class"]["color 0"]["IoU"] == 100  # the masks say where the objects are
    with_saliency(folder)
    found = run_protocol("retrieve", scenes.Colors(4), PLAIN, folder, asked)
    assert found.metrics == told.metrics
    assert found.data.fingerprint != told.data.fingerprint
    with_saliency(folder, "ones", scale=1)
    other = run_protocol("retrieve", scenes.Colors(4), PLAIN, folder, asked | {"saliency": "ones"})
    assert other.metrics == told.metrics
    Image.new("L", (9, 9)).save(folder / "ones" / "train3.png")
    with pytest.raises(ValueError, match=r"ones/train3\.png is 9x9 pixels, but .*train3\.png is 96x64"):
        run_protocol("retrieve", scenes.Colors(4), PLAIN, folder, asked | {"saliency": "ones"})
    Image.fromarray(np.full((64, 96), 300, dtype=np.uint16)).save(folder / "ones" / "train3.png")
    with pytest.raises(ValueError, match=r"train3\.png has the value 300; expected a saliency mask of 0 to 255"):
        run_protocol("retrieve", scenes.Colors(4), PLAIN, folder, asked | {"saliency": "ones"})


def test_a_setting_of_the_other_rule_of_retrieval_is_refused():
    for given, of in (({"saliency": "truth"}, "maskcontrast"), ({"rule": "maskcontrast", "regions": 5}, "regions")):
        with pytest.raises(ValueError, match=rf"belongs to rule={of}: leave it out, or set rule={of}"):
            make_settings("retrieve", given)
        make_settings("retrieve", given | {"rule": of})


@pytest.mark.parametrize("case", ["all", "ignored", "absent", "void_only_class", "zero_255", "blind_255"])
def test_miou_is_that_of_mmseg_and_with_absent_classes_as_zero_that_of_the_others(case, golden):
    g = {key.removeprefix(f"{case}_"): value for key, value in golden["miou"].items() if key.startswith(f"{case}_")}
    matrix = confusion(torch.from_numpy(g["predicted"]), torch.from_numpy(g["truth"]), int(g["classes"]))
    found = segmentation_scores(matrix)
    np.testing.assert_allclose(class_ious(matrix).numpy(), g["mmseg_iou"], atol=1e-6)
    assert found["mIoU"] == pytest.approx(100 * g["mmseg_miou"], abs=1e-4)
    assert found["pixel accuracy"] == pytest.approx(100 * g["mmseg_pixel_accuracy"], abs=1e-4)
    assert segmentation_scores(matrix, absent_as_zero=True)["mIoU"] == pytest.approx(100 * g["zero_miou"], abs=1e-6)


@pytest.mark.parametrize("labelmap", [False, True])
@pytest.mark.parametrize("protocol", ["dense-probe", "retrieve"])
def test_black_and_white_masks_by_which_a_blind_model_would_score_100_are_refused(protocol, labelmap, golden, tmp_path):
    truth = golden["miou"]["blind_255_truth"]
    photos, masks = ("JPEGImages", "SegmentationClass") if labelmap else ("images", "labels")
    lists = tmp_path / ("ImageSets/Segmentation" if labelmap else ".")
    for folder in (tmp_path / photos, tmp_path / masks, lists):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        Image.new("RGB", truth.shape[::-1]).save(tmp_path / photos / f"{name}.png")
        Image.fromarray(truth).save(tmp_path / masks / f"{name}.png")
    for split, name in (("train", "a"), ("val", "b"), ("test", "b")):
        (lists / f"{split}.txt").write_text(f"{name}\n")
    if labelmap:
        (tmp_path / "labelmap.txt").write_text("background:0,0,0::\nthing:255,255,255::\n")
    else:
        (tmp_path / "classes.json").write_text('["background", "thing"]')
    small = {"height": 32, "width": 32, "epochs": 1, "seeds": 1} if protocol == "dense-probe" else {}
    with pytest.raises(
        ValueError, match=r'hold no pixel of \'thing\' \(1\).*write "ignore_label": null into .*classes\.json'
    ):
        run_protocol(protocol, scenes.Colors(), PLAIN, tmp_path, small)
    (tmp_path / "classes.json").write_text('{"classes": ["background", "thing"], "ignore_label": null}')
    assert run_protocol(protocol, scenes.Colors(), PLAIN, tmp_path, small).metrics["mIoU"] < 100


# ---- real photos -----------------------------------------------------------------------------------------------------


def test_real_street_scenes_are_probed(camvid):
    from clove_hub.weights import load_backbone

    backbone = load_backbone("random:test_resnet")
    settings = {"height": 90, "width": 120, "epochs": 8, "train_images": 12, "test_images": 6, "seeds": 2}
    found = run_protocol("dense-probe", backbone.model, backbone.preprocessing, camvid, settings)
    assert 3 < found.metrics["mIoU"] < 50
    assert found.metrics["pixel accuracy"] > 30  # a third of all pixels is road
    found = run_protocol("correspond", backbone.model, backbone.preprocessing, camvid, {"size": 128, "images": 6})
    assert found.metrics["correspond"] > found.metrics["chance"]


@pytest.fixture(scope="module")
def camvid() -> Path:
    from conftest import SHARED

    folder = SHARED / "data" / "camvid"
    if not folder.is_dir():
        pytest.skip(f"the street scenes are not at hand ({folder})")
    classes = json.loads((folder / "classes.json").read_text())["classes"]
    assert len(classes) == 11
    return folder


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_sets_backbones_beside_random_ones(segmented, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3])
    from benchmarks.dense_probe import main

    common = [
        "--data",
        str(segmented),
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
        "height=64",
        "width=96",
        "epochs=1",
    ]
    main([*common, "--random", "test_resnet", "--model", "known=random:test_convnext", "--seeds", "2"])
    written = json.loads((tmp_path / "dense_probe_cpu.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["random:test_resnet", "known"]
    for row in written["rows"]:
        assert row["seeds"] == [0, 1]
        assert row["metrics"].keys() == row["deviations"].keys() == {"mIoU", "pixel accuracy"}
    assert written["settings"]["height"] == 64
    said = capsys.readouterr().out
    assert "random:test_resnet" in said
    assert "known " in said
    with pytest.raises(ValueError, match="--model known: expected NAME=SOURCE"):
        main([*common, "--model", "known"])
