"""Masks: whatever kind of PNG holds the indices, whatever form the list of classes has, in all layouts."""

import json
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clove_hub.data import masks
from clove_hub.data.masks import CITYSCAPES, CITYSCAPES_IDS, VOC, open_segmented, read_indices, segmentation_splits

INDICES = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.uint8)


def png(path: Path, values: np.ndarray, depth: int, color: int) -> None:
    """Writes a PNG of any depth and kind of color, which Pillow cannot: samples (H, W) or (H, W, channels)."""
    height, width = values.shape[:2]
    rows = []
    for row in values.reshape(height, -1):
        bits = "".join(f"{value:0{depth}b}" for value in row.tolist())
        rows.append(b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big"))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))]
    if color == 3:
        chunks.append((b"PLTE", bytes(range(255, 255 - 3 * 2 ** min(depth, 6), -1))))
    chunks += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)


@pytest.mark.parametrize("depth", [2, 4, 8, 16])
def test_gray_masks_of_any_depth_are_read_as_stored(depth, tmp_path):
    """A gray PNG of 2 or 4 bits comes from Pillow with its numbers multiplied by 85 or 17."""
    png(tmp_path / "mask.png", INDICES, depth, 0)
    assert read_indices(tmp_path / "mask.png").tolist() == INDICES.tolist()


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_palette_masks_are_their_numbers_and_not_their_colors(depth, tmp_path):
    png(tmp_path / "mask.png", INDICES, depth, 3)
    assert read_indices(tmp_path / "mask.png").tolist() == INDICES.tolist()


def test_black_and_white_masks_of_one_bit_are_0_and_1(tmp_path):
    Image.fromarray(INDICES > 1).save(tmp_path / "mask.png")
    assert read_indices(tmp_path / "mask.png").tolist() == (INDICES > 1).astype(int).tolist()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_gray_and_opaque_colors_are_indices(mode, tmp_path):
    Image.fromarray(INDICES).convert(mode).save(tmp_path / "mask.png")
    assert read_indices(tmp_path / "mask.png").tolist() == INDICES.tolist()


def test_32_bit_masks_are_read(tmp_path):
    Image.fromarray(INDICES.astype(np.int32) * 100).save(tmp_path / "mask.tif")
    assert read_indices(tmp_path / "mask.tif").tolist() == (INDICES.astype(int) * 100).tolist()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda p: Image.fromarray(np.stack([INDICES, INDICES, 3 - INDICES], 2)).save(p), "it has colors"),
        (lambda p: Image.new("RGBA", (4, 2), (1, 1, 1, 200)).save(p), "transparent"),
        (lambda p: png(p, np.stack([INDICES] * 3, 2), 16, 2), "colors of 16 bits"),
        (lambda p: png(p, np.stack([INDICES.astype(int), np.full((2, 4), 65535)], 2), 16, 4), "colors of 16 bits"),
        (lambda p: Image.fromarray(INDICES).save(p, "JPEG"), "JPEG, which changes the numbers"),
        (lambda p: Image.fromarray(INDICES.astype(np.float32)).save(p, "TIFF"), "not whole numbers"),
        (lambda p: Image.fromarray(INDICES.astype(np.int32) - 1).save(p, "TIFF"), "numbers from -1 to 2"),
    ],
)
def test_what_is_no_index_image_is_refused_with_a_reason(write, reason, tmp_path):
    write(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=rf"mask\.png is an image of mode .*{reason}"):
        read_indices(tmp_path / "mask.png")


# ---- the plain layout ------------------------------------------------------------------------------------------------


def plain(root: Path, mask: np.ndarray, classes: object, name: str = "a", ending: str = ".jpg") -> Path:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", mask.shape[::-1]).save(root / "images" / f"{name}{ending}")
    Image.fromarray(mask).save(root / "labels" / f"{name}.png")
    (root / "train.txt").write_text(f"{name}\n")
    if classes is not None:
        (root / "classes.json").write_text(json.dumps(classes))
    return root


def read(root: Path) -> list[list[int]]:
    part = open_segmented(root, "train")
    return part.mask(part.pairs[0]).tolist()


