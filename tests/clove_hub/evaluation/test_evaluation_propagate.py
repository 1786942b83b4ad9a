"""Evaluation by videos: DAVIS's J and F, and labels carried from frame to frame."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image
from torch.nn import functional as F

from clove_hub.data.clips import find_clips
from clove_hub.evaluation.propagate import prepared, score
from clove_hub.evaluation.propagation import RULES, carried, first_labels, propagate, seen_size
from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.evaluation.scores import boundary, boundary_accuracy, region_similarity
from clove_hub.weights import Backbone, Preprocessing, load_backbone

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
OURS = {"rule": "ours"}


# ---- J and F ---------------------------------------------------------------------------------------------------------


def naive_boundary(mask: np.ndarray) -> set[tuple[int, int]]:
    """The pixels that differ from their neighbor to the right, below, or both; at the border from those there are."""
    height, width = mask.shape
    found = set()
    for y, x in np.ndindex(height, width):
        if y == height - 1 and x == width - 1:
            continue
        if y == height - 1:
            others = [(y, x + 1)]
        elif x == width - 1:
            others = [(y + 1, x)]
        else:
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        if any(mask[y, x] != mask[other] for other in others):
            found.add((y, x))
    return found


def naive_f(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Precision and recall of boundary pixels, a match being one within 0.8 % of the diagonal, rounded up."""
    radius = int(np.ceil(0.008 * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
    ours, theirs = naive_boundary(predicted), naive_boundary(truth)

    def near(pixel, others):
        return any((pixel[0] - y) ** 2 + (pixel[1] - x) ** 2 <= radius**2 for y, x in others)

    if not ours and not theirs:
        return 1.0
    precision = sum(near(pixel, theirs) for pixel in ours) / len(ours) if ours else 1.0
    recall = sum(near(pixel, ours) for pixel in theirs) / len(theirs) if theirs else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(3):
        cy, cx, r = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, 14)
        mask |= (y - cy) ** 2 + (x - cx) ** 2 < r**2
    return mask


@pytest.mark.parametrize("shape", [(40, 60), (90, 130)])  # tolerances of one and of two pixels
def test_j_and_f_are_those_of_the_definition(shape):
    rng = np.random.default_rng(0)
    for _ in range(6):
        truth = blob(rng, *shape)
        predicted = np.roll(truth, rng.integers(-4, 5, 2), (0, 1)) ^ (blob(rng, *shape) & (rng.random(shape) < 0.1))
        tensors = torch.from_numpy(predicted), torch.from_numpy(truth)
        found = boundary(tensors[0])
        assert {(int(y), int(x)) for y, x in found.nonzero()} == naive_boundary(predicted)
        assert boundary_accuracy(*tensors) == pytest.approx(naive_f(predicted, truth))
        pixels = {tuple(p) for p in np.argwhere(predicted)}, {tuple(p) for p in np.argwhere(truth)}
        assert region_similarity(*tensors) == pytest.approx(len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]))


def test_empty_masks_agree_with_each_other_only():
    empty, full = torch.zeros(20, 20, dtype=torch.bool), torch.zeros(20, 20, dtype=torch.bool)
    full[5:9, 5:9] = True
    assert (region_similarity(empty, empty), boundary_accuracy(empty, empty)) == (1, 1)
    for pair in ((empty, full), (full, empty)):
        assert (region_similarity(*pair), boundary_accuracy(*pair)) == (0, 0)
    assert boundary_accuracy(full, full) == 1
    far = torch.roll(full, 10, 1)
    assert boundary_accuracy(full, far) == 0


def test_boundary_accuracy_forgives_the_tolerance_and_no_more():
    mask = torch.zeros(480, 854, dtype=torch.bool)  # 0.008 x 979.6 pixels, rounded up: 8
    mask[100:300, 200:500] = True
    assert boundary_accuracy(torch.roll(mask, 8, 1), mask) == 1
    assert boundary_accuracy(torch.roll(mask, 9, 1), mask) < 1


