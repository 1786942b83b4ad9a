"""The data of fine-tuning: samples keep images and annotations together."""

import json
import shutil

import numpy as np
import pytest
import torch
from fine_tuning import DETECTOR, downstream, put
from safetensors.torch import load_file

from clove_hub.data import coco
from clove_hub.training.finetune import crops, dataset
from clove_hub.training.finetune.forms import RandomCrops
from clove_hub.training.finetune.jitter import Jitter, jittered

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]


# ---- images and targets ---------------------------------------------------------------------------------------------


def test_a_mirror_moves_boxes_masks_and_keypoints_with_the_image(made):
    folder, document = made
    put(folder, document)
    split = coco.read_split(folder, "train", "keypoints")
    partners = dataset.mirror_partners(split.categories[0].keypoints)
    assert partners[:4] == (0, 2, 1, 3)
    target = dataset.target_of(split.photos[0])
    target["masks"] = dataset.target_of(coco.read_split(folder, "train", "instances").photos[0])["masks"]
    flipped = dataset.mirrored(target, 64, partners)
    assert flipped["boxes"][0].tolist() == [64 - 28, 6, 64 - 8, 22]
    columns = flipped["masks"][0].nonzero()[:, 1]
    assert (columns.min().item(), columns.max().item() + 1) == (64 - 28, 64 - 8)
    # The left eye's pixel, number 8 + 1 + 1 from the left, is afterwards the right eye's, as many from the right.
    assert flipped["keypoints"][0, 2].tolist() == [64 - 10.5, 8.5, 2]
    again = dataset.mirrored(flipped, 64, partners)
    assert all(torch.equal(again[key], target[key]) for key in target)


def test_half_of_the_images_are_mirrored_and_none_in_evaluation(made):
    folder, document = made
    put(folder, document)
    split = coco.read_split(folder, "train", "detection")
    plain = dataset.DetectionDataset(split.photos)[0, 0]
    train = dataset.DetectionDataset(split.photos, seed=0)
    flipped = [torch.equal(train[epoch, 0].image, plain.image.flip(-1)) for epoch in range(60)]
    assert 18 < sum(flipped) < 42
    assert torch.equal(dataset.DetectionDataset(split.photos)[5, 0].image, plain.image)


def test_large_scale_jitter_keeps_boxes_masks_and_keypoints_on_their_object():
    """A bright rectangle: what is left of it in the view is where box, mask and keypoints say, at every scale."""
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:40, 30:60] = 200
    mask = (image[0] > 0).to(torch.uint8)[None]
    corners = torch.tensor([[[30.5, 20.5, 2], [59.5, 39.5, 1], [0, 0, 0]]])
    target = {
        "boxes": torch.tensor([[30.0, 20.0, 60.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": mask,
        "keypoints": corners,
    }
    rng = np.random.default_rng(0)
    gone = filled = 0
    for _ in range(200):
        view, found = jittered(image, target, Jitter(64, (0.1, 4.0), (0, 0, 0)), rng.random(3))
        assert view.shape == (3, 64, 64)
        assert found["masks"].shape == (len(found["boxes"]), 64, 64)
        bright = (view[0] > 100).nonzero()
        if not len(found["boxes"]):
            gone += 1
            assert len(bright) == 0 or min(np.ptp(bright.numpy(), 0)) <= 1
            continue
        (box,), (points,) = found["boxes"].tolist(), found["keypoints"]
        if len(bright):
            seen = [*bright.min(0).values.flip(0).tolist(), *(bright.max(0).values + 1).flip(0).tolist()]
            assert np.abs(np.subtract(box, seen)).max() <= 1
        assert ((view[0] > 100) == (found["masks"][0] > 0)).float().mean() > 0.97
        assert points[2].tolist() == [0, 0, 0]
        for point, there in zip(points[:2], (box[:2], box[2:]), strict=True):
            if point[2]:
                assert np.abs(np.subtract(point[:2].numpy(), there)).max() <= 4  # half a pixel of the image, enlarged
        filled += bool((view[:, -1] == 0).all())
    assert gone > 5
    assert filled > 20


def test_a_view_of_large_scale_jitter_is_a_function_of_seed_epoch_and_image(made):
    folder, document = made
    put(folder, document)
    split = coco.read_split(folder, "train", "instances")
    train = dataset.DetectionDataset(split.photos, 0, (), Jitter(64, (0.1, 2.0), (9, 9, 9)))
    first, again, other = train[3, 1], train[3, 1], train[4, 1]
    assert torch.equal(first.image, again.image)
    assert all(torch.equal(first.target[key], again.target[key]) for key in first.target)
    assert not torch.equal(first.image, other.image)
    assert train.kinds == [0, 0]


def test_a_crop_keeps_image_and_classes_together():
    settings = RandomCrops(crop=40, scale=(0.5, 2.0))
    label = torch.zeros(60, 80, dtype=torch.uint8)
    label[:, 40:] = 1
    image = (label * 200).expand(3, 60, 80)
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels, classes = crops.random_crop(image, label, settings, rng.random(4), (0, 0, 0))
        assert pixels.shape == (3, 40, 40)
        assert classes.shape == (40, 40)
        counts = classes != 255
        assert ((pixels[0] > 100) == (classes == 1))[counts].float().mean() > 0.97


# ---- own data --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_names_travel_from_roboflows_and_vocs_files_to_the_results(made, tmp_path_factory):
    """Whatever layout the data has: the classes are those of the annotations, and stand in what the run leaves."""
    folder, document = made
    document["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},  # which Roboflow writes above all others
        {"id": 3, "name": "cat", "supercategory": "pets"},
        {"id": 9, "name": "guinea pig", "supercategory": "pets"},
    ]
    for number, row in enumerate(document["annotations"]):
        row["category_id"] = (3, 9)[number % 2]
    roboflow, voc = (tmp_path_factory.mktemp(name) for name in ("roboflow", "voc"))
    for split, name in (("train", "train"), ("val", "valid")):
        for out in (roboflow, voc):
            shutil.copytree(folder / split, out / name)
        (roboflow / name / "_annotations.coco.json").write_text(json.dumps(document))
        for image in (1, 2):
            objects = "".join(
                f"<object><name>{('cat', 'guinea pig')[number]}</name><bndbox><xmin>{8 * place + 1}</xmin><ymin>7</ymin>"
                f"<xmax>{8 * place + 20}</xmax><ymax>22</ymax></bndbox></object>"
                for number, place in enumerate((1, 4))
            )
            size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
            (voc / name / f"{image}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    for data in (roboflow, voc):
        out = data / "out"
        assert downstream("detection", data, out, DETECTOR, run__pictures=0) == 0
        table = (out / "classes.csv").read_text().splitlines()
        assert [line.split(",")[:3] for line in table[1:]] == [["cat", "2", "2"], ["guinea pig", "2", "2"]]
        assert load_file(out / "model.safetensors")["roi_heads.box_predictor.cls_score.bias"].shape == (3,)