@pytest.mark.parametrize(
    "classes",
    [
        {"classes": [{"id": 0, "name": "sky"}, {"id": 1, "name": "road"}, {"id": 2, "name": "car"}]},
        {"classes": [{"id": "2", "name": "car"}, {"id": 1.0, "name": "road"}, {"id": 0, "name": "sky"}]},
        {"classes": ["sky", "road", "car"]},
        ["sky", "road", "car"],
        {"0": "sky", "1": "road", "2": "car"},
        {"classes": {"0": "sky", "2": "car", "1": "road"}, "ignore_label": 255},
    ],
)
def test_the_list_of_classes_has_many_forms(classes, tmp_path):
    mask = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    assert read(plain(tmp_path, mask, classes)) == [[0, 1, 2, 255]]
    assert open_segmented(tmp_path, "train").classes == ("sky", "road", "car")


def test_a_byte_order_mark_and_endings_in_capitals_are_no_obstacle(tmp_path):
    plain(tmp_path, np.array([[0, 1]], dtype=np.uint8), None, "scene.1", ".JPG")
    (tmp_path / "classes.json").write_text('["a", "b"]', encoding="utf-8-sig")
    (tmp_path / "train.txt").write_text("scene.1\r\n", encoding="utf-8-sig")
    part = open_segmented(tmp_path, "train")
    assert part.pairs[0][0].name == "scene.1.JPG"
    assert part.name(part.pairs[0]) == "scene.1"


def test_ids_from_1_and_with_gaps_are_numbered_in_their_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    classes = {"classes": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 7, "name": "c"}], "ignore_label": 0}
    assert read(plain(tmp_path, np.array([[0, 1, 2, 7]], dtype=np.uint8), classes)) == [[255, 0, 1, 2]]
    assert "the ids 1, 2, 7 are read as the classes 0 to 2" in caplog.text
    plain(tmp_path, np.array([[0, 1, 3]], dtype=np.uint8), classes)
    with pytest.raises(ValueError, match=r"a\.png has the class 3; expected 1, 2, 7, or 0 where a pixel has no class"):
        read(tmp_path)
    plain(tmp_path, np.array([[255]], dtype=np.uint8), classes)
    with pytest.raises(ValueError, match="has the class 255"):  # only what the file says is void
        read(tmp_path)


def test_an_ignore_label_of_16_bits_is_honored(tmp_path):
    classes = {"classes": ["a", "b", "c"], "ignore_label": 65535}
    assert read(plain(tmp_path, np.array([[0, 1, 2, 65535]], dtype=np.uint16), classes)) == [[0, 1, 2, 255]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "cannot be read"),
        ("", "the file is empty"),
        ("{", "cannot be read as JSON"),
        ('{"classes": [{"name": "a"}, {"name": "b"}]}', "lacks an integer id"),
        ('{"sky": 0, "road": 1}', "lacks an integer id"),
        ('{"classes": [{"id": 1, "name": "a"}]}', r"has the ids \[1\]; expected from 2"),
        ('{"classes": [{"id": -1, "name": "a"}, {"id": 1, "name": "b"}]}', r"has the ids \[-1, 1\]; expected"),
        ('{"classes": [{"id": 0, "name": "a"}, {"id": 0, "name": "b"}]}', "the id 0 twice"),
        ('{"classes": ["a", "b", "a"]}', "the name 'a' twice"),
        ('{"classes": ["a", "b"], "ignore_label": 0}', "ignore_label 0, which is also the id of 'a'"),
        ('{"classes": ["a", "b"], "ignore_label": "none"}', "ignore_label 'none'; expected a whole number, or null"),
    ],
)
def test_a_wrong_list_of_classes_is_named(content, message, tmp_path):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_segmented(tmp_path, "train")
    assert "classes.json" in str(caught.value)