def test_mean_recall_and_decay_are_those_of_davis2017_evaluation(golden):
    """Recorded from davis2017-evaluation; void is background, as `read_objects` makes it."""
    g, found = golden["davis_jf"], {}
    for clip in ("walk", "gap", "long", "one"):
        truth = torch.from_numpy(np.where(g[f"{clip}_truth"] == 255, 0, g[f"{clip}_truth"]))
        for number, own in enumerate(score(list(truth), list(torch.from_numpy(g[f"{clip}_predicted"]))), start=1):
            found[f"{clip}_{number}"] = own
    assert list(found) == g["objects"].tolist()
    shares = np.stack(list(found.values()))  # (objects, 2, 3)
    for measure, by_kind in zip("JF", shares.transpose(1, 2, 0), strict=True):
        for kind, values in zip(("mean", "recall", "decay"), by_kind, strict=True):
            np.testing.assert_allclose(values, g[f"{measure}_{kind}_per_object"], atol=1e-12)
            np.testing.assert_allclose(values.mean(), g[f"{measure}_{kind}"], atol=1e-12)


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "case"), [("videowalk", "wide"), ("videowalk", "odd"), ("dino", "tall"), ("dino", "faint")]
)
def test_labels_masks_and_scores_are_those_of_the_released_code(rule, case, golden):
    g = {
        key.removeprefix(f"{case}_"): value
        for key, value in golden[f"propagate_{rule}"].items()
        if key.startswith(case)
    }
    numbers = {key: g[key.replace("_", "")].item() for key in ("context", "radius", "top_k", "temperature")}
    chosen = replace(RULES[rule], **numbers)
    masks, maps = torch.from_numpy(g["masks"]), torch.from_numpy(g["features"]).float().permute(0, 3, 1, 2)
    size = (masks.shape[1], masks.shape[2])
    seen = seen_size(size, int(g.get("patch", 1)), chosen)
    assert seen == tuple(g.get("resized", size))
    first = first_labels(masks[0], seen, (maps.shape[2], maps.shape[3]), chosen)
    np.testing.assert_allclose(first.permute(1, 2, 0).numpy(), g["first_labels"], atol=1e-5)
    labels, predicted = zip(*carried(maps, masks[0], seen, chosen), strict=True)
    off = np.abs(torch.stack(labels).permute(0, 2, 3, 1).numpy() - g["labels"]).max(-1) > 1e-5
    assert off.mean() <= 1e-3  # the k-th and the next neighbor may change places by rounding
    assert (torch.stack(predicted).numpy() != g["predicted"][1:]).mean() <= 1e-3
    theirs = [masks[0], *torch.from_numpy(g["predicted"][1:])]
    np.testing.assert_allclose(score(list(masks), theirs)[:, :, 0], g["jf"], atol=1e-6)
    np.testing.assert_allclose(score(list(masks), [masks[0], *predicted])[:, :, 0], g["jf"], atol=1e-3)


def test_the_rules_differ_in_what_they_find(golden):
    """The released code's 59.8 becomes 58.6 without the copies of the first frame, 60.3 with the radius in it."""
    g = golden["propagate_videowalk"]
    masks, maps = torch.from_numpy(g["odd_masks"]), torch.from_numpy(g["odd_features"]).float().permute(0, 3, 1, 2)
    rule = replace(RULES["videowalk"], context=3, radius=4, top_k=5, temperature=0.07)

    def found(**change: object) -> float:
        predicted = [mask for _, mask in carried(maps, masks[0], (71, 93), replace(rule, **change))]
        return 100 * float(score(list(masks), [masks[0], *predicted])[:, :, 0].mean())

    assert found() == pytest.approx(59.8, abs=0.05)
    assert found(copies=False) == pytest.approx(58.6, abs=0.05)
    assert found(first_restricted=True) == pytest.approx(60.3, abs=0.05)


# ---- propagation -----------------------------------------------------------------------------------------------------


