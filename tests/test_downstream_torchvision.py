"""Fine-tuning with torchvision: what goes in is checked, what is trained is what was asked for, scores are right."""

import copy
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from clove_hub.export.downstream import backbone as backbones
from clove_hub.export.downstream import checkpoint, coco, loop, order, results, samples, schedule, scores, semantic
from clove_hub.export.downstream import settings as downstream_settings
from conftest import SHARED
from PIL import Image
from safetensors.torch import load_file
from synthetic import write_run

from clove_hub.cli import main
from clove_hub.evaluation.result import Data, Record, read, write

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")

SMALL = {
    "batch.total": 2,
    "data.workers": 0,
    "run.precision": "fp32",
    "run.log_every": 1,
    "run.pictures": 1,
    "run.precise_bn": 1,
    "schedule.steps": 2,
}
DETECTOR = SMALL | {
    "images.shortest_edge": "[64]",
    "images.longest_edge": 96,
    "network.head": "mlp",
    "network.rois": 16,
    "network.proposals": 40,
    "network.detections": 2,
}
SEGMENTER = SMALL | {"images.crop": 64, "network.channels": 16}


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of one run is not that of the next


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eight training and four validation photos of COCO, with boxes, masks and people's keypoints."""
    data = SHARED / "data" / "detection"
    if not data.is_dir():
        pytest.skip(f"the photos are not at hand ({data})")
    folder = tmp_path_factory.mktemp("detection")
    (folder / "annotations").mkdir()
    for split, count in (("train", 8), ("val", 4)):
        (folder / split).symlink_to(data / split)
        for stem in ("instances", "person_keypoints"):
            document = json.loads((data / "annotations" / f"{stem}_{split}.json").read_text())
            kept = {image["id"] for image in document["images"][:count]}
            document["images"] = [row for row in document["images"] if row["id"] in kept]
            document["annotations"] = [row for row in document["annotations"] if row["image_id"] in kept]
            (folder / "annotations" / f"{stem}_{split}.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def streets(tmp_path_factory) -> Path:
    """Made scenes in the plain layout: 6 to train on, 2 to score."""
    folder = tmp_path_factory.mktemp("streets")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    names = [f"s{number}" for number in range(8)]
    rng = np.random.default_rng(0)
    for name in names:
        label = np.zeros((60, 80), np.uint8)
        label[rng.integers(10, 40) :] = 1
        label[:5] = 255
        picture = np.stack([label * 100 + 50, 200 - label * 50, rng.integers(0, 255, label.shape)], -1)
        Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / f"{name}.jpg")
        Image.fromarray(label).save(folder / "labels" / f"{name}.png")
    (folder / "train.txt").write_text("\n".join(names[:6]))
    (folder / "val.txt").write_text("\n".join(names[6:]))
    classes = [{"id": 0, "name": "sky"}, {"id": 1, "name": "road"}]
    (folder / "classes.json").write_text(json.dumps({"classes": classes, "ignore_label": 255}))
    return folder


NAMES = ("nose", "left_eye", "right_eye", *(f"k{number}" for number in range(14)))


@pytest.fixture
def made(tmp_path) -> tuple[Path, dict]:
    """Two made images a split with two things each, and the document that both splits' annotations are."""
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in (1, 2):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.jpg")
    (tmp_path / "annotations").mkdir()
    document = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 48, "width": 64} for n in (1, 2)],
        "categories": [{"id": 7, "name": "cat", "keypoints": list(NAMES), "skeleton": [[1, 2]]}],
        "annotations": [
            {
                "id": 10 * image + number,
                "image_id": image,
                "category_id": 7,
                "bbox": [8 * number, 6, 20, 16],
                "area": 320,
                "iscrowd": 0,
                "segmentation": [[8 * number, 6, 8 * number + 20, 6, 8 * number + 20, 22, 8 * number, 22]],
                "keypoints": [value for k in range(17) for value in (8 * number + 1 + k, 7 + k % 12, 2)],
                "num_keypoints": 17,
            }
            for image in (1, 2)
            for number in (1, 4)
        ],
    }
    return tmp_path, document


def put(folder: Path, document: dict, *splits: str) -> None:
    for split in splits or ("train", "val"):
        for stem in ("instances", "person_keypoints"):
            (folder / "annotations" / f"{stem}_{split}.json").write_text(json.dumps(document))


