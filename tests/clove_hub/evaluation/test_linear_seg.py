"""`linear-seg`: the numbers of the released evaluation of DINOv3, and what it does with photos."""

import numpy as np
import pytest
import scenes
import torch
from torch.nn import functional as F

from clove_hub.data.masks import open_segmented
from clove_hub.evaluation.augment import distorted, varied_box
from clove_hub.evaluation.linear_seg import (
    RULES,
    Head,
    _drawn,
    learn,
    learning_rate,
    probabilities,
    slid,
    starts,
    trained,
)
from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.evaluation.segmenting import classes_at, nearest
from clove_hub.weights import Backbone, Preprocessing

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SMALL = {"steps": 60, "batch": 4, "crop": 64, "stride": 43, "learning_rate": 0.05, "test": "test"}


def head_of(oracle, trained: str = "") -> Head:
    head = Head(10, 7, torch.Generator())
    for name, own in (
        ("norm.weight", "bn_weight"),
        ("norm.bias", "bn_bias"),
        ("layer.weight", "weight"),
        ("layer.bias", "bias"),
    ):
        parameter = head.get_parameter(name)
        parameter.data = torch.from_numpy(oracle[own]).reshape(parameter.shape).clone()
    head.norm.running_mean.copy_(torch.from_numpy(oracle["bn_mean"]))
    head.norm.running_var.copy_(torch.from_numpy(oracle["bn_var"]))
    return head


def test_the_windows_and_their_mean_are_the_released_ones(golden):
    oracle = golden["linear_segmentation"]
    image, head = torch.from_numpy(oracle["image"][0]).float() / 20, head_of(oracle).eval()
    crop, stride = int(oracle["crop"][0]), int(oracle["stride"][0])
    assert starts(image.shape[1], crop, stride) == oracle["windows_top"].tolist()
    assert starts(image.shape[2], crop, stride) == oracle["windows_left"].tolist()

    def logits(windows):
        means = F.avg_pool2d(windows, int(oracle["patch"]))
        features = torch.einsum("dc,bchw->bdhw", torch.from_numpy(oracle["lift"]), means)
        return F.interpolate(head(features), size=windows.shape[2:], mode="bilinear")

    with torch.no_grad():
        found = slid(image, logits, crop, stride)
    torch.testing.assert_close(found[:, ::3, ::3], torch.from_numpy(oracle["slid_logits"]), rtol=1e-4, atol=1e-4)
    predicted = classes_at(found, tuple(oracle["target_size"].tolist()))
    assert float((predicted != torch.from_numpy(oracle["predicted"])).float().mean()) <= 1e-3


