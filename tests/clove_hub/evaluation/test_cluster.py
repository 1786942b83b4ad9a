"""`cluster`: the numbers of Leopart's and NeCo's evaluation, and k-means over a whole set."""

from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image

from clove_hub.evaluation.cluster import clustered, components, taken, taken_for
from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.evaluation.scores import many_to_one, merged, one_to_one, zero_miou
from clove_hub.weights import Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SMALL = {"size": 64, "clusters": [0, 12], "seeds": 2, "test": "test"}


class Held:
    """What `components` takes of a level's maps, (N, C, h, w)."""

    def __init__(self, maps: torch.Tensor) -> None:
        self.maps = maps

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, images: slice) -> torch.Tensor:
        return self.maps[images]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory) -> Path:
    return scenes.segmented_images(tmp_path_factory.mktemp("segmented"), size=(64, 96))


# ---- the released code's numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["equal", "over", "absent", "fewer"])
@pytest.mark.parametrize(("kind", "match"), [("hungarian", one_to_one), ("many", many_to_one)])
def test_clusters_are_taken_for_the_classes_of_the_released_code(case, kind, match, golden):
    oracle = golden["overcluster"]
    clusters, truth = oracle[f"{case}_clusters"].astype(np.int32), torch.from_numpy(oracle[f"{case}_truth"])
    matrix = taken(clusters[None], [truth], int(oracle[f"{case}_classes"]), int(oracle[f"{case}_count"]))
    classes, theirs = match(matrix), torch.from_numpy(oracle[f"{case}_{kind}_class_of_cluster"])
    assert torch.equal(classes[theirs >= 0], theirs[theirs >= 0])
    assert zero_miou(merged(matrix, classes)) / 100 == pytest.approx(oracle[f"{case}_{kind}_miou"], abs=1e-9)


def test_as_many_clusters_as_classes_are_matched_one_to_one(golden):
    matrix = torch.tensor([[5, 4], [1, 0]])  # most pixels of both clusters have the first class
    assert taken_for(matrix).tolist() == [[4, 5], [0, 1]]
    assert taken_for(torch.tensor([[5, 4, 0], [1, 0, 7]])).tolist() == [[9, 0], [1, 7]]


def test_from_features_the_lowest_inertia_and_its_score_are_the_released_ones(golden):
    kmeans = pytest.importorskip("sklearn.cluster").KMeans
    oracle = golden["overcluster"]
    maps = torch.from_numpy(oracle["features"]).float().permute(0, 3, 1, 2)
    cells = components([Held(maps)], int(oracle["pca"]), 4, torch.device("cpu"))
    flat, truth = cells.reshape(-1, cells.shape[-1]), [torch.from_numpy(mask) for mask in oracle["masks"]]
    for count in (6, 18):
        found = []
        for seed in range(3):
            assigned = clustered(kmeans, flat, count, make_settings("cluster", {}), seed)
            centers = np.stack([flat[assigned == cluster].mean(0) for cluster in range(count)])
            inertia = float(((flat - centers[assigned]) ** 2).sum())
            matrix = taken(assigned.reshape(cells.shape[:-1]), truth, int(oracle["classes"]), count)
            found.append((inertia, zero_miou(taken_for(matrix)) / 100))
        best = int(oracle[f"k{count}_inertia"].argmin())
        assert min(found)[0] == pytest.approx(oracle[f"k{count}_inertia"][best], rel=0.02)
        assert min(found)[1] == pytest.approx(oracle[f"k{count}_miou"][best], abs=0.01)


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_components_are_those_of_scikit_learn_on_standardized_channels():
    decomposition = pytest.importorskip("sklearn.decomposition")
    torch.manual_seed(0)
    fine = torch.randn(5, 4, 6, 8) * torch.tensor([1e-3, 1.0, 50.0, 0.0]).view(-1, 1, 1) + 100
    coarse = torch.randn(5, 3, 3, 4)
    found = components([Held(fine), Held(coarse)], 3, 2, torch.device("cpu"))
    wide = torch.nn.functional.interpolate(coarse, size=(6, 8), mode="bilinear")
    rows = torch.cat([fine, wide], 1).permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    spread = rows.std(0)
    rows = (rows - rows.mean(0)) / np.where(spread < 1e-3 * spread.max() * 1e-3, np.inf, spread)
    theirs = decomposition.PCA(3).fit_transform(rows)
    ours = found.reshape(-1, 3)
    signs = np.sign((ours * theirs).sum(0))
    np.testing.assert_allclose(ours * signs, theirs, atol=2e-2)  # 100 + 1e-3 in float32 has few digits
    assert components([Held(coarse)], 50, 2, torch.device("cpu")).shape == (5, 3, 4, 3)


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_colors_are_found_as_clusters(segmented):
    found = run_protocol("cluster", scenes.Colors(4), PLAIN, segmented, SMALL)
    assert found.metrics.keys() == found.deviations.keys() == {"mIoU K=3", "mIoU K=12"}
    assert found.metrics["mIoU K=12"] > 75
    assert found.rule == "leopart"
    assert found.seeds == (0, 1)
    assert set(found.items["class"]) == {"color 0", "color 1", "color 2"}
    assert sum(one["pixels"] for one in found.items["class"].values()) == pytest.approx(4 * 100 * 100, rel=0.05)
    blind = run_protocol("cluster", scenes.Patches(32), PLAIN, segmented, SMALL)
    assert blind.metrics["mIoU K=12"] < 60


def test_the_mean_over_seeds_is_that_of_each_seed_alone(segmented):
    both = run_protocol("cluster", scenes.Colors(), PLAIN, segmented, SMALL | {"starts": 1}, seed=3)
    alone = [
        run_protocol("cluster", scenes.Colors(), PLAIN, segmented, SMALL | {"starts": 1, "seeds": 1}, seed=seed).metrics
        for seed in (3, 4)
    ]
    for name, value in both.metrics.items():
        assert value == pytest.approx(np.mean([one[name] for one in alone]))
        assert both.deviations[name] == pytest.approx(np.std([one[name] for one in alone], ddof=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": [500]}, r"clusters=500 is more than the 256 cells: lower clusters, or use more images"),
        ({"clusters": []}, "with at least one level and one number of clusters"),
        ({"clusters": [3, 3]}, "give each number of clusters once"),
        ({"components": 0}, "must be positive"),
        ({"size": 16}, "size=16: a model in memory needs a multiple of 32 pixels"),
    ],
)
def test_wrong_settings_are_said(settings, message, segmented):
    with pytest.raises(ValueError, match=message):
        run_protocol("cluster", scenes.Colors(), PLAIN, segmented, SMALL | settings)


def test_masks_without_a_class_are_refused(tmp_path):
    data = scenes.segmented_images(tmp_path / "data", size=(64, 96))
    for path in (data / "labels").glob("test*.png"):
        Image.fromarray(np.full((64, 96), 255, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"\(test\) are all void .*choose images with classes"):
        run_protocol("cluster", scenes.Colors(), PLAIN, data, SMALL)
