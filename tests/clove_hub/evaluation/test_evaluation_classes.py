"""Evaluation by the classes of whole images: nearest neighbors and linear SVMs."""

from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image
from torch.nn import functional as F

from clove_hub.data.finder import class_folders
from clove_hub.evaluation.knn import share_right, weighted_votes
from clove_hub.evaluation.linear_svm import RULES, class_precision, scaled, trained
from clove_hub.evaluation.run import run_protocol
from clove_hub.evaluation.scores import average_precision
from clove_hub.weights import Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)
UNSURE_OF_ZERO = np.array([0, -1, 1], dtype=np.int8)
"""VOC's -1, 0 and 1 as `Truth.labels` has them."""


# ---- k-NN ------------------------------------------------------------------------------------------------------------


def test_votes_are_those_of_brute_force():
    torch.manual_seed(0)
    queries, bank = (F.normalize(torch.randn(count, 6), dim=1) for count in (300, 40))
    labels = torch.randint(4, (40,))
    votes = weighted_votes(queries, bank, labels, 4, (7, 3), 0.07)
    assert list(votes) == [7, 3]
    for k, own in votes.items():
        for query, row in zip(queries.double().numpy(), own.numpy(), strict=True):
            cosines = [float(query @ key) for key in bank.double().numpy()]
            expected = [0.0] * 4
            for index in sorted(range(40), key=lambda i: -cosines[i])[:k]:
                expected[int(labels[index])] += np.exp(cosines[index] / 0.07)
            np.testing.assert_allclose(row, expected, rtol=1e-4)


def test_accuracies_are_those_of_dino_s_code(golden):
    g = golden["knn"]
    asked, bank, labels, truth = (
        torch.from_numpy(g[f"{split}_{what}"])
        for split, what in (("test", "features"), ("train", "features"), ("train", "labels"), ("test", "labels"))
    )
    votes = weighted_votes(asked, bank, labels, int(labels.max()) + 1, g["k"].tolist(), float(g["temperature"]))
    for place, own in enumerate(votes.values()):
        for count in (1, 5):
            assert 100 * share_right(own, truth, count) == pytest.approx(g[f"top{count}"][place], abs=1e-9)


def test_more_neighbors_than_images_are_all_images():
    bank = torch.eye(3)
    votes = weighted_votes(bank[:1], bank, torch.tensor([0, 1, 1]), 2, (20,), 1.0)[20]
    np.testing.assert_allclose(votes.numpy(), [[np.e, 2.0]], rtol=1e-6)


def test_knn_tells_colors_apart_and_counts_every_image_once(tmp_path):
    folder = scenes.class_images(tmp_path, train=3, val=5, classes=3, clean=True)
    found = run_protocol("knn", scenes.Colors(), PLAIN, folder, {"batch": 4, "neighbors": 3})
    assert found.metrics == {"top1": 100.0}
    assert found.data.samples == 15
    wrong = folder / "val" / "class0" / "0.png"  # one of fifteen in the wrong place
    wrong.write_bytes((folder / "val" / "class1" / "0.png").read_bytes())
    found = run_protocol("knn", scenes.Colors(), PLAIN, folder, {"batch": 4})
    assert list(found.metrics) == ["top1", "top1 k=10", "top1 k=100", "top1 k=200"]
    assert list(found.metrics.values()) == pytest.approx([100 * 14 / 15] * 4)  # nine images are all of the bank
    found = run_protocol("knn", scenes.Colors(), PLAIN, folder, {"batch": 4, "neighbors": (3, 1)})
    assert list(found.metrics) == ["top1", "top1 k=1"]


# ---- linear SVM ------------------------------------------------------------------------------------------------------