def naive_propagate(query, keys, labels, radius, top_k, temperature):
    channels, height, width = query.shape
    result = np.zeros((labels[0].shape[0], height, width))
    for y, x in np.ndindex(height, width):
        candidates = []
        for key, label in zip(keys, labels, strict=True):
            for v, u in np.ndindex(height, width):
                if radius and (abs(v - y) > radius or abs(u - x) > radius):
                    continue
                candidates.append((float(query[:, y, x] @ key[:, v, u]), label[:, v, u]))
        best = sorted(candidates, key=lambda pair: -pair[0])[:top_k]
        weights = np.exp([cosine / temperature for cosine, _ in best])
        result[:, y, x] = sum(w * value for w, (_, value) in zip(weights, best, strict=True)) / weights.sum()
    assert channels
    return result


@pytest.mark.parametrize(("radius", "top_k"), [(0, 4), (2, 3), (1, 30)])
def test_labels_are_the_weighted_mean_of_the_most_similar_cells_near_by(radius, top_k):
    rng = np.random.default_rng(0)
    query, *keys = (F.normalize(torch.from_numpy(rng.normal(size=(8, 5, 6))).float(), dim=0) for _ in range(4))
    labels = [torch.from_numpy(rng.random((3, 5, 6))).float() for _ in keys]
    rule = replace(RULES["ours"], radius=radius, top_k=top_k)
    found = propagate(query, list(zip(keys, labels, strict=True)), rule)
    doubles = [[tensor.double().numpy() for tensor in own] for own in (keys, labels)]
    expected = naive_propagate(query.double().numpy(), *doubles, radius, top_k, 0.05)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_by_dino_s_rule_all_that_equal_the_last_of_the_most_similar_count():
    """Of nine cells in reach of the middle one, two are like it, the other seven equal each other; three are asked for."""
    keys = torch.zeros(2, 3, 3)
    keys[0], keys[1, 0, :2] = 0.6, 1.0
    keys = F.normalize(keys, dim=0)
    query, labels = keys[:, :1, :1].expand(2, 3, 3), torch.arange(9.0).view(1, 3, 3)
    rule = replace(RULES["dino"], top_k=3)
    weights = ((keys.flatten(1).T @ query[:, 1, 1]).double() / rule.temperature).exp().numpy()
    found = propagate(query, [(keys, labels)], rule)[0, 1, 1]
    assert float(found) == pytest.approx(np.average(np.arange(9), weights=weights), abs=1e-5)
    three = propagate(query, [(keys, labels)], replace(rule, ties=False))[0, 1, 1]
    assert abs(float(three - found)) > 1e-3


def test_squares_that_move_are_followed(tmp_path):
    """Two textured squares, 8 pixels a frame: their patches alone say where they are."""
    scenes.moving_clips(tmp_path)
    record = run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS)
    assert record.metrics["J&F"] > 95
    assert record.metrics["J&F"] == pytest.approx((record.metrics["J"] + record.metrics["F"]) / 2)
    assert record.data.samples == 2

    class Blind(scenes.Patches):
        def forward_features(self, pixels):
            return torch.ones_like(super().forward_features(pixels))

    assert run_protocol("propagate", Blind(8), PLAIN, tmp_path, OURS).metrics["J&F"] < 70


def test_only_what_lies_within_the_radius_is_found(tmp_path):
    """Squares that jump by 8 cells at once are lost within 4 cells, found within 8."""
    scenes.moving_clips(tmp_path, clips=1, frames=3, objects=1)
    photos, masks = tmp_path / "JPEGImages" / "clip0", tmp_path / "Annotations" / "clip0"
    rng = np.random.default_rng(0)
    ground, texture = scenes.noise(rng, 96, 160), scenes.noise(rng, 32, 32)
    for frame in range(3):
        image, mask = ground.copy(), np.zeros((96, 160), dtype=np.uint8)
        image[32:64, 64 * (frame % 2) : 64 * (frame % 2) + 32] = texture
        mask[32:64, 64 * (frame % 2) : 64 * (frame % 2) + 32] = 1
        Image.fromarray(image).save(photos / f"{frame:05d}.png")
        Image.fromarray(mask).save(masks / f"{frame:05d}.png")
    found = [
        run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS | {"radius": radius}).metrics["J"]
        for radius in (4, 8, 0)
    ]
    assert found[0] < 20
    assert min(found[1:]) > 90