def test_black_and_white_masks_of_two_classes_are_refused_until_255_has_a_meaning(tmp_path):
    """With 255 as void every pixel that counts is background, and any model would score 100."""
    mask = np.array([[0, 255]], dtype=np.uint8)
    plain(tmp_path, mask, {"classes": ["ground", "cell"]})
    with pytest.raises(ValueError, match=r"no pixel of 'cell' \(1\), but the value 255.*\"ignore_label\": null"):
        open_segmented(tmp_path, "train")
    (tmp_path / "classes.json").write_text('{"classes": ["ground", "cell"], "ignore_label": null}')
    assert read(tmp_path) == [[0, 1]]  # as the message advises
    assert read(plain(tmp_path, mask // 255, None)) == [[0, 1]]


def test_void_is_void_in_two_classes_where_a_mask_has_both(tmp_path):
    plain(tmp_path, np.array([[0, 255]], dtype=np.uint8), {"classes": ["ground", "cell"]}, "a")
    plain(tmp_path, np.array([[0, 1, 255]], dtype=np.uint8), None, "b")
    (tmp_path / "train.txt").write_text("a\nb\n")
    part = open_segmented(tmp_path, "train")
    assert [part.mask(pair).tolist() for pair in part.pairs] == [[[0, 255]], [[0, 1, 255]]]


def test_a_photo_of_another_size_is_named_with_its_mask_after_its_exif_orientation(tmp_path):
    plain(tmp_path, np.zeros((3, 5), dtype=np.uint8), ["a", "b"])
    part = open_segmented(tmp_path, "train")
    assert part.mask(part.pairs[0], (5, 3)).shape == (3, 5)
    with pytest.raises(
        ValueError, match=r"labels/a\.png is 5x3 pixels, but .*images/a\.jpg is 3x5, turned by its EXIF"
    ):
        part.mask(part.pairs[0], (3, 5))


def test_a_mask_with_another_ending_and_a_name_given_twice_are_named(tmp_path):
    plain(tmp_path, INDICES, ["a", "b"])
    (tmp_path / "labels" / "a.png").rename(tmp_path / "labels" / "a.bmp")
    with pytest.raises(ValueError, match=r"the mask of a\.jpg is .*labels/a\.bmp: store it as a\.png"):
        open_segmented(tmp_path, "train")
    (tmp_path / "train.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match=r"train\.txt names 1 images twice, such as a"):
        open_segmented(tmp_path, "train")


def test_the_fingerprint_follows_sizes_and_the_meaning_of_the_values(tmp_path):
    plain(tmp_path, INDICES % 2, {"classes": ["a", "b"]})
    before = open_segmented(tmp_path, "train").fingerprint
    (tmp_path / "classes.json").write_text('{"classes": {"1": "a", "0": "b"}}')
    assert open_segmented(tmp_path, "train").fingerprint == before
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"], "ignore_label": null}')
    assert open_segmented(tmp_path, "train").fingerprint != before


# ---- the layouts -----------------------------------------------------------------------------------------------------


def test_a_folder_of_no_layout_is_told_which_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"classes\.json .*PASCAL VOC.*Cityscapes"):
        open_segmented(tmp_path, "train")


def voc(root: Path) -> Path:
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (6, 4)).save(root / "JPEGImages" / f"{name}.jpg")
        Image.new("L", (6, 4), 20).save(root / "SegmentationClassAug" / f"{name}.png")
        mask = Image.new("L", (6, 4), 3)
        mask.putpalette(list(range(255, -1, -1)) * 3)  # the colors that VOC gives its indices for looking at
        assert mask.mode == "P"
        mask.save(root / "SegmentationClass" / f"{name}.png", optimize=False)
    for split, names in (("train", "a"), ("trainaug", "a\nb\n"), ("val", "b\n")):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text(names)
    return root


def test_the_layout_of_voc(tmp_path):
    train, val = (open_segmented(voc(tmp_path / "voc"), "trainaug"), open_segmented(tmp_path / "voc", "val"))
    assert (len(train.pairs), train.classes[20], len(VOC)) == (2, "tvmonitor", 21)
    assert np.unique(train.mask(train.pairs[0], (6, 4))).tolist() == [20]
    assert np.unique(val.mask(val.pairs[0])).tolist() == [3]
    Image.new("L", (6, 4), 21).save(tmp_path / "voc/SegmentationClass/b.png")
    with pytest.raises(ValueError, match=r"b\.png has the class 21; expected 0 to 20, or 255"):
        val.mask(val.pairs[0])
    with pytest.raises(
        ValueError, match=r"the list .*Segmentation/test\.txt cannot be read: No such file or directory$"
    ):
        open_segmented(tmp_path / "voc", "test")
    (tmp_path / "voc/SegmentationClass/b.png").unlink()
    with pytest.raises(ValueError, match=r"the mask of b\.jpg is missing: .*SegmentationClass/b\.png"):
        open_segmented(tmp_path / "voc", "val")
    (tmp_path / "voc/JPEGImages/b.jpg").unlink()
    with pytest.raises(ValueError, match=r"JPEGImages/b\.\* is missing; val\.txt names it"):
        open_segmented(tmp_path / "voc", "val")
    (tmp_path / "voc/ImageSets/Segmentation/val.txt").write_text("")
    with pytest.raises(ValueError, match=r"val\.txt is empty"):
        open_segmented(tmp_path / "voc", "val")


def test_the_layout_of_voc_may_have_other_classes(tmp_path):
    """CVAT exports labelmap.txt; under VOC's names the figures of single classes would be another class's."""
    folder = voc(tmp_path)
    Image.new("L", (6, 4), 1).save(folder / "SegmentationClass/b.png")
    (folder / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:255,0,0::\n")
    part = open_segmented(folder, "val")
    assert part.classes == ("background", "cat")
    assert part.mask(part.pairs[0]).tolist() == [[1] * 6] * 4
    (folder / "classes.json").write_text('{"1": "dog", "9": "cow"}')
    part = open_segmented(folder, "val")
    assert part.classes == ("dog", "cow")
    assert part.mask(part.pairs[0]).tolist() == [[0] * 6] * 4


def test_fine_tuning_takes_the_augmented_set_where_it_is_whole(tmp_path):
    folder = voc(tmp_path)
    assert masks.training_split(folder) == "trainaug"
    (folder / "ImageSets/Segmentation/trainaug.txt").unlink()
    assert masks.training_split(folder) == "train"


def test_the_layout_of_cityscapes(tmp_path):
    photos, truths = (tmp_path / kind / "val" / "ulm" for kind in ("leftImg8bit", "gtFine"))
    photos.mkdir(parents=True)
    truths.mkdir(parents=True)
    Image.new("RGB", (7, 1)).save(photos / "ulm_0_leftImg8bit.png")
    ids = np.array([[0, 7, 8, 26, 33, 29, 255]], dtype=np.uint8)
    Image.fromarray(ids).save(truths / "ulm_0_gtFine_labelIds.png")
    part = open_segmented(tmp_path, "val")
    assert part.mask(part.pairs[0], (7, 1)).tolist() == [[255, 0, 1, 13, 18, 255, 255]]
    assert dict(zip(CITYSCAPES_IDS, CITYSCAPES, strict=True))[26] == "car"
    Image.fromarray(ids + 1).save(truths / "ulm_0_gtFine_labelIds.png")
    with pytest.raises(ValueError, match="has the class 34; expected 7, 8, 11"):
        part.mask(part.pairs[0])
    (truths / "ulm_0_gtFine_labelIds.png").unlink()
    with pytest.raises(ValueError, match=r"the mask of ulm_0_leftImg8bit\.png is missing: .*labelIds\.png"):
        open_segmented(tmp_path, "val")


def test_real_street_scenes_have_the_classes_that_their_list_says():
    from conftest import SHARED

    folder = SHARED / "data" / "camvid"
    if not folder.is_dir():
        pytest.skip(f"the street scenes are not at hand ({folder})")
    part = open_segmented(folder, "val").spread(5)
    shares = np.mean([np.bincount(part.mask(pair).ravel(), minlength=256) / (480 * 360) for pair in part.pairs], 0)
    assert part.classes[3] == "road"
    assert 0.1 < shares[3] < 0.5
    assert shares[11:255].sum() == 0


# ---- ADE20K and COCO-Stuff -------------------------------------------------------------------------------------------


def scene(photo: Path, mask: Path, values: list[int]) -> None:
    for path in (photo, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (len(values), 1)).save(photo)
    Image.fromarray(np.array([values], dtype=np.uint8)).save(mask)


def test_ade20k_has_150_classes_and_0_is_none_of_them(tmp_path):
    for split, folder in (("train", "training"), ("val", "validation")):
        scene(
            tmp_path / f"images/{folder}/ADE_{split}_00000001.jpg",
            tmp_path / f"annotations/{folder}/ADE_{split}_00000001.png",
            [0, 1, 13, 150],
        )
        part = open_segmented(tmp_path, split)
        assert [part.name(pair) for pair in part.pairs] == [f"ADE_{split}_00000001"]
        assert part.mask(part.pairs[0]).tolist() == [[255, 0, 12, 149]]
    assert len(set(part.classes)) == 150
    assert [part.classes[number] for number in (0, 12, 149)] == ["wall", "person", "flag"]
    assert segmentation_splits(tmp_path) == ["train", "val"]
    with pytest.raises(ValueError, match="no split 'test': choose train or val"):
        open_segmented(tmp_path, "test")
    (tmp_path / "images/training/ADE_train_00000001.jpg").rename(tmp_path / "images/training/other.jpg")
    with pytest.raises(ValueError, match=r"the photo of the mask .* is missing: .*ADE_train_00000001\.\*"):
        open_segmented(tmp_path, "train")


RAW = [0, 17, 89, 91, 149, 181, 255]
"""In the released masks: person, dog, toothbrush, banner, rock, wood, and none."""


@pytest.mark.parametrize(
    ("split", "names", "expected"),
    [
        ("val", 171, ["person", "dog", "toothbrush", "banner", "rock", "wood", None]),
        ("val2017", 171, ["person", "dog", "toothbrush", "banner", "rock", "wood", None]),
        ("val-27", 27, ["person", "animal", "indoor", "textile", "solid", "solid", None]),
        ("val-things", 12, ["person", "animal", "indoor", None, None, None, None]),
        ("val-stuff", 15, [None, None, None, "textile", "solid", "solid", None]),
    ],
)
@pytest.mark.parametrize("photos", ["val2017", "images/val2017"])
def test_coco_stuff_has_171_classes_or_their_supercategories(split, names, expected, photos, tmp_path):
    scene(tmp_path / photos / "000000000139.jpg", tmp_path / "stuffthingmaps/val2017/000000000139.png", RAW)
    part = open_segmented(tmp_path, split)
    assert len(set(part.classes)) == names
    found = part.mask(part.pairs[0])[0].tolist()
    assert [None if value == 255 else part.classes[value] for value in found] == expected
    assert segmentation_splits(tmp_path) == ["val"]


def test_coco_stuff_with_mmsegmentations_numbers(tmp_path):
    masks = tmp_path / "annotations" / "train2017"
    scene(tmp_path / "images/train2017/9.jpg", masks / "9_labelTrainIds.png", [0, 16, 79, 80, 170, 255])
    Image.new("L", (6, 1)).save(masks / "9.png")  # the released one lies beside it
    part = open_segmented(tmp_path, "train")
    found = part.mask(part.pairs[0])[0].tolist()
    names = [None if value == 255 else part.classes[value] for value in found]
    assert names == ["person", "dog", "toothbrush", "banner", "wood", None]


def test_splits_that_coco_stuff_lacks_are_named(tmp_path):
    scene(tmp_path / "val2017/1.jpg", tmp_path / "stuffthingmaps/val2017/1.png", RAW)
    for split in ("train", "val-3"):
        with pytest.raises(ValueError, match=rf"no split '{split}': choose val, val-27, or one that ends in"):
            open_segmented(tmp_path, split)
    scene(tmp_path / "val2017/1.jpg", tmp_path / "stuffthingmaps/val2017/1.png", [11])
    part = open_segmented(tmp_path, "val")
    with pytest.raises(ValueError, match="has the class 11; expected"):
        part.mask(part.pairs[0])
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"the photos of .* are missing: expected .*val2017"):
        open_segmented(tmp_path, "val")
