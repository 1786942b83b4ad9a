"""The protocol `discover`: one object an image by LOST's rule and by TokenCut's."""

import json

import numpy as np
import pytest
import scenes
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from clove_hub.data.voc import read_boxes
from clove_hub.evaluation.discover import (
    cell_box,
    features_of,
    in_pixels,
    last_attention,
    lost,
    overlaps,
    tokencut,
)
from clove_hub.evaluation.run import run_protocol
from clove_hub.weights import Preprocessing
from clove_hub.weights.backbone import Backbone

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


@pytest.mark.parametrize("rule", ["lost", "tokencut"])
def test_boxes_are_those_of_the_papers_program(rule, golden):
    """Of LOST's and of TokenCut's repository, on features of whole numbers with an object among them."""
    stored = golden["discover"]
    for number in range(6):
        features = torch.from_numpy(stored[f"{number}_features"]).float()
        grid, size = (features.shape[0], features.shape[1]), tuple(stored[f"{number}_size"].tolist())
        vectors = features.flatten(0, 1)
        cells, seed = lost(vectors, int(stored[f"{number}_patches"])) if rule == "lost" else tokencut(vectors)
        box = in_pixels(cell_box(cells, seed, grid), (16, 16), size)
        assert list(box) == stored[f"{number}_{rule}"].tolist()


def test_cells_without_any_feature_give_the_box_of_one_cell():
    cells, seed = lost(torch.zeros(12, 4), 100)
    assert not cells.any()
    assert cell_box(cells, seed, (3, 4)) == (0, 0, 1, 1)


def test_only_what_joins_the_seed_by_a_side_is_in_the_box():
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=bool).ravel()
    assert cell_box(mask, 0, (3, 4)) == (0, 0, 2, 1)
    assert cell_box(mask, 11, (3, 4)) == (2, 1, 4, 3)


def test_the_overlap_is_intersection_over_union():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 20]], dtype=float)
    assert overlaps((0, 0, 10, 10), boxes).tolist() == pytest.approx([1, 1 / 3, 0, 0.5])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "reg_tokens": 4, "no_embed_class": True}),
        ("vit_small_patch16_dinov3", {}),
    ],
)
def test_a_vision_transformer_is_described_by_the_keys_of_its_last_attention(name, args):
    """The middle third of what the last `qkv` layer gives, as LOST's program takes it, without prefix tokens."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, depth=2, **args).eval()
    given = []
    hook = model.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: given.append(output))
    pixels = torch.randn(3, 70, 100)
    with torch.no_grad():
        vectors, grid, cell = features_of(Backbone(model, PLAIN, name))(pixels)
    hook.remove()
    assert (grid, cell) == ((5, 7), (16, 16))
    width = given[0].shape[2] // 3
    expected = given[0][0, model.num_prefix_tokens :, width : 2 * width]
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    assert not model.blocks[-1].attn._forward_pre_hooks


def test_other_models_are_described_by_their_last_map():
    for name, cell in (("resnet18", 16), ("test_convnext", None), ("test_efficientnet", None)):
        model = timm.create_model(name, num_classes=0).eval()
        assert last_attention(model) is None
        with torch.no_grad():
            vectors, grid, sides = features_of(Backbone(model, PLAIN, name))(torch.randn(3, 96, 130))
        assert len(vectors) == grid[0] * grid[1]
        assert float(vectors.mean()) == pytest.approx(0, abs=1e-4)  # standardized as a whole
        assert 0.7 < float(vectors.std()) < 1.05  # below 1 where the values are small beside the norm's epsilon
        if cell:
            assert (grid, sides) == ((6, 9), (cell, cell))


def test_an_efficientnet_is_described_by_what_goes_into_its_pooling():
    """As LOST's program takes everything before the pooling; the last level of timm is before one more convolution."""
    model = timm.create_model("test_efficientnet", num_classes=0).eval()
    backbone, pixels = Backbone(model, PLAIN, "efficientnet"), torch.randn(3, 64, 96)
    with torch.no_grad():
        vectors, grid, _ = features_of(backbone)(pixels)
        expected = model.forward_features(pixels[None])[0]
        last = backbone.maps(pixels[None])[0][0]
    assert grid == tuple(expected.shape[1:])
    assert expected.shape[0] != last.shape[0]
    assert float(expected.min()) > -0.3  # behind an activation
    expected = expected.flatten(1).T
    torch.testing.assert_close(vectors, F.layer_norm(expected, expected.shape))


