"""The protocol `depth`: a linear layer with bins on frozen features, as DINOv3 evaluates on NYUv2."""

import json
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image

from clove_hub.data.depth import open_distances
from clove_hub.evaluation.depth import (
    FIGURES,
    Settings,
    depth_scores,
    distances,
    in_order,
    new_probe,
    predict,
    schedule,
    scored,
    sig_loss,
    varied,
)
from clove_hub.evaluation.run import run_protocol
from clove_hub.geometry import upsampled
from clove_hub.weights import Preprocessing
from clove_hub.weights.backbone import Backbone

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)
SMALL = {"crop": [64, 96], "steps": 4, "batch": 2}


@pytest.fixture(scope="module")
def official(golden):
    return {name: torch.from_numpy(value) for name, value in golden["nyu_depth"].items() if value.dtype.kind in "fib"}


def test_distances_and_figures_are_those_of_dinov3s_program(official, golden):
    probe = new_probe(8, torch.Generator()).eval()
    probe[1].weight.data = official["weight"][:, :, None, None]
    probe[1].bias.data = official["bias"]
    with torch.no_grad():
        cells = distances(probe(official["features"].float().permute(0, 3, 1, 2) / 10), 10.0)
    torch.testing.assert_close(cells, official["depth_of_cells"][:, 0], atol=1e-5, rtol=0)
    truth = official["truth"][:, 0]
    predicted = upsampled(cells, (truth.shape[1], truth.shape[2]))
    torch.testing.assert_close(predicted[:, ::2, ::2], official["predicted"][:, 0], atol=1e-5, rtol=0)
    rows = []
    for found, right, valid in zip(predicted, truth, official["valid"][:, 0], strict=True):
        assert torch.equal(scored(right, 10.0, kinect=True), valid)
        rows.append(depth_scores(found, right, valid))
    names = {"delta1": "a1", "delta2": "a2", "delta3": "a3", "RMSE": "rmse", "abs-rel": "abs_rel", "log10": "log_10"}
    places = [golden["nyu_depth"]["names"].tolist().index(names[figure]) for figure in FIGURES]
    units = np.array([100 if figure.startswith("delta") else 1 for figure in FIGURES])
    expected = golden["nyu_depth"]["per_image"][:, places] * units
    np.testing.assert_allclose(np.array(rows), expected, atol=1e-5, rtol=1e-5)
    known = official["valid"][:, 0]
    for variance, name in ((False, "sigloss_warm_up"), (True, "sigloss")):
        loss = sig_loss(predicted[known], truth[known], variance)
        assert float(loss) == pytest.approx(float(official[name]), abs=1e-5)


@pytest.mark.parametrize(
    ("steps", "step", "rate", "beta1"),
    [  # what the official scheduler gave the optimizer
        (38400, 0, 3e-07, 0),
        (38400, 1, 3.234374999607817e-07, 0),
        (38400, 6400, 0.00014025190528383288, 0),
        (38400, 12799, 0.00022529304852436912, 0),
        (38400, 12800, 0.00022499237244348423, 0.85),
        (38400, 12801, 0.00022498174438506576, 0.8500000003764955),
        (38400, 25600, 7.499837294545821e-05, 0.9),
        (38400, 38399, 1.2e-08, 0.9499999996235045),
        (30, 9, 0.00021465100905948385, 0),
        (30, 10, 0.00021101405604151156, 0.85),
        (30, 20, 6.184173886764279e-05, 0.9),
    ],
)
def test_the_schedule_is_that_of_dinov3s_program(steps, step, rate, beta1):
    assert schedule(step, steps, 3e-4) == pytest.approx((rate, beta1), rel=1e-9)


def test_the_schedule_of_few_steps_has_no_ramp():
    assert schedule(0, 2, 1.0)[1] == 0.85


def test_colors_at_a_distance_are_learned(tmp_path):
    data = scenes.distant_blocks(tmp_path)
    settings = SMALL | {"steps": 60, "batch": 3, "learning_rate": 0.2, "seeds": 2}
    found = run_protocol("depth", scenes.Colors(), PLAIN, data, settings, seed=3)
    blind = run_protocol("depth", scenes.Colors(), PLAIN, data, settings | {"learning_rate": 1e-9}, seed=3)
    assert found.metrics["delta2"] > 80
    assert found.metrics["RMSE"] < 0.6 * blind.metrics["RMSE"]
    assert list(found.metrics) == list(FIGURES)
    assert (found.seeds, found.data.samples, found.rule) == ((3, 4), 4, "dinov3")
    assert 0 < found.deviations["RMSE"] < 0.6
    images = (found.items or {})["image"]
    assert found.metrics["RMSE"] == pytest.approx(np.mean([one["RMSE"] for one in images.values()]))
    x0, y0, x1, y1 = 8, 9, 120, 94
    assert images["test_0001/rgb_00000.jpg"]["pixels"] == (x1 - x0) * (
        y1 - y0 - 1
    )  # Eigen's crop, without the row of 0