def vissl_average_precision(scores, positive):
    """Written out: precision and recall at each rank, precision made monotone from the end, area under it."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    recalls, precisions, hits = [0.0], [0.0], 0
    for rank, index in enumerate(order, 1):
        hits += bool(positive[index])
        recalls.append(hits / sum(positive))
        precisions.append(hits / rank)
    recalls.append(1.0)
    precisions.append(0.0)
    for i in range(len(precisions) - 2, -1, -1):
        precisions[i] = max(precisions[i], precisions[i + 1])
    return sum((recalls[i] - recalls[i - 1]) * precisions[i] for i in range(1, len(recalls)))


def test_average_precision_is_that_of_vissl():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.normal(size=50), rng.random(50) < 0.2
        positive[0] = True
        expected = vissl_average_precision(scores.tolist(), positive.tolist())
        assert average_precision(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, True, False])) == 1.0
    assert average_precision(np.array([1.0, 2.0]), np.array([True, False])) == 0.5


def voc(folder: Path) -> Path:
    """Twenty images in VOC's layout: `red` is certain, `green` is sometimes difficult."""
    rng = np.random.default_rng(5)
    for name in ("JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    rows = {"red": [], "green": []}
    for number in range(40):
        red, green, difficult = number % 2 == 0, number % 3 == 0, number % 5 == 0
        image = scenes.noise(rng, 40, 40) // 2
        image[:20, :, 0] += 8 * red
        image[20:, :, 1] += 8 * (green or difficult)
        Image.fromarray(image).save(folder / "JPEGImages" / f"{number:06d}.jpg", quality=95)
        rows["red"].append(f"{number:06d} {' 1' if red else '-1'}")
        rows["green"].append(f"{number:06d} {' 1' if green else ' 0' if difficult else '-1'}")
    for name, own in rows.items():
        (folder / "ImageSets" / "Main" / f"{name}_trainval.txt").write_text("\n".join(own[:20]) + "\n")
        (folder / "ImageSets" / "Main" / f"{name}_test.txt").write_text("\n".join(own[20:]) + "\n")
    return folder


@pytest.mark.parametrize("rule", ["revisiting", "vissl"])
def test_the_map_of_voc_is_that_of_the_protocol_written_out(rule, tmp_path):
    """Resize, center crop or squash, unit length, LinearSVC; difficult images are negatives, in VISSL's test they do not count."""
    machine = pytest.importorskip("sklearn.svm").LinearSVC
    voc(tmp_path)
    model = scenes.Patches(16)
    found = run_protocol("linear-svm", model, PLAIN, tmp_path, {"rule": rule, "cost": 0.5, "resize": 40, "crop": 32})
    assert (found.rule, found.settings["cost"]) == (rule, 0.5)

    def feature(name):
        with Image.open(tmp_path / "JPEGImages" / f"{name}.jpg") as image:
            square = (
                image.crop((4, 4, 36, 36))
                if rule == "revisiting"
                else image.resize((32, 32), Image.Resampling.BILINEAR)
            )
            pixels = np.array(square).transpose(2, 0, 1) / 255
        values = model(torch.from_numpy((pixels - 0.5) / 0.25).float()[None])[0].numpy().astype(np.float64)
        return values / (np.linalg.norm(values) + 1e-5)

    precisions = []
    for name in ("green", "red"):
        known = {}
        for split in ("trainval", "test"):
            entries = (tmp_path / "ImageSets" / "Main" / f"{name}_{split}.txt").read_text().split()
            known[split] = [(n, int(v)) for n, v in zip(entries[::2], entries[1::2], strict=True)]
        svm = machine(C=0.5, class_weight={1: 2, -1: 1}, loss="squared_hinge", dual=True, max_iter=2000, random_state=0)
        svm.fit([feature(n) for n, _ in known["trainval"]], [1 if v == 1 else -1 for _, v in known["trainval"]])
        tests = [(n, v) for n, v in known["test"] if v != 0 or rule == "revisiting"]
        scores = svm.decision_function([feature(n) for n, _ in tests])
        precisions.append(vissl_average_precision(scores.tolist(), [v == 1 for _, v in tests]))
    assert found.metrics == {"mAP": pytest.approx(100 * np.mean(precisions), abs=1e-6)}
    assert found.metrics["mAP"] > 60
    assert found.data.samples == 20


@pytest.mark.parametrize("rule", ["revisiting", "vissl"])
def test_average_precisions_are_those_of_the_released_rules(rule, golden):
    """Of given scores to 1e-9; of SVMs trained here to what another version of liblinear may change."""
    pytest.importorskip("sklearn")
    g = golden["svm_voc"]
    rows = {split: UNSURE_OF_ZERO[g[f"{split}_labels"] + 1] for split in ("train", "test")}
    learned, asked = scaled(g["train_features"]), scaled(g["test_features"])
    for number, (row, tested) in enumerate(zip(rows["train"], rows["test"], strict=True)):
        given = class_precision(g["scores"][number], tested, RULES[rule])
        assert given == pytest.approx(g[f"{rule}_scores_ap"][number], abs=1e-9)
        scores = trained(learned, row == 1, (float(g["cost"]),), 0).decision_function(asked)
        np.testing.assert_allclose(scores, g[f"{rule}_decisions"][number], atol=1e-3)
        own = class_precision(scores, tested, RULES[rule])
        assert own == pytest.approx(g[f"{rule}_trained_ap"][number], abs=0.01)


def test_c_is_that_of_the_best_of_three_parts_held_out(golden):
    """By VISSL's rule, with scikit-learn's own average precision of each part, written out."""
    metrics, machine = pytest.importorskip("sklearn.metrics"), pytest.importorskip("sklearn.svm").LinearSVC
    folds = pytest.importorskip("sklearn.model_selection").StratifiedKFold(3)
    g = golden["svm_voc"]
    features, costs = scaled(g["train_features"]), RULES["vissl"].costs[:6]
    chosen = []
    for row in g["train_labels"]:
        labels = np.where(row == 1, 1, -1)
        held_out = []
        for cost in costs:
            own = []
            for learned, tested in folds.split(features, labels):
                svm = machine(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
                scores = svm.fit(features[learned], labels[learned]).decision_function(features[tested])
                own.append(metrics.average_precision_score(labels[tested] == 1, scores))
            held_out.append(np.mean(own))
        chosen.append(costs[int(np.argmax(held_out))])
        assert chosen[-1] == trained(features, row == 1, costs, 0).C
    assert len(set(chosen)) > 1


def test_vissl_s_rule_asks_for_enough_images_of_a_class(tmp_path):
    pytest.importorskip("sklearn")
    folder = scenes.class_images(tmp_path, train=2, clean=True)
    settings = {"rule": "vissl", "resize": 32, "crop": 32}
    with pytest.raises(
        ValueError, match=r"the class 'class0' .* is in 2 of 6 training images, too few .* as in cost=0\.5"
    ):
        run_protocol("linear-svm", scenes.Colors(), PLAIN, folder, settings)
    assert run_protocol("linear-svm", scenes.Colors(), PLAIN, folder, settings | {"cost": 0.5}).metrics["mAP"] == 100


@pytest.mark.parametrize("rule", ["revisiting", "vissl"])
@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_an_image_folder_gives_top1_too(rule, tmp_path):
    folder = scenes.class_images(tmp_path, clean=True)
    found = run_protocol("linear-svm", scenes.Colors(), PLAIN, folder, {"rule": rule, "resize": 32, "crop": 32})
    assert found.metrics == {"mAP": 100.0, "top1": 100.0}
    assert found.settings["cost"] == (0.5 if rule == "revisiting" else None)


# ---- bad data --------------------------------------------------------------------------------------------------------


def test_bad_class_folders_are_named_by_their_path(tmp_path):
    with pytest.raises(ValueError, match=r"train is missing: expected DATA/train and DATA/val"):
        class_folders(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train has no sub-folders"):
        class_folders(tmp_path / "train")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"train/cat holds no image"):
        class_folders(tmp_path / "train")
    folder = scenes.class_images(tmp_path / "b")
    (folder / "val" / "yeti").mkdir()
    with pytest.raises(ValueError, match=r"the class .*val/yeti is not among"):
        run_protocol("knn", scenes.Colors(), PLAIN, folder)


def test_a_class_without_a_validation_image_is_named_with_the_score(tmp_path, caplog):
    folder = scenes.class_images(tmp_path, clean=True)
    (folder / "val" / "class1").rename(tmp_path / "gone")
    part = class_folders(folder / "val", ["class0", "class1", "class2"])
    assert (part.absent, sorted(set(part.labels))) == (("class1",), [0, 2])
    record = run_protocol("knn", scenes.Colors(), PLAIN, folder)
    assert (record.metrics["top1"], record.data.samples) == (100, 8)
    assert "knn: classes that never occur in the ground truth" in caplog.text
    with pytest.raises(ValueError, match=r"the class 'class1' of .* is in no test image"):
        run_protocol("linear-svm", scenes.Colors(), PLAIN, folder)  # it has no average precision


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / "JPEGImages" / "000003.jpg").unlink(), r"the image 000003 of .* is missing: .*000003\.jpg"),
        (
            lambda f: (f / "ImageSets/Main/red_test.txt").write_text("000020 1\n"),
            r"red_test\.txt lists other images than .*green_test\.txt",
        ),
        (lambda f: (f / "ImageSets/Main/red_test.txt").write_text("000020 2\n"), r"the line '000020 2'; expected"),
        (
            lambda f: (f / "ImageSets/Main/green_test.txt").write_text(
                "".join(f"{number:06d} -1\n" for number in range(20, 40))
            ),
            "the class 'green' of .* is in no test image",
        ),
        (lambda f: [path.unlink() for path in (f / "ImageSets/Main").iterdir()], r"has no list CLASS_trainval\.txt"),
    ],
)
def test_a_bad_voc_folder_is_explained(break_it, expected, tmp_path):
    voc(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=expected):
        run_protocol("linear-svm", scenes.Colors(), PLAIN, tmp_path)
