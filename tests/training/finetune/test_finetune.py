"""What fine-tuning with torchvision computes: networks, schedule, scores, and tables of results."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from clove_hub.data import coco, files
from clove_hub.training.finetune import dataset, schedule, scores
from clove_hub.training.finetune.settings import read_settings
from clove_hub.training.run.sampler import StepSampler
from clove_hub.training.sources.source import shuffled
from clove_hub.weights import Preprocessing, load

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "convnext_atto"])
@pytest.mark.parametrize("task", ["instances", "segmentation"])
def test_every_tensor_of_the_backbone_is_placed_bit_for_bit(architecture, task):
    from clove_hub.training.finetune import networks

    source = load(f"random:{architecture}", seed=3)
    network = networks.build(source, read_settings(task, []), classes=4, keypoints=0)
    assert networks.misplaced(network, source) == []
    trained = dict(networks.body_of(network).named_parameters())
    if architecture != "convnext_atto":  # of which the classifier's norm has no part in the maps
        assert all(parameter.requires_grad for parameter in trained.values())
    name = next(iter(trained))
    with torch.no_grad():
        trained[name].add_(1)
    assert networks.misplaced(network, source) == [name]


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "convnext_atto"])
def test_the_feature_maps_are_those_of_timm(architecture):
    from clove_hub.training.finetune import networks

    source = load(f"random:{architecture}", seed=3)
    model = timm.create_model(architecture, num_classes=0).eval()
    model.load_state_dict(source.tensors)
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = list(networks.make_body(source).eval()(image).values())
        theirs = model.forward_intermediates(image, indices=4, intermediates_only=True)
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_images_are_normalized_as_the_backbone_was_trained(tmp_path):
    from clove_hub.training.finetune import networks

    source = load("random:resnet18")
    source = dataclasses.replace(source, preprocessing=Preprocessing(224, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    detector = networks.build(source, read_settings("detection", []), 2, 0)
    image = torch.tensor([0.6, 0.8, 1.0]).view(3, 1, 1).expand(3, 96, 96)
    assert torch.allclose(detector.transform.normalize(image), torch.ones(3, 96, 96))
    segmenter = networks.build(source, read_settings("segmentation", []), 2, 0).eval()
    seen = []
    networks.body_of(segmenter).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        segmenter([image])
    assert torch.allclose(seen[0], torch.ones(1, 3, 96, 96))


def test_the_papers_heads_are_built():
    """4 convolutions and 1 linear layer with batch norm, in pyramid and mask head too; FCN: two 3x3 of dilation 6."""
    from clove_hub.training.finetune import networks

    source = load("random:resnet18")
    detector = networks.build(source, read_settings("instances", [], "instances_papers_1x"), 80, 0)
    count = {type(m).__name__: 0 for m in detector.roi_heads.box_head.modules()}
    for module in detector.roi_heads.box_head.modules():
        count[type(module).__name__] += 1
    assert (count["Conv2d"], count["BatchNorm2d"], count["Linear"]) == (4, 4, 1)
    for part in (detector.backbone.fpn, detector.roi_heads.mask_head):
        assert any(isinstance(module, torch.nn.BatchNorm2d) for module in part.modules())
    assert detector.roi_heads.box_predictor.cls_score.out_features == 81
    segmenter = networks.build(source, read_settings("segmentation", []), 21, 0).eval()
    convs = [module for module in segmenter.head if isinstance(module, torch.nn.Conv2d)]
    assert [(c.out_channels, c.dilation[0]) for c in convs] == [(256, 6), (256, 6), (21, 1)]
    maps = list(networks.body_of(segmenter)(torch.zeros(1, 3, 64, 64)).values())
    assert maps[-1].shape[-1] == 4  # stride 16


@pytest.mark.parametrize(
    ("task", "builder"),
    [
        ("detection", "fasterrcnn_resnet50_fpn"),
        ("instances", "maskrcnn_resnet50_fpn"),
        ("keypoints", "keypointrcnn_resnet50_fpn"),
    ],
)
def test_by_default_the_network_is_torchvisions_own(task, builder):
    """Tensor for tensor, and what it computes from the same weights, in training too."""
    from torchvision.models import detection

    from clove_hub.training.finetune import networks

    source = load("random:resnet50")
    ours = networks.build(
        source, read_settings(task, ["images.shortest_edge=[64]"]), 4, 17 if task == "keypoints" else 0
    )
    theirs = getattr(detection, builder)(weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=1333)
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 80, 96, generator=generator)
    target = {"boxes": torch.tensor([[4.0, 6.0, 60.0, 70.0]]), "labels": torch.tensor([2])}
    target |= {"masks": torch.ones(1, 80, 96, dtype=torch.uint8), "keypoints": torch.full((1, 17, 3), 30.0)}
    losses = []
    for network in (ours, theirs):
        torch.manual_seed(0)
        losses.append(network.train()([image], [target]))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=1e-4, atol=1e-5)  # ours has the channels last


@pytest.mark.parametrize("architecture", ["resnet18", "resnet26"])
def test_lower_layers_and_batch_norm_can_stay_as_they_are(architecture):
    from clove_hub.training.finetune import networks

    changes = ["network.trainable_layers=3", "network.frozen_norm=true", "images.shortest_edge=[64]"]
    network = networks.build(load(f"random:{architecture}"), read_settings("detection", changes), 4, 0).train()
    trained = {name for name, p in networks.body_of(network).named_parameters() if p.requires_grad}
    assert {name.removeprefix("model.").partition(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}
    assert not any("bn" in name or "downsample.1" in name for name in trained)
    before = {name: value.clone() for name, value in networks.body_of(network).named_buffers()}
    target = {"boxes": torch.tensor([[4.0, 6.0, 60.0, 70.0]]), "labels": torch.tensor([2])}
    network([torch.rand(3, 64, 64)], [target])
    for name, value in networks.body_of(network).named_buffers():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("task", ["detection", "keypoints"])
def test_boxes_are_exact_in_mixed_precision(task):
    """torchvision's own model rounds them to bfloat16, in which a small object far from the corner is empty."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    from clove_hub.training.finetune import networks

    keypoints = 17 if task == "keypoints" else 0
    changes = ["images.shortest_edge=[320]", "network.rois=16"]
    ours = networks.build(load("random:resnet18"), read_settings(task, changes), 4, keypoints).train()
    image = torch.rand(3, 320, 320, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[290.3, 280.0, 290.9, 290.0], [10.0, 20.0, 200.0, 300.0]])
    target = {"boxes": boxes, "labels": torch.tensor([2, 1]), "keypoints": torch.full((2, 17, 3), 285.0)}
    kinds = set()
    ours.roi_heads.box_roi_pool.register_forward_pre_hook(lambda _, given: kinds.add(given[1][0].dtype))
    found = {}
    for precise in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            found[precise] = ours([image], [target])
    assert kinds == {torch.float32}
    for name, value in found[False].items():
        assert torch.isfinite(value), name
    for name in ("loss_objectness", "loss_rpn_box_reg"):  # the others' proposals are drawn anew
        torch.testing.assert_close(found[False][name], found[True][name], rtol=0.05, atol=0)
    if task == "detection":
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=320, box_batch_size_per_image=16)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.isfinite(
                theirs.train()([image], [target])["loss_box_reg"]
            )  # else this is no longer needed