def downstream(
    task: str, data: Path, out: Path, base: dict, backbone: str = "random:resnet18", **changes: object
) -> int:
    overrides = base | {key.replace("__", "."): value for key, value in changes.items()}
    arguments = ["--backbone", backbone, "--data", str(data), "--out", str(out)]
    return main(["downstream", "torchvision", task, *arguments, *(f"{k}={v}" for k, v in overrides.items())])


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "metric"), [("instances", "APmk"), ("keypoints", "APkp"), ("segmentation", "mIoU")])
def test_every_task_is_trained_scored_and_drawn(task, metric, photos, streets, tmp_path):
    data, base = (streets, SEGMENTER) if task == "segmentation" else (photos, DETECTOR)
    assert downstream(task, data, tmp_path, base) == 0
    record = read(tmp_path / "results.json")
    assert record.protocol == f"torchvision-{task}"
    assert 0 <= record.metrics[metric] <= 100
    assert record.data.samples == (2 if task == "segmentation" else 4)
    assert record.settings["batch"]["total"] == 2
    assert record.versions["torchvision"]
    assert "backbone" not in record.settings  # random weights are others for each seed
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 1
    assert "layer4.1.conv2.weight" in "".join(load_file(tmp_path / "model.safetensors"))
    assert downstream(task, data, tmp_path, base) == 0  # again: there is nothing to do
    assert read(tmp_path / "results.json").date == record.date


def test_a_detector_learns_a_quarter_of_the_photos(photos, tmp_path):
    changes = {"schedule__steps": 12, "optimizer__learning_rate": 0.04, "data__fraction": 0.25, "run__precise_bn": 0}
    assert downstream("detection", photos, tmp_path, DETECTOR, **changes) == 0
    assert "APbb" in read(tmp_path / "results.json").metrics
    assert len(json.loads((tmp_path / "train_images.json").read_text())["images"]) == 2
    losses = [row["loss"] for row in rows(tmp_path)]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(photos, tmp_path, monkeypatch):
    task, data, base = "detection", photos, DETECTOR | {"schedule.steps": 3, "run.pictures": 0}
    assert downstream(task, data, tmp_path / "straight", base) == 0

    advance = loop.Reporter.advance

    def interrupted(self, done, *arguments):
        advance(self, done, *arguments)
        if done == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Reporter, "advance", interrupted)
    assert downstream(task, data, tmp_path / "stopped", base) == 75
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert downstream(task, data, tmp_path / "stopped", base) == 0

    straight, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    timed = ("images_per_second",)
    pair = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(tmp_path / n)]
        for n in ("straight", "stopped")
    )
    assert next(pair) == next(pair)
    assert read(tmp_path / "straight/results.json").metrics == read(tmp_path / "stopped/results.json").metrics


def test_the_number_of_workers_changes_nothing(streets, tmp_path):
    for workers in (0, 2):
        assert downstream("segmentation", streets, tmp_path / str(workers), SEGMENTER, data__workers=workers) == 0
    none, two = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "2"))
    assert all(torch.equal(none[name], two[name]) for name in none)


def test_training_is_bfloat16_and_evaluation_float32(photos, tmp_path, monkeypatch):
    from clove_hub.export.downstream import networks, suite

    seen = {"training": set(), "evaluation": set()}

    def watched(function, phase, place):
        def run(*arguments):
            body = networks.body_of(arguments[place])
            hook = body.layer1.register_forward_hook(lambda _, __, out: seen[phase].add(out.dtype))
            found = function(*arguments)
            hook.remove()
            return found

        return run

    monkeypatch.setattr(suite, "train", watched(suite.train, "training", 1))
    monkeypatch.setattr(suite, "evaluate", watched(suite.evaluate, "evaluation", 0))
    assert downstream("instances", photos, tmp_path, DETECTOR, run__precision="bf16", run__pictures=0) == 0
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))
    assert seen == {"training": {torch.bfloat16}, "evaluation": {torch.float32}}


def test_a_folder_of_another_run_is_not_gone_on_with(streets, tmp_path, capsys):
    assert downstream("segmentation", streets, tmp_path, SEGMENTER) == 0
    assert downstream("segmentation", streets, tmp_path, SEGMENTER, optimizer__learning_rate=0.5) == 2
    assert "optimizer.learning_rate: 0.003 -> 0.5" in capsys.readouterr().err
    assert downstream("segmentation", streets, tmp_path, SEGMENTER, backbone="random:resnet34") == 2
    assert "another backbone" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(streets, tmp_path, capsys):
    many = {"run__save_every": 1, "schedule__steps": 3}
    assert downstream("segmentation", streets, tmp_path, SEGMENTER, **many) == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000003"]
    (tmp_path / "checkpoints/step_00000003/model.safetensors").write_bytes(b"cut short")
    (tmp_path / "results.json").unlink()
    assert checkpoint.newest(tmp_path)[1]["step"] == 2
    assert "passing over the damaged checkpoint" in capsys.readouterr().err