def test_the_prediction_is_the_mean_of_an_image_and_its_mirror_image():
    """So that it is mirrored where the image is, though the padding is on one side only."""
    torch.manual_seed(0)
    backbone = Backbone(scenes.Patches(), PLAIN, "patches")
    probe = new_probe(192, torch.Generator().manual_seed(0)).eval()
    probe[1].weight.data *= 100
    pixels = torch.randn(3, 40, 70)
    with torch.no_grad():
        (found,) = predict(backbone, [probe], pixels, Settings())
        (mirrored,) = predict(backbone, [probe], pixels.flip(2), Settings())
    assert found.shape == (40, 70)
    assert float((found - found.flip(1)).abs().max()) > 0.1
    torch.testing.assert_close(mirrored.flip(1), found)


def test_a_photo_and_its_map_are_changed_together():
    """The photo shows the map itself: gray in proportion to the distance."""
    rng = np.random.default_rng(0)
    meters = rng.integers(1, 9, (5, 7)).repeat(20, 0).repeat(20, 1).astype(np.float32)
    photo = (25 * meters).astype(np.uint8)[:, :, None].repeat(3, 2)
    for seed in range(20):
        image, truth = varied(photo, meters, False, (60, 80), np.random.default_rng([seed, 0]))
        assert (image.shape, truth.shape, image.dtype) == ((60, 80, 3), (60, 80), np.float32)
        known = truth > 0
        inside = known & (image[:, :, 0] < 250)  # not too bright for 8 bits
        assert np.corrcoef(image[inside, 0], truth[inside])[0, 1] > 0.95
    kinds = {
        varied(photo, meters, False, (100, 140), np.random.default_rng([seed, 0]))[1].tobytes() for seed in range(20)
    }
    assert len(kinds) > 4  # turned by any angle, mirrored, or neither


def test_the_border_of_nyu_is_not_learned_from():
    meters = np.zeros((480, 640), dtype=np.float32)
    meters[45:472, 43:608] = 2
    photo = np.zeros((480, 640, 3), dtype=np.uint8)
    for seed in range(8):
        _, truth = varied(photo, meters, True, (416, 544), np.random.default_rng([seed, 1]))
        assert (truth == 2).mean() > 0.95  # but for corners that were turned out of sight


def test_every_image_is_seen_once_before_any_is_seen_twice():
    order = in_order(5, 13, seed=2)
    assert [sorted(part.tolist()) for part in (order[:5], order[5:10])] == [[0, 1, 2, 3, 4]] * 2
    assert len(order) == 13
    assert order.tolist() != in_order(5, 13, seed=3).tolist()


def test_levels_are_seen_side_by_side(tmp_path):
    data = scenes.distant_blocks(tmp_path, train=2, test=1)
    one, two = (
        run_protocol("depth", scenes.small_resnet(), PLAIN, data, SMALL | {"levels": levels})
        for levels in ([-1], [-1, -2])
    )
    assert one.metrics["RMSE"] != two.metrics["RMSE"]


# ---- the data --------------------------------------------------------------------------------------------------------


def own_layout(folder: Path, scale: float | None) -> Path:
    nyu = scenes.distant_blocks(folder / "nyu")
    for split in ("train", "test"):
        names = []
        for line in (nyu / f"nyu_{split}.txt").read_text().splitlines():
            photo, depth, _ = line.split()
            name = f"{split}/{Path(photo).stem}"
            for path, end in ((photo, f"images/{name}.jpg"), (depth, f"depth/{name}.png")):
                (folder / end).parent.mkdir(parents=True, exist_ok=True)
                (nyu / path.lstrip("/")).rename(folder / end)
            names.append(name)
        (folder / f"{split}.txt").write_text("\n".join(names))
    if scale is not None:
        (folder / "depth.json").write_text(json.dumps({"scale": scale}))
    return folder