def test_layers_of_what_is_no_resnet_cannot_be_kept():
    from clove_hub.training.finetune import networks

    settings = read_settings("detection", ["network.trainable_layers=4"])
    with pytest.raises(ValueError, match="is for ResNets, and convnext_atto has no conv1: choose 5"):
        networks.build(load("random:convnext_atto"), settings, 2, 0)


# ---- schedule, order, lists ------------------------------------------------------------------------------------------


def test_the_protocols_schedule_is_detectron2s_1x():
    plan = schedule.plan(read_settings("instances", []), images=117_266)
    assert (plan.steps, plan.decays, plan.warmup, plan.peak) == (90_000, (60_000, 80_000), 1000, 0.02)
    assert plan.scaled is None
    assert schedule.learning_rate(0, plan) == pytest.approx(0.00002)
    assert schedule.learning_rate(500, plan) == pytest.approx(0.02 * 0.5005)
    assert schedule.learning_rate(1000, plan) == 0.02
    assert schedule.learning_rate(59_999, plan) == 0.02
    assert schedule.learning_rate(60_000, plan) == pytest.approx(0.002)
    assert schedule.learning_rate(89_999, plan) == pytest.approx(0.0002)
    voc = schedule.plan(read_settings("segmentation", []), images=10_582)
    assert (voc.steps, voc.decays, voc.warmup, voc.peak) == (30_000, (21_000, 27_000), 0, 0.003)


