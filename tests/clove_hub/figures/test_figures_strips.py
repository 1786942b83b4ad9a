"""The figures that show what a protocol or a method's prototypes see: what is where in the picture."""

from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image
from rendering import arguments, assert_readable, close, color_at, rendered, save_run, words
from torch import nn
from torch.nn import functional as F

from clove_hub.evaluation.run import make_settings, run_protocol
from clove_hub.evaluation.scores import confusion, segmentation_scores
from clove_hub.figures import propagate, prototypes, retrieve
from clove_hub.figures.style import OBJECT_COLORS, class_colors, faded, flat, tinted
from clove_hub.heads import Prototypes
from clove_hub.weights import Backbone, Preprocessing, load_backbone

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


# ---- colors ---------------------------------------------------------------------------------------------------------


def test_the_classes_of_voc_have_colors_of_their_own():
    colors = class_colors(21)
    assert len({tuple(color) for color in colors.tolist()} | {(255, 255, 255)}) == 22  # white is no class
    assert class_colors(3).tolist() == colors[:3].tolist()


def test_a_class_is_flat_and_no_class_is_white():
    colors = class_colors(2)
    shown = flat(np.array([[0, 1, 255]], dtype=np.uint8), colors)
    assert shown[0].tolist() == [*colors.tolist(), [255, 255, 255]]


def test_objects_are_tinted_and_the_background_is_left():
    image = np.full((1, 4, 3), 100, dtype=np.uint8)
    shown = tinted(image, np.array([[0, 1, 2, 8]]), OBJECT_COLORS, 0.5)
    halves = np.round((image[0, :2] + OBJECT_COLORS[:2].astype(float)) / 2)
    assert shown[0].tolist() == [[100] * 3, *halves.tolist(), halves[0].tolist()]  # seven colors, then again


def test_what_is_outside_a_mask_is_gray_and_pale():
    image = np.array([[[200, 0, 100], [200, 0, 100]]], dtype=np.uint8)
    inside, outside = faded(image, np.array([[True, False]]), 0.5)[0].tolist()
    assert inside == [200, 0, 100]
    assert outside == [178, 178, 178]  # halfway from the mean, 100, to white


# ---- segment retrieval -----------------------------------------------------------------------------------------------


def quarters(classes) -> np.ndarray:
    """(60, 80) in four blocks."""
    return np.array(classes, dtype=np.uint8).repeat(30, 0).repeat(40, 1)


def test_photo_truth_and_retrieved_classes_stand_side_by_side():
    image = np.full((60, 80, 3), (30, 90, 150), dtype=np.uint8)
    truth, predicted = quarters([[0, 1], [2, 255]]), quarters([[0, 1], [0, 1]])
    row = retrieve.Retrieved(image, quarters([[0, 0], [1, 1]]), truth, predicted)
    found = {"a backbone": [row, row], "another": [row, row]}
    figure = retrieve.segment_strips(found, ["sky", "road_sign", "car", "dog"])
    assert len(figure.axes) == 8
    pixels = rendered(figure)
    colors = class_colors(4)
    for photo, left, right, other in (figure.axes[:4], figure.axes[4:]):
        for column, line, true, found in ((20, 12, 0, 0), (60, 12, 1, 1), (20, 40, 2, 0), (60, 40, None, 1)):
            assert close(color_at(pixels, photo, column, line), (30, 90, 150))
            assert close(color_at(pixels, left, column, line), (255,) * 3 if true is None else colors[true])
            assert close(color_at(pixels, right, column, line), colors[found])
            assert close(color_at(pixels, other, column, line), colors[found])
        edge = [color_at(pixels, right, 20, 29.5 + step / 4).min() for step in range(-4, 5)]
        assert max(edge) > 100  # a white line between the regions
    said = [text.get_text() for text in words(figure)]
    assert said.count("67 %") == 4  # two of three quarters; the fourth has no class
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sky", "road sign", "car", "no class"]
    assert_readable(figure)