@pytest.mark.parametrize(("scale", "nearest"), [(None, 1.0), (500, 2.0)])
def test_ones_own_layout_declares_its_scale(scale, nearest, tmp_path):
    data = own_layout(tmp_path, scale)
    part = open_distances(data, "train")
    meters = part.meters(part.pairs[0], (128, 96))
    assert (meters.dtype, sorted(set(meters.ravel().tolist()))[:2]) == (np.float32, [0.0, nearest])
    assert (len(part.pairs), part.kinect) == (6, False)
    found = run_protocol("depth", scenes.Colors(), PLAIN, data, SMALL | {"crop": [96, 128], "max_depth": 20})
    assert (found.items or {})["image"]["images/test/rgb_00000.jpg"][
        "pixels"
    ] == 95 * 128  # every pixel but the row of 0


def test_photos_without_a_map_are_left_out_of_nyus_list(tmp_path):
    data = scenes.distant_blocks(tmp_path)
    listed = data / "nyu_train.txt"
    listed.write_text(listed.read_text() + "/bedroom/rgb_00001.jpg None 518.8579\n")
    assert len(open_distances(data, "train").pairs) == 6


def test_images_without_a_distance_do_not_count_and_one_must_have_some(tmp_path):
    data = scenes.distant_blocks(tmp_path)
    empty = Image.fromarray(np.zeros((96, 128), dtype=np.uint16))
    maps = sorted((data / "test_0001").glob("*.png"))
    empty.save(maps[0])
    found = run_protocol("depth", scenes.Colors(), PLAIN, data, SMALL)
    assert len((found.items or {})["image"]) == 3
    for path in maps:
        empty.save(path)
    with pytest.raises(ValueError, match=r"no pixel of .* \(test\) has a distance from 0.001 to 10.0 m"):
        run_protocol("depth", scenes.Colors(), PLAIN, data, SMALL)
    for path in (data / "train_0001").glob("*.png"):
        empty.save(path)
    with pytest.raises(ValueError, match=r"\(train\) hold only zeros"):
        run_protocol("depth", scenes.Colors(), PLAIN, data, SMALL)


def test_the_way_out_of_a_crop_that_is_too_large_works(tmp_path):
    data = scenes.distant_blocks(tmp_path)
    with pytest.raises(ValueError, match=r"has 113x85 pixels .*crop=\[416, 544\].*set crop=\[85,113\]"):
        run_protocol("depth", scenes.Colors(), PLAIN, data, {"steps": 2, "batch": 2})
    run_protocol("depth", scenes.Colors(), PLAIN, data, {"steps": 2, "batch": 2, "crop": [85, 113]})


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda data: (data / "nyu_test.txt").unlink(), r"nyu_test\.txt is missing; .* has the lists of train"),
        (lambda data: [path.unlink() for path in data.glob("*.txt")], "none of the layouts for depth"),
        (lambda data: (data / "train_0001" / "rgb_00002.jpg").unlink(), r"1 of the files .*rgb_00002\.jpg"),
        (lambda data: (data / "nyu_train.txt").write_text("a.jpg\n"), "has the line 'a.jpg'; expected a photo, a map"),
        (
            lambda data: Image.fromarray(np.ones((9, 9), np.uint16)).save(data / "test_0001" / "sync_depth_00001.png"),
            r"sync_depth_00001\.png is 9x9 pixels, but .*rgb_00001\.jpg is 128x96",
        ),
        (
            lambda data: (data / "train_0001" / "sync_depth_00001.png").write_bytes(b"torn"),
            r"sync_depth_00001\.png cannot be read",
        ),
    ],
)
def test_a_bad_folder_is_explained(break_it, expected, tmp_path):
    data = scenes.distant_blocks(tmp_path)
    break_it(data)
    with pytest.raises(ValueError, match=expected):
        run_protocol("depth", scenes.Colors(), PLAIN, data, SMALL)


def test_a_bad_scale_or_a_missing_name_is_explained(tmp_path):
    data = own_layout(tmp_path, scale=0)
    with pytest.raises(ValueError, match=r"depth\.json has the scale 0; expected the units of a meter"):
        open_distances(data, "train")
    (data / "depth.json").unlink()
    (data / "train.txt").write_text("nowhere\n")
    with pytest.raises(ValueError, match=r"images/nowhere\.\* is missing; train\.txt names it"):
        open_distances(data, "train")


def test_the_loss_is_scale_invariant_but_for_its_mean():
    torch.manual_seed(0)
    truth = torch.rand(50) * 9 + 0.5
    assert float(sig_loss(truth, truth, True)) == pytest.approx(0, abs=1e-5)
    assert float(sig_loss(2 * truth, truth, True)) == pytest.approx((0.15 * np.log(2) ** 2) ** 0.5, rel=1e-2)