def test_a_box_around_the_whole_image_is_told_beside(tmp_path):
    data = scenes.boxed_objects(tmp_path)
    for path in (data / "Annotations").iterdir():
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>192</xmax><ymax>100</ymax></bndbox>"
        text = path.read_text()
        path.write_text(text[: text.index("<bndbox>")] + box + text[text.index("</bndbox>") + len("</bndbox>") :])
    assert run_protocol("discover", scenes.Colors(16), PLAIN, data, {"patches": 4}).metrics["whole image"] == 100


def test_a_level_takes_the_place_of_the_keys():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, dynamic_img_size=True).eval()
    backbone, pixels = Backbone(model, PLAIN, "vit"), torch.randn(3, 64, 64)
    with torch.no_grad():
        vectors, grid, _ = features_of(backbone, -2)(pixels)
        expected = backbone.maps(pixels[None], (-2,))[0][0].flatten(1).T
    assert grid == (4, 4)
    assert torch.equal(vectors, F.layer_norm(expected, expected.shape))
    with torch.no_grad():
        fine = features_of(Backbone(timm.create_model("resnet18", num_classes=0).eval(), PLAIN, "resnet"), -2)
        assert fine(torch.randn(3, 96, 130))[1:] == ((6, 10), (16, 16))


@pytest.mark.parametrize("rule", ["lost", "tokencut"])
def test_an_object_on_a_ground_is_found(rule, tmp_path):
    data = scenes.boxed_objects(tmp_path)
    found = run_protocol("discover", scenes.Colors(16), PLAIN, data, {"rule": rule, "patches": 4})
    assert found.metrics == {"CorLoc": 100, "whole image": 0}
    assert (found.split, found.rule, found.data.samples) == ("trainval", rule, 6)
    assert found.items == {"category": {"bus": {"CorLoc": 0, "images": 3}, "cat": {"CorLoc": 100, "images": 6}}}


def test_difficult_objects_count_and_images_without_a_box_do_not(tmp_path):
    data = scenes.boxed_objects(tmp_path)
    for path in (data / "Annotations").iterdir():
        objects = path.read_text()
        start = objects.index("<object><name>cat")
        path.write_text(objects[:start] + objects[objects.index("</object>") + len("</object>") :])
    found = run_protocol("discover", scenes.Colors(16), PLAIN, data, {"patches": 4})
    assert (found.metrics, found.data.samples) == (
        {"CorLoc": 0, "whole image": 0},
        3,
    )  # the difficult ones, which are elsewhere
    boxes = read_boxes(data, "trainval")
    assert [len(image.boxes) for image in boxes] == [0, 1, 0, 1, 0, 1]
    assert boxes[1].boxes.tolist() == [[160, 128, 192, 160]]
    for path in (data / "Annotations").iterdir():
        path.write_text("<annotation><size><width>192</width><height>160</height></size></annotation>")
    with pytest.raises(ValueError, match=r"no image of .* \(trainval\) has a box"):
        run_protocol("discover", scenes.Colors(16), PLAIN, data)


def test_boxes_in_cocos_format_are_read_too(tmp_path):
    voc = scenes.boxed_objects(tmp_path / "voc")
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (voc / "JPEGImages").rename(coco / "train")
    images, annotations = [], []
    for number, path in enumerate(sorted((coco / "train").iterdir()), start=1):
        with Image.open(path) as image:
            width, height = image.size
            bright = np.argwhere(np.asarray(image)[:, :, 1] > 128)
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        (y0, x0), (y1, x1) = bright.min(0).tolist(), (bright.max(0) + 1).tolist()
        row = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "area": 1.0}
        annotations.append(row | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (coco / "annotations" / "instances_train.json").write_text(json.dumps(document))
    found = run_protocol("discover", scenes.Colors(16), PLAIN, coco, {"patches": 4})
    assert (found.metrics, found.split, found.data.samples) == ({"CorLoc": 100, "whole image": 0}, "train", 6)


def test_a_split_that_is_not_there_is_named(tmp_path):
    data = scenes.boxed_objects(tmp_path)
    with pytest.raises(ValueError, match=r"ImageSets/Main/val\.txt is missing"):
        run_protocol("discover", scenes.Colors(), PLAIN, data, {"split": "val"})
    with pytest.raises(ValueError, match="patches and images must be positive"):
        run_protocol("discover", scenes.Colors(), PLAIN, data, {"images": 0})