def test_forty_steps_end_where_the_released_ones_end(golden):
    oracle = golden["linear_segmentation"]
    features, masks = torch.from_numpy(oracle["train_features"]).float() / 10, torch.from_numpy(oracle["train_masks"])
    features = features.permute(0, 3, 1, 2)
    head = head_of(oracle).train()
    rule = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-3)
    losses = []
    for step in range(40):
        rows = [2 * step % 8, (2 * step + 1) % 8]
        rate = 1e-3 * learning_rate(step, 40, 5)
        assert rate == pytest.approx(oracle["learning_rates"][step], abs=1e-7)
        losses.append(learn(head, rule, features[rows], masks[rows], rate))
    np.testing.assert_allclose(losses, oracle["losses"], rtol=1e-4)
    for found, name in (
        (head.layer.weight.flatten(1), "trained_weight"),
        (head.layer.bias, "trained_bias"),
        (head.norm.weight, "trained_bn_weight"),
        (head.norm.running_mean, "trained_bn_mean"),
    ):
        np.testing.assert_allclose(found.detach().numpy(), oracle[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_learning_rates_are_those_of_the_official_run(golden):
    for step, rate in golden["linear_segmentation"]["schedule_40k"].tolist():
        assert 1e-3 * learning_rate(int(step), 40_000, 1500) == pytest.approx(rate, abs=1e-7)
    settings = make_settings("linear-seg", {})
    assert round(settings.warm_up * settings.steps) == 1500
    assert (settings.crop, settings.short, settings.apart) == (512, 512, 341)


@pytest.mark.parametrize(
    ("step", "rate"),
    [  # mmcv's poly of power 1 to zero, times 1 - (1 - step / 1500) (1 - 1e-6) in the warm-up
        (0, 1e-9),
        (750, 5.00000500e-4 * (1 - 750 / 40_000)),
        (1499, (1 - 1 / 1500 * (1 - 1e-6)) * 1e-3 * (1 - 1499 / 40_000)),
        (1500, 0.9625e-3),
        (20_000, 0.5e-3),
        (39_999, 2.5e-8),
    ],
)
def test_the_learning_rate_of_dinov2_falls_along_a_line(step, rate):
    settings = make_settings("linear-seg", {"rule": "dinov2"})
    assert 1e-3 * learning_rate(step, 40_000, 1500, settings.followed.cosine) == pytest.approx(rate, rel=1e-6)


def test_the_rules_of_dinov2_are_its_published_configurations():
    for name, (levels, crop, apart) in {
        "dinov2": ((-1,), 512, 341),
        "dinov2-ms": ((-4, -3, -2, -1), 640, 320),
    }.items():
        settings = make_settings("linear-seg", {"rule": name})
        assert (settings.levels, settings.crop, settings.short, settings.apart) == (levels, crop, crop, apart)
        assert (settings.weight_decay, settings.dropout, settings.steps, settings.batch) == (1e-4, 0, 40_000, 16)
    assert RULES["dinov2-ms"].scales == (1, 3)
    assert [int(640 * ratio) for ratio in RULES["dinov2-ms"].ratios] == [640, 844, 1107, 1459, 1920]
    assert make_settings("linear-seg", {"rule": "dinov2-ms", "crop": 64, "weight_decay": 0.1}).apart == 32


def test_probabilities_of_several_sizes_and_their_mirror_images_are_added():
    """As mmseg's `aug_test` averages them: softmax at the image's own size, turned back."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 4, 3, padding=1)
    views = [torch.randn(3, *size) for size in ((20, 30), (33, 50))]
    with torch.no_grad():
        found = probabilities(views, lambda view: layer(view[None])[0], (25, 37))
        expected = torch.zeros(4, 25, 37)
        for view in views:
            for mirrored in (False, True):
                logits = layer((view.flip(2) if mirrored else view)[None])
                shares = F.interpolate(logits, size=(25, 37), mode="bilinear")[0].softmax(0)
                expected += shares.flip(2) if mirrored else shares
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_all_pixels_at_once_without_the_void_ones():
    torch.manual_seed(0)
    features, truth = torch.randn(3, 5, 4, 6), torch.randint(0, 4, (3, 30, 44), dtype=torch.uint8)
    truth[:, :7] = 255
    truth[1] = 255
    heads = [Head(5, 4, torch.Generator().manual_seed(1)).train() for _ in range(2)]
    rules = [torch.optim.AdamW(head.parameters(), lr=1e-3) for head in heads]
    loss = F.cross_entropy(
        F.interpolate(heads[0](features), size=(30, 44), mode="bilinear"), truth.long(), ignore_index=255
    )
    loss.backward()
    assert learn(heads[1], rules[1], features, truth, 1e-3) == pytest.approx(float(loss.detach()))
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)
    before = [parameter.clone() for parameter in heads[1].parameters()]
    assert learn(heads[1], rules[1], features, truth * 0 + 255, 1e-3) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, heads[1].parameters(), strict=True))


def test_bands_of_rows_give_the_classes_of_the_whole(monkeypatch):
    monkeypatch.setattr("clove_hub.evaluation.segmenting._MOST", 500)
    maps = torch.randn(5, 6, 8)
    whole = F.interpolate(maps[None], size=(41, 37), mode="bilinear")[0].argmax(0)
    assert torch.equal(classes_at(maps, (41, 37)), whole)


def test_a_mask_is_resized_as_interpolate_nearest_does():
    mask = torch.randint(0, 255, (37, 53), dtype=torch.uint8)
    for size in ((64, 64), (20, 91), (37, 53)):
        assert torch.equal(
            nearest(mask, size), F.interpolate(mask[None, None].float(), size=size)[0, 0].to(torch.uint8)
        )


# ---- crops -----------------------------------------------------------------------------------------------------------


def test_a_crop_shows_more_than_one_class_where_it_can():
    mask = torch.zeros(100, 200, dtype=torch.uint8)
    mask[:, 180:] = 1
    seen = [varied_box(mask, 40, np.random.default_rng(seed)) for seed in range(200)]
    assert all(w == h == 40 and 0 <= left <= 160 and 0 <= top <= 60 for left, top, w, h in seen)
    # One crop of sixteen has more than a quarter of the second class; of ten draws nearly half have one.
    assert 0.35 < sum(left > 150 for left, _, _, _ in seen) / 200 < 0.6
    assert sum(140 < left <= 150 for left, _, _, _ in seen) / 200 < 0.1  # two classes, and too much of one
    assert varied_box(mask, 500, np.random.default_rng(0)) == (0, 0, 200, 100)


def test_what_lies_beyond_a_small_photo_is_void(tmp_path):
    part = open_segmented(scenes.segmented_images(tmp_path, size=(64, 96)), "train")
    settings = make_settings("linear-seg", SMALL | {"crop": 400, "size": 64, "stride": None})
    backbone = Backbone(scenes.Colors(), PLAIN, "colors")
    sizes = set()
    for number in range(12):
        pixels, mask = _drawn(backbone, part, settings, 0, number)
        assert pixels.shape == (3, 400, 400)
        known = mask != 255
        height, width = int(known.any(1).nonzero().max()) + 1, int(known.any(0).nonzero().max()) + 1
        sizes.add(height)
        assert not bool(pixels[:, height:].any())
        assert not bool(pixels[:, :, width:].any())
        assert 32 <= height <= 128
        assert width == pytest.approx(1.5 * height, abs=2)
    assert len(sizes) > 6


def test_every_image_is_seen_once_before_any_is_seen_twice(tmp_path, monkeypatch):
    part = open_segmented(scenes.segmented_images(tmp_path, size=(64, 96)), "train")
    seen = []
    monkeypatch.setattr(
        type(part), "mask", lambda self, pair, size=None: seen.append(pair[0].name) or np.zeros((64, 96), np.uint8)
    )
    for number in range(12):
        _drawn(Backbone(scenes.Colors(), PLAIN, "colors"), part, make_settings("linear-seg", SMALL), 0, number)
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(pair[0].name for pair in part.pairs)
    assert seen[:6] != seen[6:]


def test_colors_are_distorted_within_their_limits():
    photo = torch.randint(0, 256, (3, 20, 20)).float()
    changed = [distorted(photo, np.random.default_rng(seed)) for seed in range(60)]
    assert all(float(one.min()) >= 0 and float(one.max()) <= 255 for one in changed)
    same = sum(torch.equal(one, photo) for one in changed)
    assert 0 <= same < 12  # a sixteenth
    gray = torch.full((3, 4, 4), 100.0)  # which neither saturation nor hue changes
    values = sorted(float(distorted(gray, np.random.default_rng(seed)).mean()) for seed in range(400))
    assert 34 <= values[0] < 60  # (100 - 32) / 2
    assert 170 < values[-1] <= 198  # (100 + 32) * 1.5
    assert torch.equal(distorted(photo[:2], np.random.default_rng(1)), photo[:2])  # bands that are no colors


# ---- the protocol ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    return scenes.segmented_images(tmp_path_factory.mktemp("segmented"), size=(64, 96))


def test_the_layer_reads_the_classes_of_colors_whatever_is_done_to_them_in_training(segmented):
    found = run_protocol("linear-seg", scenes.Colors(2), PLAIN, segmented, SMALL | {"seeds": 2, "steps": 14})
    assert found.metrics["mIoU"] > 60
    assert found.seeds == (0, 1)
    assert found.deviations["mIoU"] > 0
    assert found.rule == "dinov3"
    assert set(found.items["class"]) == {"color 0", "color 1", "color 2"}
    blind = run_protocol("linear-seg", scenes.Patches(32), PLAIN, segmented, SMALL | {"steps": 8})
    assert blind.metrics["mIoU"] < 50


def test_several_sizes_of_a_test_image_are_seen_by_dinov2_ms(segmented, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "clove_hub.evaluation.linear_seg.slid",
        lambda pixels, *rest: seen.append(pixels.shape[1:]) or slid(pixels, *rest),
    )
    settings = SMALL | {"rule": "dinov2-ms", "levels": [-1], "steps": 14, "stride": None}
    found = run_protocol("linear-seg", scenes.Colors(2), PLAIN, segmented, settings)
    assert found.rule == "dinov2-ms"
    assert found.settings["weight_decay"] == 1e-4
    assert found.metrics["mIoU"] > 60
    heights = [64, 84, 110, 145, 192]
    assert [shape[0] for shape in seen] == [height for _ in range(4) for height in heights for _ in range(2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "must be positive"),
        ({"warm_up": 1.0}, "warm_up and dropout must be"),
        ({"stride": 513}, "the stride must not exceed the crop"),
        ({"levels": [-1, -9]}, "has 1 feature levels"),
    ],
)
def test_wrong_settings_are_said(settings, message, segmented):
    with pytest.raises(ValueError, match=message):
        run_protocol("linear-seg", scenes.Colors(), PLAIN, segmented, SMALL | settings)


def test_levels_lie_side_by_side(segmented):
    model = scenes.small_resnet()
    part, settings = (
        open_segmented(segmented, "train"),
        make_settings("linear-seg", SMALL | {"steps": 2, "levels": [-1, -3]}),
    )
    head = trained(Backbone(model, PLAIN, "resnet"), part, settings, 0)
    assert head.layer.weight.shape == (3, 32 + 16, 1, 1)