def test_the_first_and_the_last_frame_do_not_count(tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=5)
    before = run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS).metrics
    path = tmp_path / "Annotations" / "clip0" / "00004.png"
    Image.fromarray(np.zeros((96, 160), dtype=np.uint8)).save(path)
    assert run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS).metrics == before
    path = path.with_name("00003.png")
    Image.fromarray(np.zeros((96, 160), dtype=np.uint8)).save(path)
    assert run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS).metrics["J"] < before["J"] - 20


def test_the_single_object_of_davis_2016_is_stored_as_255(tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=5, objects=1)
    before = run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS).metrics
    for path in (tmp_path / "Annotations" / "clip0").iterdir():
        with Image.open(path) as image:
            mask = np.array(image) * 255
        Image.fromarray(mask).save(path)
    assert run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS).metrics == before


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / "val.txt").unlink(), r"has none of ImageSets/2017/val\.txt"),
        (lambda f: (f / "val.txt").write_text("yeti\n"), r"the folder .*JPEGImages/yeti is missing; .*val\.txt names"),
        (
            lambda f: (f / "Annotations/clip0/00002.png").unlink(),
            r"1 masks are missing, the first is .*clip0/00002\.png",
        ),
        (
            lambda f: (f / "JPEGImages/clip0/00002.png").write_bytes(b"torn"),
            r"1 of 1 clips .* JPEGImages/clip0/00002\.png: not an image",
        ),
        (
            lambda f: Image.new("L", (160, 90)).save(f / "Annotations/clip0/00001.png"),
            r"Annotations/clip0/00001\.png is 160x90 pixels, but .*JPEGImages/clip0/00001\.png is 160x96",
        ),
        (
            lambda f: Image.new("RGB", (100, 90)).save(f / "JPEGImages/clip0/00001.png"),
            r"(00001\.png is 100x90 pixels, the clip's first 160x96|but .*00001\.png is 100x90)",
        ),
        (
            lambda f: Image.new("L", (160, 96)).save(f / "Annotations/clip0/00000.png"),
            r"Annotations/clip0/00000\.png has no object",
        ),
        (
            lambda f: Image.new("L", (160, 96), 9).save(f / "Annotations/clip0/00001.png"),
            r"Annotations/clip0 has the object 9, which its first mask lacks",
        ),
        (
            lambda f: [(f / "JPEGImages/clip0" / f"0000{n}.png").unlink() for n in (1, 2)],
            r"JPEGImages/clip0 has 2 frames",
        ),
    ],
)
def test_bad_clips_are_named_by_their_path(break_it, expected, tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=4)
    break_it(tmp_path)
    with pytest.raises(ValueError, match=expected):
        run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, OURS)


@pytest.mark.parametrize("rule", RULES)
def test_squares_that_move_are_followed_by_every_rule(rule, tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=5)
    record = run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, {"rule": rule})
    assert record.metrics["J&F"] > (45 if rule == "dino" else 90)  # whose frames are noise enlarged five times
    assert record.rule == rule
    numbers = {key: record.settings[key] for key in ("context", "radius", "top_k", "temperature")}
    assert numbers == {key: getattr(RULES[rule], key) for key in numbers}


def test_a_setting_that_is_given_wins_over_the_rule_s(tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=4)
    record = run_protocol("propagate", scenes.Patches(8), PLAIN, tmp_path, {"rule": "dino", "top_k": 3, "radius": 0})
    given = {"context": 7, "radius": 0, "top_k": 3, "temperature": 0.1, "frames": None}
    assert record.settings == {"rule": "dino", "level": -1, "fine": False, **given}


def test_layer3_of_a_plain_resnet_is_finer_unless_something_else_is_asked_for(tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=3)
    seen: list[tuple[int, ...]] = []
    for settings, shape, level, fine in (
        ({}, (12, 20), -2, True),  # of 96 x 160 pixels
        ({"rule": "ours"}, (12, 20), -2, True),
        ({"rule": "dino"}, (30, 48), -2, False),  # of 480 x 768
        ({"rule": "dino", "fine": True}, (60, 96), -2, True),
        ({"fine": False}, (6, 10), -2, False),
        ({"level": -3}, None, -3, False),
    ):
        model = scenes.small_resnet()
        model.layer3.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[2:])))
        record = run_protocol("propagate", model, PLAIN, tmp_path, settings)
        assert (record.settings["level"], record.settings["fine"]) == (level, fine)
        assert seen == ([shape] * 3 if shape else [])
        seen.clear()