def test_the_benchmark_compares_on_the_same_terms(photos, tmp_path):
    from benchmarks import downstream as benchmark

    write_run(tmp_path / "run", "resnet18")
    sizes = {"images.shortest_edge": "[64]", "images.longest_edge": 96, "network.rois": 16, "network.proposals": 40}
    changes = sizes | {"schedule.steps": 1, "schedule.warmup_steps": 0, "run.precise_bn": 0, "run.pictures": 0}
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    what = ["--data", str(photos), "--backbone", str(tmp_path / "run"), "--categories", "person"]
    how = ["--device", "cpu", "--rounds", "1", *(f"{key}={value}" for key, value in changes.items())]
    benchmark.main([*what, *places, *how])
    found = json.loads((tmp_path / "downstream_cpu.json").read_text())
    assert [side["model"] for side in found["sides"].values()] == [str(tmp_path / "run"), "random:resnet18"]
    assert found["gains"]["against0"]["metric"] == "APbb"
    assert all(len(values) == 1 for values in found["losses"].values())
    kept = json.loads((tmp_path / "runs/data/annotations/instances_train.json").read_text())
    assert [category["name"] for category in kept["categories"]] == ["person"]
    assert {row["category_id"] for row in kept["annotations"]} == {kept["categories"][0]["id"]}