@pytest.mark.parametrize(("rule", "fine"), [("regions", False), ("regions", True), ("maskcontrast", True)])
def test_the_classes_drawn_are_those_that_the_protocol_counts(rule, fine, tmp_path):
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    settings = {"regions": 2, "train_images": 3} if rule == "regions" else {"rule": rule, "saliency": "truth"}
    backbone = Backbone(scenes.small_resnet() if fine else scenes.Colors(4), PLAIN, "made")
    record = run_protocol("retrieve", backbone.model, PLAIN, folder, settings, seed=3)
    with torch.no_grad():
        rows = list(retrieve.retrieved(backbone, folder, make_settings("retrieve", settings), 3))
    matrix = sum(confusion(torch.from_numpy(row.predicted), torch.from_numpy(row.truth), 3) for row in rows)
    assert segmentation_scores(matrix) == pytest.approx(record.metrics)
    assert 5 < record.metrics["mIoU"] < 99
    for number, row in enumerate(rows):
        assert np.array_equal(row.image, np.array(Image.open(folder / "images" / f"test{number}.png")))


def test_retrieval_is_drawn_from_the_command_line(tmp_path):
    folder = scenes.segmented_images(tmp_path, size=(64, 96))
    common = ("--model", "random:test_resnet", "--data", folder)
    figure = retrieve.draw(arguments(retrieve, *common, "--images", 2, "regions=4"))
    assert len(figure.axes) == 6
    assert_readable(figure)
    for wrong, message in (
        (("--images", 0), "--images is 0; expected at least 1"),
        (("test_images=3",), "test_images is set by --images"),
        (("region=3",), r"unknown key retrieve.region \(did you mean 'regions'\?\)"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieve.draw(arguments(retrieve, *common, *wrong))


# ---- propagation -----------------------------------------------------------------------------------------------------


def test_truth_stands_above_what_was_propagated():
    images = [np.full((60, 80, 3), (90, 90, 90), dtype=np.uint8)] * 3
    first, left, empty = np.zeros((3, 60, 80), dtype=np.int64)
    first[10:50, 10:40], first[10:50, 50:70] = 1, 2
    left[10:50, 10:40] = 1
    carried = propagate.Carried("a backbone: J&F 12.3", [first, left, empty])
    strip = propagate.Strip("swan", [0, 4, 9], images, [first, first, empty], [carried])
    figure = propagate.propagation_strips([strip, strip])
    assert len(figure.axes) == 12
    pixels = rendered(figure)
    one, two = (0.45 * 90 + 0.55 * OBJECT_COLORS[number].astype(float) for number in (0, 1))
    for panels in (figure.axes[:6], figure.axes[6:]):
        above, below = panels[:3], panels[3:]
        assert close(color_at(pixels, above[1], 5, 5), (90, 90, 90))
        for axes, found in ((above[0], two), (below[0], two), (above[1], two), (below[1], (90,) * 3)):
            assert close(color_at(pixels, axes, 25, 30), one)
            assert close(color_at(pixels, axes, 60, 30), found)
        assert close(color_at(pixels, above[2], 25, 30), (90, 90, 90))
    said = [text.get_text() for text in words(figure)]
    assert [said.count(word) for word in ("swan: truth", "a backbone: J&F 12.3")] == [2, 2]
    assert [said.count(f"frame {number}") for number in (0, 4, 9)] == [2, 2, 2]
    # Of frame 4 object 1 is found and 2 is not; where both masks are empty, as in frame 9, J is 1.
    assert [said.count(word) for word in ("given", "J 50", "J 100")] == [2, 2, 2]
    assert_readable(figure)


def test_clips_of_different_lengths_stand_in_one_picture():
    images = [np.full((60, 80, 3), 90, dtype=np.uint8)] * 4
    masks = [quarters([[0, 1], [0, 0]])] * 4
    long = propagate.Strip("long", [0, 1, 2, 3], images, masks, [propagate.Carried("x", masks)])
    short = propagate.Strip("short", [0, 1, 2], images[:3], masks[:3], [propagate.Carried("x", masks[:3])])
    figure = propagate.propagation_strips([long, short])
    assert [bool(axes.images) for axes in figure.axes] == [True] * (8 + 6)
    assert_readable(figure)


def test_the_clip_s_figures_are_those_of_the_protocol(tmp_path):
    scenes.moving_clips(tmp_path, clips=2, frames=6)
    (tmp_path / "val.txt").write_text("clip1\n")
    backbone = load_backbone("random:test_resnet")
    record = run_protocol("propagate", backbone.model, backbone.preprocessing, tmp_path)
    (tmp_path / "val.txt").write_text("clip0\nclip1\n")
    common = ("--model", "random:test_resnet", "--data", tmp_path)
    figure = propagate.draw(arguments(propagate, *common, "--clip", "clip1", "--shown", 3))
    said = [text.get_text() for text in words(figure)]
    values = (record.metrics[name] for name in ("J&F", "J", "F"))
    assert "random:test_resnet: J&F {:.1f} % (J {:.1f}, F {:.1f})".format(*values) in said
    assert [word for word in said if word.startswith("frame")] == ["frame 0", "frame 2", "frame 5"]
    assert np.array_equal(
        figure.axes[1].images[0].get_array()[90:],  # below the objects is the frame itself
        np.array(Image.open(tmp_path / "JPEGImages" / "clip1" / "00002.png"))[90:],
    )
    above, below = (panel.images[0].get_array() for panel in (figure.axes[0], figure.axes[3]))
    assert np.array_equal(above, below)  # the first frame's masks are given
    assert not np.array_equal(figure.axes[2].images[0].get_array(), figure.axes[5].images[0].get_array())
    for wrong, message in (
        (("--shown", 1), "--shown is 1; expected at least 2"),
        (("--clip", "clip0", "--clip", "yeti"), "there is no clip 'yeti'; the list has clip0, clip1"),
        (("fine",), "'fine' is not a setting; expected key=value"),
    ):
        with pytest.raises(ValueError, match=message):
            propagate.draw(arguments(propagate, *common, *wrong))


# ---- prototypes ------------------------------------------------------------------------------------------------------


def naive_wins(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, count, height, width = scores.shape
    cosine, cells = np.full((images, count), -np.inf), np.zeros((images, count))
    for image, number in np.ndindex(images, count):
        own = [
            scores[image, number, y, x]
            for y, x in np.ndindex(height, width)
            if all(scores[image, number, y, x] >= scores[image, other, y, x] for other in range(count))
        ]
        cells[image, number] = len(own)
        if own:
            cosine[image, number] = sum(own) / len(own)
    return cosine, cells


def test_a_photo_is_as_near_as_the_cells_that_the_prototype_wins():
    scores = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, 9, 3, 4)))
    found = prototypes.wins_of(scores)
    cosine, cells = naive_wins(scores.numpy())
    assert (cells == 0).any()
    np.testing.assert_allclose(found.cosine.numpy(), cosine)
    np.testing.assert_array_equal(found.cells.numpy(), cells)