def test_the_stride_of_layer3_goes_without_dilation_by_videowalk_s_rule():
    model = scenes.small_resnet()
    for rule, dilations in (("videowalk", {(1, 1)}), ("ours", {(1, 1), (2, 2)})):
        made, _ = prepared(Backbone(model, PLAIN, "small"), make_settings("propagate", {"rule": rule}))
        layers = [layer for layer in made.model.layer3.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert {layer.stride for layer in layers} == {(1, 1)}
        deeper, _ = prepared(load_backbone("random:resnet18"), make_settings("propagate", {"rule": rule}))
        layers = [layer for layer in deeper.model.layer3.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert {layer.dilation for layer in layers} == dilations


def test_a_resnet_sees_frames_as_they_are_by_videowalk_s_rule(tmp_path):
    """96 x 156 pixels, padded to 96 x 160 by the other rule, have 12 x 20 cells of 8 either way: the last is cut."""
    scenes.moving_clips(tmp_path, clips=1, frames=3)
    for kind in ("JPEGImages", "Annotations"):
        for path in (tmp_path / kind / "clip0").iterdir():
            with Image.open(path) as image:
                image.crop((0, 0, 156, 93)).save(path)
    for rule, size in (("videowalk", (93, 156)), ("ours", (96, 160)), ("dino", (480, 768))):
        model, seen = scenes.small_resnet(), []
        model.conv1.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(tuple(inputs[0].shape[2:])))
        run_protocol("propagate", model, PLAIN, tmp_path, {"rule": rule})
        assert seen == [size] * 3


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("vit_tiny_patch16_224", {"videowalk": -1, "dino": -1}),
        ("vit_small_patch14_dinov2", {"videowalk": -1, "dino": -1}),
        ("convnext_atto", {"videowalk": -3, "dino": -2}),
        ("swin_tiny_patch4_window7_224", {"videowalk": -3, "dino": -2}),
        ("resnet18", {"videowalk": -2, "dino": -2}),
        ("resnet50d", {"videowalk": -3, "dino": -2}),  # its shortcuts pool: no plain blocks
    ],
)
def test_the_level_is_chosen_by_the_architecture(name, levels):
    backbone = load_backbone(f"random:{name}")
    for rule, level in levels.items():
        made, settings = prepared(backbone, make_settings("propagate", {"rule": rule}))
        assert settings.level == level
        assert settings.fine == (made is not backbone) == (name == "resnet18" and rule == "videowalk")


def test_a_finer_layer3_of_another_network_is_refused_and_the_way_out_works(tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=3)
    for model, settings in ((scenes.Patches(8), {}), (scenes.small_resnet(), {"level": -1})):
        with pytest.raises(ValueError, match=r"fine=true is for layer3 of a ResNet of plain blocks.*leave fine out"):
            run_protocol("propagate", model, PLAIN, tmp_path, settings | {"fine": True})
        assert run_protocol("propagate", model, PLAIN, tmp_path, settings).settings["fine"] is False


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
@pytest.mark.slow
def test_other_architectures_follow_by_every_rule(name, tmp_path):
    scenes.moving_clips(tmp_path, clips=1, frames=3)
    backbone = load_backbone(f"random:{name}")
    for rule in RULES:
        found = run_protocol("propagate", backbone.model, backbone.preprocessing, tmp_path, {"rule": rule})
        assert 0 <= found.metrics["J&F"] <= 100


def test_real_clips_are_followed_better_than_by_standing_still():
    from conftest import SHARED

    folder = SHARED / "data" / "davis-like"
    if not folder.is_dir():
        pytest.skip(f"the clips are not at hand ({folder})")
    assert len(find_clips(Path(folder), None)) == 3
    backbone = load_backbone("random:test_resnet")
    found = run_protocol("propagate", backbone.model, backbone.preprocessing, folder, {"frames": 4})
    assert 30 < found.metrics["J&F"] < 100
    assert found.data.samples == 3