# ---- the backbone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "convnext_atto"])
@pytest.mark.parametrize("task", ["instances", "segmentation"])
def test_every_tensor_of_the_backbone_is_placed_bit_for_bit(architecture, task):
    from clove_hub.export.downstream import networks

    source = backbones.find_backbone(f"random:{architecture}", seed=3)
    network = networks.build(source, downstream_settings.protocol(task), classes=4, keypoints=0)
    assert networks.misplaced(network, source) == []
    trained = dict(networks.body_of(network).named_parameters())
    if architecture != "convnext_atto":  # of which the classifier's norm has no part in the maps
        assert all(parameter.requires_grad for parameter in trained.values())
    name = next(iter(trained))
    with torch.no_grad():
        trained[name].view(-1)[0] += 1
    assert networks.misplaced(network, source) == [name]


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "convnext_atto"])
def test_the_feature_maps_are_those_of_timm(architecture):
    from clove_hub.export.downstream import networks

    source = backbones.find_backbone(f"random:{architecture}", seed=3)
    model = timm.create_model(architecture, num_classes=0).eval()
    model.load_state_dict(source.tensors)
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = list(networks.make_body(source).eval()(image).values())
        theirs = model.forward_intermediates(image, indices=4, intermediates_only=True)
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_images_are_normalised_as_the_backbone_was_trained(tmp_path):
    from clove_hub.export.downstream import networks

    source = backbones.find_backbone("random:resnet18", seed=0)
    source = type(source)(source.what, source.architecture, source.tensors, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    detector = networks.build(source, downstream_settings.protocol("detection"), 2, 0)
    image = torch.tensor([0.6, 0.8, 1.0]).view(3, 1, 1).expand(3, 96, 96)
    assert torch.allclose(detector.transform.normalize(image), torch.ones(3, 96, 96))
    segmenter = networks.build(source, downstream_settings.protocol("segmentation"), 2, 0).eval()
    seen = []
    networks.body_of(segmenter).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        segmenter([image])
    assert torch.allclose(seen[0], torch.ones(1, 3, 96, 96))


def test_the_papers_heads_are_built():
    """4 convolutions and 1 linear layer with batch norm, in pyramid and mask head too; FCN: two 3x3 of dilation 6."""
    from clove_hub.export.downstream import networks

    source = backbones.find_backbone("random:resnet50", seed=0)
    detector = networks.build(source, downstream_settings.protocol("instances"), 80, 0)
    count = {type(m).__name__: 0 for m in detector.roi_heads.box_head.modules()}
    for module in detector.roi_heads.box_head.modules():
        count[type(module).__name__] += 1
    assert (count["Conv2d"], count["BatchNorm2d"], count["Linear"]) == (4, 4, 1)
    for part in (detector.backbone.fpn, detector.roi_heads.mask_head):
        assert any(isinstance(module, torch.nn.BatchNorm2d) for module in part.modules())
    assert detector.roi_heads.box_predictor.cls_score.out_features == 81
    segmenter = networks.build(source, downstream_settings.protocol("segmentation"), 21, 0).eval()
    convs = [module for module in segmenter.head if isinstance(module, torch.nn.Conv2d)]
    assert [(c.out_channels, c.dilation[0]) for c in convs] == [(256, 6), (256, 6), (21, 1)]
    maps = list(networks.body_of(segmenter)(torch.zeros(1, 3, 64, 64)).values())
    assert maps[-1].shape[-1] == 4  # stride 16


def test_a_backbone_that_gives_no_pyramid_or_is_absent_is_refused(photos, tmp_path, capsys):
    assert downstream("detection", photos, tmp_path / "x", DETECTOR, backbone="random:efficientvit_m0") == 2
    assert "gives no four feature maps" in capsys.readouterr().err
    assert downstream("detection", photos, tmp_path / "x", DETECTOR, backbone=str(tmp_path / "none")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_pretrained_run_is_fine_tuned(streets, tmp_path):
    write_run(tmp_path / "run", "resnet18")
    assert downstream("segmentation", streets, tmp_path / "out", SEGMENTER, backbone=str(tmp_path / "run")) == 0
    source = backbones.find_backbone(str(tmp_path / "run"), 0)
    assert read(tmp_path / "out/results.json").settings["backbone"] == backbones.fingerprint(source)


# ---- schedule, order, lists ------------------------------------------------------------------------------------------


def test_the_protocols_schedule_is_detectron2s_1x():
    plan = schedule.plan(downstream_settings.protocol("instances"), images=117_266)
    assert (plan.steps, plan.decays, plan.warmup, plan.peak) == (90_000, (60_000, 80_000), 1000, 0.02)
    assert plan.scaled is None
    assert schedule.learning_rate(0, plan) == pytest.approx(0.00002)
    assert schedule.learning_rate(500, plan) == pytest.approx(0.02 * 0.5005)
    assert schedule.learning_rate(1000, plan) == 0.02
    assert schedule.learning_rate(59_999, plan) == 0.02
    assert schedule.learning_rate(60_000, plan) == pytest.approx(0.002)
    assert schedule.learning_rate(89_999, plan) == pytest.approx(0.0002)
    voc = schedule.plan(downstream_settings.protocol("segmentation"), images=10_582)
    assert (voc.steps, voc.decays, voc.warmup, voc.peak) == (30_000, (21_000, 27_000), 0, 0.003)


def test_another_batch_scales_the_schedule_and_says_so():
    settings = downstream_settings.read_settings("detection", ["batch.total=4"])
    plan = schedule.plan(settings, images=1000)
    assert (plan.steps, plan.decays, plan.warmup, plan.peak) == (360_000, (240_000, 320_000), 4000, 0.005)
    for said in ("0.02 -> 0.005", "90000 -> 360000 steps", "1000 -> 4000"):
        assert said in plan.scaled
    epochs = downstream_settings.read_settings("detection", ["batch.total=4", "schedule.epochs=2"])
    assert schedule.plan(epochs, images=1000).steps == 500


def test_low_data_lists_are_fixed_and_lie_within_each_other():
    names = list(range(1000, 1200))
    lists = {share: order.chosen(names, share, seed=0) for share in (0.01, 0.02, 0.05, 0.1)}
    assert [len(found) for found in lists.values()] == [2, 4, 10, 20]
    assert set(lists[0.01]) < set(lists[0.02]) < set(lists[0.05]) < set(lists[0.1])
    assert lists[0.02] == FIXED
    assert order.chosen(names[::-1], 0.02, seed=0) == FIXED
    assert order.chosen(names, 0.02, seed=1) != FIXED


FIXED = [1065, 1069, 1092, 1131]


def test_every_epoch_has_every_image_once_whatever_the_processes():
    def steps(world: int) -> list[list[tuple[int, int]]]:
        parts = [list(order.StepSampler(10, 4, 5, 0, 10, rank, world)) for rank in range(world)]
        return [[item for part in parts for item in part[step]] for step in range(10)]

    assert steps(1) == steps(2) == steps(4)
    flat = [item for step in steps(1) for item in step]
    for epoch in range(4):
        assert sorted(index for e, index in flat if e == epoch) == list(range(10))
    assert list(order.StepSampler(10, 4, 5, 7, 10)) == steps(1)[7:]
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_a_mirror_moves_boxes_masks_and_keypoints_with_the_image(made):
    folder, document = made
    put(folder, document)
    split = coco.read_split(folder, "train", "keypoints")
    partners = samples.mirror_partners(split.categories[0].keypoints)
    assert partners[:4] == (0, 2, 1, 3)
    target = samples.target_of(split.photos[0])
    target["masks"] = samples.target_of(coco.read_split(folder, "train", "instances").photos[0])["masks"]
    flipped = samples.mirrored(target, 64, partners)
    assert flipped["boxes"][0].tolist() == [64 - 28, 6, 64 - 8, 22]
    columns = flipped["masks"][0].nonzero()[:, 1]
    assert (columns.min().item(), columns.max().item() + 1) == (64 - 28, 64 - 8)
    # The left eye's pixel, number 8 + 1 + 1 from the left, is afterwards the right eye's, as many from the right.
    assert flipped["keypoints"][0, 2].tolist() == [64 - 10.5, 8.5, 2]
    again = samples.mirrored(flipped, 64, partners)
    assert all(torch.equal(again[key], target[key]) for key in target)


def test_half_of_the_images_are_mirrored_and_none_in_evaluation(made):
    folder, document = made
    put(folder, document)
    split = coco.read_split(folder, "train", "detection")
    plain = samples.Detections(split.photos)[0, 0]
    train = samples.Detections(split.photos, seed=0)
    flipped = [torch.equal(train[epoch, 0].image, plain.image.flip(-1)) for epoch in range(60)]
    assert 18 < sum(flipped) < 42
    assert torch.equal(samples.Detections(split.photos)[5, 0].image, plain.image)


def test_a_crop_keeps_image_and_classes_together():
    settings = downstream_settings.SegmentationImages(crop=40, scale=(0.5, 2.0))
    label = torch.zeros(60, 80, dtype=torch.uint8)
    label[:, 40:] = 1
    image = (label * 200).expand(3, 60, 80)
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels, classes = samples.random_crop(image, label, settings, rng.random(4))
        assert pixels.shape == (3, 40, 40)
        assert classes.shape == (40, 40)
        counts = classes != 255
        assert ((pixels[0] > 100) == (classes == 1))[counts].float().mean() > 0.97


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_learned_is_dropped_and_counted(made, caplog):
    folder, document = made
    first, second, third, fourth = document["annotations"]
    first["bbox"] = [3, 3, 0, 5]
    second["segmentation"] = [[1, 2, 3, 4]]
    third["segmentation"].append([1, 2, 3, 4, 5, 6, 7])
    fourth["iscrowd"] = 1
    put(folder, document)
    split = coco.read_split(folder, "train", "instances")
    assert [len(photo.boxes) for photo in split.photos] == [0, 1]
    assert len(coco.trainable(split, "instances")) == 1
    for said in (
        "1 annotations have a box without size inside the image and are left out (ids 11)",
        "1 annotations have no polygon with three corners or more and are left out (ids 14)",
        "1 annotations lose a polygon with fewer than three corners or half a corner (ids 21)",
        "1 of 2 images have no usable instance",
    ):
        assert said in caplog.text


def test_boxes_are_clipped_and_categories_numbered_from_one(made):
    folder, document = made
    document["categories"].insert(0, {"id": 90, "name": "dog"})
    document["annotations"][0] |= {"bbox": [-5, 40, 20, 20], "category_id": 90}
    put(folder, document)
    split = coco.read_split(folder, "train", "detection")
    assert [category.id for category in split.categories] == [7, 90]
    assert split.photos[0].boxes[0].tolist() == [0, 40, 15, 48]
    assert split.photos[0].labels.tolist() == [2, 1]


def broken(document: dict, key: str) -> None:
    annotation = document["annotations"][0]
    changes = {
        "bbox of three": lambda: annotation.update(bbox=[1, 2, 3]),
        "bbox of words": lambda: annotation.update(bbox=[1, 2, 3, "4"]),
        "no bbox": lambda: annotation.pop("bbox"),
        "unknown image": lambda: annotation.update(image_id=99),
        "unknown category": lambda: annotation.update(category_id=99),
        "no id": lambda: annotation.pop("id"),
        "no segmentation": lambda: annotation.pop("segmentation"),
        "polygon of words": lambda: annotation.update(segmentation=[["a", 2, 3, 4, 5, 6]]),
        "rle of another size": lambda: annotation.update(segmentation={"size": [4, 4], "counts": [16]}),
        "two of an id": lambda: document["images"].append(document["images"][0]),
        "no height": lambda: document["images"][0].pop("height"),
        "no categories": lambda: document.update(categories=[]),
        "no annotations": lambda: document.update(annotations=[]),
        "no list": lambda: document.pop("annotations"),
        "image absent": lambda: document["images"][0].update(file_name="gone.jpg"),
        "no keypoints": lambda: annotation.pop("keypoints"),
        "too few keypoints": lambda: annotation.update(keypoints=[1, 2, 2]),
        "no names of keypoints": lambda: document["categories"][0].pop("keypoints"),
        "other keypoints": lambda: document["categories"][0].update(keypoints=["a", "b"]),
    }
    changes[key]()


@pytest.mark.parametrize(
    ("key", "task", "message"),
    [
        ("bbox of three", "detection", r"annotation 11 has the bbox \[1, 2, 3\]"),
        ("bbox of words", "detection", "annotation 11 has the bbox"),
        ("no bbox", "detection", "annotation 11 has the bbox None"),
        ("unknown image", "detection", "annotation 11 belongs to image 99"),
        ("unknown category", "detection", "annotation 11 is of category 99"),
        ("no id", "detection", "an annotation of image 1 has no whole id"),
        ("no segmentation", "instances", "annotation 11 has the segmentation 'None'"),
        ("polygon of words", "instances", "annotation 11 has the segmentation"),
        ("rle of another size", "instances", r"annotation 11 has a mask in RLE of size \[4, 4\]"),
        ("two of an id", "detection", "two images have the id 1"),
        ("no height", "detection", "image 1 .* has height None"),
        ("no categories", "detection", "it has no categories"),
        ("no annotations", "detection", "has no annotations"),
        ("no list", "detection", "has no list of annotations"),
        ("image absent", "detection", "lacks 1 of the 2 images .*gone.jpg"),
        ("no keypoints", "keypoints", "annotation 11 has no keypoints"),
        ("too few keypoints", "keypoints", "annotation 11 has keypoints that are not 3 x 17"),
        ("no names of keypoints", "keypoints", "keypoints need exactly one"),
        ("other keypoints", "keypoints", "cat has 2 keypoints"),
    ],
)
def test_contradictions_are_named_with_file_and_annotation(key, task, message, made):
    folder, document = made
    broken(document, key)
    put(folder, document)
    with pytest.raises(ValueError, match=message) as caught:
        coco.read_split(folder, "train", task)
    assert str(folder) in str(caught.value)


def test_a_folder_without_annotations_is_refused_before_anything_runs(tmp_path, capsys):
    assert downstream("detection", tmp_path, tmp_path / "out", DETECTOR) == 2
    error = capsys.readouterr().err
    assert "annotations/instances_train.json" in error
    assert "instances_train2017.json" in error
    assert downstream("segmentation", tmp_path, tmp_path / "out", SEGMENTER) == 2
    assert "ImageSets/Segmentation" in capsys.readouterr().err
    assert downstream("segmentation", tmp_path / "none", tmp_path / "out", SEGMENTER) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_splits_of_two_data_sets_are_refused(made, tmp_path, capsys):
    folder, document = made
    put(folder, document, "train")
    document["categories"][0]["name"] = "dog"
    put(folder, document, "val")
    assert downstream("detection", folder, tmp_path / "out", DETECTOR) == 2
    assert "different categories" in capsys.readouterr().err


def test_an_image_of_another_size_or_none_at_all_is_named(made, tmp_path, capsys):
    folder, document = made
    document["images"][0]["width"] = 65
    put(folder, document)
    assert downstream("detection", folder, tmp_path / "out", DETECTOR, data__workers=1) == 2
    error = capsys.readouterr().err
    assert "1.jpg has 64 x 48 pixels, its annotations are for 65 x 48" in error
    assert "Traceback" not in error
    (folder / "train" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.jpg cannot be read"):
        samples.read_image(folder / "train" / "1.jpg")


def test_vocs_layout_is_read_with_its_augmented_set(tmp_path):
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 6)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        label = Image.new("P", (8, 6), 20)
        label.putpalette([0] * 768)
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            label.save(tmp_path / folder / f"{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    for name, content in (("train", "a"), ("trainaug", "a\nb"), ("val", "c")):
        (lists / f"{name}.txt").write_text(content)
    train, val = (semantic.read_scenes(tmp_path, split) for split in ("train", "val"))
    assert [scene.name for scene in train.scenes] == ["a", "b"]
    assert train.scenes[0].label.parent.name == "SegmentationClassAug"
    assert val.scenes[0].label.parent.name == "SegmentationClass"
    assert len(train.classes) == 21
    assert semantic.read_label(train.scenes[0].label, 21).tolist() == [[20] * 8] * 6
    with pytest.raises(ValueError, match="has the class 20, but there are only 5"):
        semantic.read_label(train.scenes[0].label, 5)
    Image.new("RGB", (8, 6)).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match="has colours"):
        semantic.read_label(tmp_path / "colours.png", 21)
    (tmp_path / "JPEGImages" / "c.jpg").unlink()
    with pytest.raises(ValueError, match=r"val\.txt names 1 images, but 1 files are absent, such as .*c\.jpg"):
        semantic.read_scenes(tmp_path, "val")
    (lists / "val.txt").write_text("")
    with pytest.raises(ValueError, match="names no image"):
        semantic.read_scenes(tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "does not read"),
        ('{"classes": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}', r"class ids \[1, 2\]"),
        ('{"classes": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}], "ignore_label": 0}', "only 255"),
    ],
)
def test_a_wrong_list_of_classes_is_named(content, message, tmp_path):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        semantic.read_scenes(tmp_path, "train")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.totl=2", "did you mean 'total'"),
        ("bach.total=2", "did you mean 'batch'"),
        ("batch.total", "does not read section.key=value"),
        ("batch.total=two", "expected int"),
        ("batch.total=0", "must be at least 1"),
        ("data.fraction=10", "a share above 0 and at most 1"),
        ("images.shortest_edge=[10]", "at least 32"),
        ("images.longest_edge=100", "is below"),
        ("images.crop=100", "unknown key images.crop"),
        ("network.head=deep", "choose one of conv, mlp"),
        ("schedule.decay_at=[0.9,0.5]", "rising shares"),
        ("schedule.steps=[", "not valid YAML"),
    ],
)
def test_wrong_settings_are_named(override, message, tmp_path, capsys):
    assert (
        main(["downstream", "torchvision", "detection", "--backbone", "random:resnet18", "--data", ".", override]) == 2
    )
    assert message in capsys.readouterr().err