@pytest.mark.parametrize(("steps", "warmup"), [(20, 10), (150, 75), (400, 100), (5000, 500), (20_000, 1000)])
def test_a_short_run_is_warmed_up_too(steps, warmup):
    plan = schedule.plan(read_settings("detection", [f"schedule.steps={steps}"]), images=200)
    assert (plan.warmup, plan.peak) == (warmup, 0.02)
    assert schedule.plan(read_settings("segmentation", [f"schedule.steps={steps}"]), images=200).warmup == 0


def test_another_batch_scales_the_schedule_and_says_so():
    settings = read_settings("detection", ["batch.total=4"])
    plan = schedule.plan(settings, images=1000)
    assert (plan.steps, plan.decays, plan.warmup, plan.peak) == (360_000, (240_000, 320_000), 4000, 0.005)
    for said in ("0.02 -> 0.005", "90000 -> 360000 steps", "1000 -> 4000"):
        assert said in plan.scaled
    epochs = read_settings("detection", ["batch.total=4", "schedule.epochs=2"])
    assert schedule.plan(epochs, images=1000).steps == 500


def test_low_data_lists_are_fixed_and_lie_within_each_other():
    names = list(range(1000, 1200))
    lists = {share: files.chosen(names, share, seed=0) for share in (0.01, 0.02, 0.05, 0.1)}
    assert [len(found) for found in lists.values()] == [2, 4, 10, 20]
    assert set(lists[0.01]) < set(lists[0.02]) < set(lists[0.05]) < set(lists[0.1])
    assert lists[0.02] == FIXED
    assert files.chosen(names[::-1], 0.02, seed=0) == FIXED
    assert files.chosen(names, 0.02, seed=1) != FIXED


FIXED = [1065, 1069, 1092, 1131]


