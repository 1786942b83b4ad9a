"""The data of fine-tuning: COCO's and VOC's annotations are read whole or refused, and samples keep them together."""

import numpy as np
import pytest
import torch
from fine_tuning import put
from PIL import Image

from clove_hub.data import coco
from clove_hub.data.masks import open_segmented
from clove_hub.training.finetune import dataset
from clove_hub.training.finetune.fine_tune import default_split
from clove_hub.training.finetune.settings import SegmentationImages

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]


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
    train, val = (open_segmented(tmp_path, split) for split in (default_split(tmp_path), "val"))
    assert [photo.stem for photo, _ in train.pairs] == ["a", "b"]
    assert train.pairs[0][1].parent.name == "SegmentationClassAug"
    assert val.pairs[0][1].parent.name == "SegmentationClass"
    (tmp_path / "SegmentationClassAug").rename(tmp_path / "away")
    assert default_split(tmp_path) == "train"


# ---- images and targets--------------------------------------------------------------------------------------------------


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


def test_a_crop_keeps_image_and_classes_together():
    settings = SegmentationImages(crop=40, scale=(0.5, 2.0))
    label = torch.zeros(60, 80, dtype=torch.uint8)
    label[:, 40:] = 1
    image = (label * 200).expand(3, 60, 80)
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels, classes = dataset.random_crop(image, label, settings, rng.random(4), (0, 0, 0))
        assert pixels.shape == (3, 40, 40)
        assert classes.shape == (40, 40)
        counts = classes != 255
        assert ((pixels[0] > 100) == (classes == 1))[counts].float().mean() > 0.97