def test_settings_are_typed_and_written_out_whole():
    settings = downstream_settings.read_settings(
        "instances", ["optimizer.weight_decay=1e-5", "schedule.decay_at=[0.5]"]
    )
    assert settings.optimizer.weight_decay == 1e-5  # YAML reads 1e-5 as a string
    assert settings.schedule.decay_at == (0.5,)
    plain = downstream_settings.as_sections(settings)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["images"]["shortest_edge"] == [640, 672, 704, 736, 768, 800]
    other = copy.deepcopy(plain)
    other["run"]["log_every"] = 7
    assert downstream_settings.differences(plain, other) == []
    other["run"]["seed"] = 7
    assert downstream_settings.differences(plain, other) == ["run.seed: 0 -> 7"]


def test_a_missing_package_is_named_with_the_extra(monkeypatch, tmp_path, capsys):
    from clove_hub.export.downstream import torchvision_command

    monkeypatch.setattr(torchvision_command, "find_spec", lambda name: None)
    assert downstream("detection", tmp_path, tmp_path, DETECTOR) == 2
    assert "torchvision and pycocotools must be installed for this: pip install 'clove-hub[downstream]'" in (
        capsys.readouterr().err
    )


# ---- scores ----------------------------------------------------------------------------------------------------------


def as_found(photo: coco.Photo, task: str) -> dict[str, torch.Tensor]:
    """What is there, as if a detector had found it."""
    found = samples.target_of(photo)
    found["scores"] = torch.linspace(1, 0.5, len(found["labels"]))
    if "masks" in found:
        found["masks"] = found["masks"][:, None].float()
    return found