def deal(
    kinds: list[int], batch: int, start: int, stop: int, rank: int = 0, world: int = 1
) -> list[list[tuple[int, int]]]:
    order = dataset.OrderByKind(kinds, batch, seed=5)
    return list(StepSampler(order, batch, batch // world, rank, world, start, stop))


def test_every_epoch_has_every_image_once_whatever_the_processes():
    def steps(world: int) -> list[list[tuple[int, int]]]:
        parts = [deal([0] * 10, 4, 0, 10, rank, world) for rank in range(world)]
        return [[item for part in parts for item in part[step]] for step in range(10)]

    assert steps(1) == steps(2) == steps(4)
    flat = [item for step in steps(1) for item in step]
    for epoch in range(4):
        assert sorted(index for e, index in flat if e == epoch) == list(range(10))
    assert deal([0] * 10, 4, 7, 10) == steps(1)[7:]
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]
    assert [i for e, i in flat if e == 0] == shuffled(5, 0, 10).tolist()


def test_upright_images_are_not_padded_beside_wide_ones():
    sizes = [(640, 480) if number % 3 == 0 else (480, 640) for number in range(100)]
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    kinds = dataset.DetectionDataset([coco.Photo(n, Path("no"), *size, *nothing) for n, size in enumerate(sizes)]).kinds
    assert kinds == [int(height > width) for height, width in sizes]
    steps = deal(kinds, 8, 0, 60)
    assert all(len({kinds[index] for _, index in step}) == 1 for step in steps)
    dealt = [item for step in steps for item in step]
    assert len(set(dealt)) == len(dealt)
    for epoch in range(4):  # what an epoch leaves over waits for the next, and is not lost
        assert {index for e, index in dealt if e == epoch} == set(range(len(kinds)))
    assert deal(kinds, 8, 23, 60) == steps[23:]


# ---- scores ----------------------------------------------------------------------------------------------------------


def as_found(photo: coco.Photo, task: str) -> dict[str, torch.Tensor]:
    """What is there, as if a detector had found it."""
    found = dataset.target_of(photo)
    found["scores"] = torch.linspace(1, 0.5, len(found["labels"]))
    if "masks" in found:
        found["masks"] = found["masks"][:, None].float()
    return found


@pytest.mark.parametrize("task", ["detection", "instances", "keypoints"])
def test_who_finds_what_is_there_has_an_ap_of_100(task, coco_photos):
    split = coco.read_split(coco_photos, "val", task)
    truth = split.truth
    for kind in scores.KINDS[task]:
        found = []
        for photo in split.photos:
            there = as_found(photo, task)
            # Who has no labeled keypoint is not there to be found by his keypoints.
            whole = there["keypoints"][..., 2].any(1) if kind == "keypoints" else torch.ones(len(there["labels"])) > 0
            there = {key: value[whole] for key, value in there.items()}
            found += scores.as_results(photo.id, there, split.categories)
        metrics = scores.average_precision(truth, found, [kind])
        assert metrics[f"AP{scores.SUFFIX[kind]}"] == pytest.approx(100, abs=1e-6)


def test_average_precision_is_pycocotools_own(coco_photos, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    split = coco.read_split(coco_photos, "val", "instances")
    rng = np.random.default_rng(0)
    found = []
    for photo in split.photos:
        sample = as_found(photo, "instances")
        shift = torch.from_numpy(rng.normal(0, 3, sample["boxes"].shape)).float()
        sample["boxes"] = sample["boxes"] + shift.sort(-1).values
        sample["masks"] = sample["masks"].roll(2, -1)
        sample["scores"] = torch.from_numpy(rng.random(len(shift))).float()
        wrong = torch.from_numpy(rng.random(len(shift)) < 0.2)
        sample["labels"] = torch.where(wrong, 1, sample["labels"])
        found += scores.as_results(photo.id, sample, split.categories)
    ours = scores.average_precision(split.truth, found, ("bbox", "segm"))
    for kind, suffix in (("bbox", "bb"), ("segm", "mk")):
        rows = [{k: v for k, v in row.items() if kind == "bbox" or k != "bbox"} for row in found]
        (tmp_path / "found.json").write_text(json.dumps(rows))
        truth = COCO(str(split.path))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        names = [f"{name}{suffix}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        for name, theirs in zip(names, evaluation.stats, strict=False):
            if theirs >= 0:
                assert ours[name] == pytest.approx(100 * theirs, abs=1e-9)
        assert 0 < ours[names[0]] < 100
        each = [value for name, value in ours.items() if name.startswith(f"AP{suffix}/")]
        assert len(each) == len({a["category_id"] for a in truth.dataset["annotations"]})
        assert np.mean(each) == pytest.approx(ours[names[0]], abs=1e-9)


def test_only_the_images_that_were_looked_at_are_scored(coco_photos):
    split = coco.read_split(coco_photos, "val", "detection")
    truth, photo = split.truth, split.photos[0]
    found = scores.as_results(photo.id, as_found(photo, "detection"), split.categories)
    assert scores.average_precision(truth, found, ["bbox"])["APbb"] < 90
    assert scores.average_precision(truth, found, ["bbox"], [photo.id])["APbb"] == pytest.approx(100)


def test_nothing_found_is_an_ap_of_0_and_said(coco_photos, caplog):
    truth = coco.read_split(coco_photos, "val", "instances").truth
    metrics = scores.average_precision(truth, [], ("bbox", "segm"))
    assert not any(metrics.values())
    names = {category["id"]: category["name"] for category in truth["categories"]}
    there = {names[annotation["category_id"]] for annotation in truth["annotations"]}
    assert {name.partition("/")[2] for name in metrics if "/" in name} == there
    assert metrics["APmk"] == 0
    assert caplog.text.count("nothing was found in any image") == 1