@pytest.mark.parametrize("count", [5, 600])
def test_pixels_go_to_the_greatest_score_after_resizing(count):
    torch.manual_seed(0)
    scores = torch.randn(count, 3, 3)
    greatest = F.interpolate(scores[None], size=(20, 20), mode="bilinear")[0].argmax(0)
    for number in greatest.unique().tolist():
        assert np.array_equal(prototypes.won_pixels(scores, number, 20), (greatest == number).numpy())


def color_teacher(size: int = 56) -> prototypes.Teacher:
    """Prototypes that stand for red, green, blue and, never seen, black."""
    bank = Prototypes(4, 3)
    bank.weight.data = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [-1, -1, -1]])
    network = nn.ModuleDict({"backbone": scenes.Colors(), "projector": nn.Identity(), "prototypes": bank})
    return prototypes.Teacher(network, PLAIN, size)


def color_photos(folder: Path) -> list[Path]:
    """Photos whose left part is red and the rest blue; the last is green."""
    paths = []
    for number, left in enumerate((12, 20, 36)):
        image = np.full((64, 64, 3), (20, 20, 220), dtype=np.uint8)
        image[:, :left] = (220 - 40 * number, 20, 20)
        paths.append(folder / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    paths.append(folder / "green.png")
    Image.new("RGB", (64, 80), (20, 220, 20)).save(paths[-1])
    return paths


def test_the_nearest_photos_are_found_and_what_is_won_in_them(tmp_path):
    photos, teacher = color_photos(tmp_path), color_teacher()
    with torch.no_grad():
        _, wins = prototypes.count_wins(teacher, photos)
        red, green, black = (prototypes.nearest(teacher, photos, wins, number, 2) for number in (0, 1, 3))
    assert prototypes.chosen_prototypes(wins, None) == [2, 0, 1]  # by cells; black wins none
    assert red.title.startswith("prototype 0: wins ")
    assert red.title.endswith(" in 3 photos")
    assert [len(row.tiles) for row in (red, green, black)] == [2, 1, 0]
    assert black.title == "prototype 3: wins 0.0 % of the cells, in 0 photos"
    first, second = red.tiles
    assert first.cosine >= second.cosine
    assert first.image.shape == (56, 56, 3)
    assert close(first.image[28, 5], (220, 20, 20))  # the reddest; 4 of its 12 red columns are cut off
    assert first.mask[:, :6].all()
    assert not first.mask[:, 10:].any()
    assert green.tiles[0].mask.all()


def test_a_prototype_s_photos_stand_in_its_row():
    image = np.full((40, 40, 3), (200, 30, 30), dtype=np.uint8)
    mask = np.zeros((40, 40), dtype=bool)
    mask[:20] = True
    tile = prototypes.Tile(image, mask, 0.8125)
    figure = prototypes.nearest_photos([prototypes.Near("no. 3", [tile] * 3), prototypes.Near("no. 17", [tile])], 3)
    assert [bool(axes.images) for axes in figure.axes] == [True, True, True, True, False, False]
    pixels = rendered(figure)
    for axes in figure.axes[:4]:
        assert close(color_at(pixels, axes, 20, 10), (200, 30, 30))
        red, green, blue = color_at(pixels, axes, 30, 30)
        assert red == green == blue > 150
    said = [text.get_text() for text in words(figure)]
    assert said.count("0.81") == 4
    for label, axes in (("no. 3", figure.axes[0]), ("no. 17", figure.axes[3])):
        text = next(text for text in words(figure) if text.get_text() == label)
        assert 0 < text.get_window_extent().y0 - axes.bbox.y1 < 10  # just above its row
    assert_readable(figure)


@pytest.fixture(scope="module")
def slotcon_run(tmp_path_factory) -> Path:
    small = {"global_size": 64, "projector_hidden": 8, "feature_dim": 8, "prototypes": 12}
    return save_run(tmp_path_factory.mktemp("slotcon") / "run", "slotcon", small)


def test_prototypes_of_a_run_are_drawn_from_the_command_line(slotcon_run, made_photos):
    given = arguments(prototypes, slotcon_run, "--data", made_photos, "--size", 64, "--top", 3)
    figure = prototypes.draw(given)
    rows = [text.get_text() for text in figure.texts if text.get_text().startswith("prototype ")]
    assert 1 <= len(rows) <= 8
    assert_readable(figure)
    given.prototypes = [11, int(rows[0].split()[1].rstrip(":"))]
    asked = [text.get_text() for text in prototypes.draw(given).texts][:2]
    assert asked[0].startswith("prototype 11: ")
    assert asked[1] == rows[0]


def test_a_wrong_run_or_number_is_named(slotcon_run, made_photos, tmp_path):
    other = save_run(tmp_path / "other", "pixpro", {"global_size": 64, "projector_hidden": 8, "feature_dim": 8})
    with pytest.raises(
        ValueError, match="other is of the method pixpro, which has no prototypes: give the folder of a run of slotcon"
    ):
        prototypes.draw(arguments(prototypes, other, "--data", made_photos))
    with pytest.raises(ValueError, match=r"is not a source of weights"):
        prototypes.draw(arguments(prototypes, tmp_path, "--data", made_photos))
    with pytest.raises(ValueError, match=r"--prototypes 12: the run has 12, numbered from 0 to 11"):
        prototypes.draw(arguments(prototypes, slotcon_run, "--data", made_photos, "--size", 64, "--prototypes", 12))
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        prototypes.draw(arguments(prototypes, slotcon_run, "--data", tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"--top is 0; expected at least 1"):
        prototypes.draw(arguments(prototypes, slotcon_run, "--data", made_photos, "--top", 0))