@pytest.mark.parametrize("task", ["detection", "instances", "keypoints"])
def test_who_finds_what_is_there_has_an_ap_of_100(task, photos):
    split = coco.read_split(photos, "val", task)
    truth = coco.ground_truth(split.path)
    for kind in scores.KINDS[task]:
        found = []
        for photo in split.photos:
            there = as_found(photo, task)
            # Who has no labelled keypoint is not there to be found by his keypoints.
            whole = there["keypoints"][..., 2].any(1) if kind == "keypoints" else torch.ones(len(there["labels"])) > 0
            there = {key: value[whole] for key, value in there.items()}
            found += scores.as_results(photo.id, there, split.categories)
        metrics = scores.average_precision(truth, found, [kind])
        assert metrics[f"AP{scores.SUFFIX[kind]}"] == pytest.approx(100, abs=1e-6)


def test_average_precision_is_pycocotools_own(photos, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    split = coco.read_split(photos, "val", "instances")
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
    ours = scores.average_precision(coco.ground_truth(split.path), found, ("bbox", "segm"))
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


def test_nothing_found_is_an_ap_of_0_and_said(photos, caplog):
    truth = coco.ground_truth(photos / "annotations" / "instances_val.json")
    assert scores.average_precision(truth, [], ("bbox",))["APbb"] == 0
    assert "nothing was found in any image" in caplog.text


def test_mean_iou_is_what_its_definition_says():
    rng = np.random.default_rng(0)
    found, truth = rng.integers(0, 4, (2, 30, 40))
    truth[:5] = 255
    truth[truth == 3] = 2  # class 3 is found but never there: its IoU is 0
    matrix = scores.confusion(torch.from_numpy(found), torch.from_numpy(truth), 5)
    counts, each = truth != 255, {}
    for number in range(4):
        union = ((found == number) | (truth == number)) & counts
        each[number] = 100 * ((found == number) & (truth == number) & counts).sum() / union.sum()
    metrics = scores.mean_iou(matrix, list("abcde"))
    assert metrics["mIoU"] == pytest.approx(np.mean(list(each.values())))
    assert metrics["IoU/b"] == pytest.approx(each[1])
    assert "IoU/e" not in metrics  # neither there nor found
    assert metrics["pixel_accuracy"] == pytest.approx(100 * (found == truth)[counts].mean())


# ---- clove-hub results -----------------------------------------------------------------------------------------------


def record(folder: Path, model: str, seed: int, value: float, date: str = "2026-01-01", **settings: object) -> None:
    write(
        Record(
            protocol="torchvision-detection",
            version=1,
            model=model,
            metrics={"APbb": value, "AP/cat": value},
            settings={"batch": {"total": 2}, "run": {"seed": seed}, "steps": 5, "train_images": 9} | settings,
            data=Data("photos", "f" * 64, 4),
            seeds=(seed,),
            deviations={},
            versions={},
            date=date,
        ),
        folder / "results.json",
    )


def test_results_are_collected_over_seeds(tmp_path, capsys, caplog):
    for seed, value in enumerate((10.0, 12.0, 17.0)):
        record(tmp_path / f"a{seed}", "ours", seed, value)
    record(tmp_path / "older", "ours", 1, 99.0, date="2025-01-01")
    record(tmp_path / "b", "random", 0, 5.0)
    out = tmp_path / "rows.json"
    assert main(["results", str(tmp_path), "--json", str(out), "--plot", str(tmp_path / "plot.png")]) == 0
    table = capsys.readouterr().out
    assert "| ours | 13.00 ± 3.61 | 3 |" in table
    assert "| random | 5.00 | 1 |" in table
    assert "AP/cat" not in table
    assert "older" in caplog.text
    ours, other = json.loads(out.read_text())
    assert ours["metrics"]["APbb"] == pytest.approx(13)
    assert ours["deviations"]["APbb"] == pytest.approx(np.std([10, 12, 17], ddof=1))
    assert (ours["seeds"], other["seeds"]) == ([0, 1, 2], [0])
    assert Image.open(tmp_path / "plot.png").size[0] > 300


def test_means_of_means_are_means_of_all():
    values = {(0, 1): [3.0, 5.0], (2, 3, 4): [7.0, 8.0, 12.0]}
    records = []
    for seeds, figures in values.items():
        spread = {"APbb": float(np.std(figures, ddof=1))}
        one = Record("p", 1, "m", {"APbb": np.mean(figures)}, {}, Data("d", "f", 1), seeds, spread, {}, "2026")
        records.append((Path("x"), one))
    (row,) = results.collect(records)
    assert row.metrics["APbb"] == pytest.approx(7)
    assert row.deviations["APbb"] == pytest.approx(np.std([3, 5, 7, 8, 12], ddof=1))


def test_settings_in_which_rows_differ_are_shown(tmp_path, capsys):
    record(tmp_path / "a", "ours", 0, 1.0)
    record(tmp_path / "b", "ours", 0, 2.0, steps=50)
    assert main(["results", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| ours | steps=5 | 1.00 | 1 |" in table
    assert "| ours | steps=50 | 2.00 | 1 |" in table


def test_results_go_into_the_card_of_the_bundle_that_they_are_of(tmp_path, capsys):
    write_run(tmp_path / "run", "resnet18")
    bundle = tmp_path / "bundle"
    assert main(["export", str(tmp_path / "run"), "--out", str(bundle)]) == 0
    own = backbones.fingerprint(backbones.find_backbone(str(bundle), 0))
    record(tmp_path / "results/a", str(bundle), 0, 31.25, backbone=own)
    assert main(["results", str(tmp_path / "results"), "--into", str(bundle)]) == 0
    card = (bundle / "README.md").read_text()
    assert "31.25" in card
    assert "reproduced" in card
    record(tmp_path / "results/b", str(bundle), 1, 99.0, backbone="0" * 64)
    assert main(["results", str(tmp_path / "results/b"), "--into", str(bundle)]) == 2
    assert "other weights" in capsys.readouterr().err
    record(tmp_path / "results/c", "another", 1, 99.0)
    assert main(["results", str(tmp_path / "results"), "--into", str(bundle)]) == 2
    assert (bundle / "README.md").read_text() == card


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert main(["results", str(tmp_path)]) == 2
    assert "has no results.json or result.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{}")
    assert main(["results", str(tmp_path)]) == 2
    assert "is not a result" in capsys.readouterr().err
