"""Figures: what is where in the picture, and what the command says to bad input."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from rendering import CLOVE, EVALUATIONS, arguments, assert_readable, close, color_at, rendered, save_run
from torch.nn import functional as F

from clove_hub.backbones import feature_map
from clove_hub.cli import main
from clove_hub.data.images import read_image
from clove_hub.evaluation.reading import normalized
from clove_hub.figures import FIGURES, attention, compare, matches, pca
from clove_hub.figures.photos import Photo, cell_of, found_photos, middle_of, seen, whole_square
from clove_hub.methods import METHODS
from clove_hub.views import View, ViewSpec
from clove_hub.weights import load_backbone, load_method

SMALL = {"global_size": 128, "local_size": 64, "projector_hidden": 8, "feature_dim": 8, "attention_heads": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of CLoVE with three rows and two evaluations."""
    folder = save_run(tmp_path_factory.mktemp("clove") / "run", "clove", SMALL)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CLOVE))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EVALUATIONS))
    return folder


# ---- the command -----------------------------------------------------------------------------------------------------


def test_every_kind_says_what_it_shows_and_what_it_needs():
    for kind in FIGURES:
        module = import_module(f"clove_hub.figures.{kind.replace('-', '_')}")
        assert module.__doc__
        assert callable(module.draw)
        with pytest.raises(SystemExit):  # each needs something
            arguments(module)


def test_the_list_of_kinds_is_read_without_the_heavy_libraries():
    code = "import sys, clove_hub.figures.command; sys.exit(bool({'torch', 'matplotlib', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_a_figure_is_written_with_the_same_bytes_each_time(run, tmp_path, ending, capsys):
    for name in ("one", "other"):
        assert main(["figures", "curves", str(run), "--out", str(tmp_path / f"{name}{ending}"), "--dpi", "50"]) == 0
    one, other = ((tmp_path / f"{name}{ending}").read_bytes() for name in ("one", "other"))
    assert one == other
    assert one.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending])
    assert f"-> {tmp_path / 'one'}{ending}" in capsys.readouterr().out


def test_pixels_per_inch_are_as_asked_for(run, tmp_path):
    main(["figures", "curves", str(run), "--out", str(tmp_path / "x.png"), "--dpi", "50"])
    assert Image.open(tmp_path / "x.png").width == 360  # 7.2 inches


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--out": "x.jpg"}, "expected a name that ends in .png, .svg, .pdf"),
        ({"--out": "nowhere/x.png"}, "the folder nowhere does not exist; create it first"),
        ({"--dpi": "1"}, "expected 10 to 2400"),
        ({"--width": "1"}, "--width 1: expected 3.0 to 20.0 inches"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, changes, said, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"--out": "x.png"} | changes
    # There is no such run: had it been looked for first, it would be that which is said.
    assert (
        main(["figures", "attention", "no-run", "--data", "x.jpg", *(word for pair in given.items() for word in pair)])
        == 2
    )
    assert said in capsys.readouterr().err


def test_an_unknown_kind_is_refused_and_the_kinds_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["figures", "piechart", "--out", "x.png"])
    assert "'curves'" in capsys.readouterr().err.replace("curves,", "'curves'")


@pytest.mark.parametrize(
    "given",
    [
        ("curves", "RUN"),
        ("matches", "RUN", "--views", "0", "3"),
        ("attention", "RUN", "--points", "0.1,0.9", "--size", "64"),
        ("pca", "--model", "RUN", "--size", "64", "--level", "-2"),
        ("compare", "--model", "RUN", "random:test_resnet", "--names", "trained", "random", "--size", "64"),
    ],
)
def test_each_kind_draws_a_run_from_the_command_line(run, made_photos, tmp_path, given):
    words = [str(run) if word == "RUN" else word for word in given]
    data = [] if given[0] == "curves" else ["--data", str(made_photos), "--photos", "2"]
    assert main(["figures", *words, *data, "--out", str(tmp_path / "x.png"), "--dpi", "60"]) == 0
    assert np.array(Image.open(tmp_path / "x.png").convert("L")).std() > 10


def test_a_folder_that_is_no_run_is_named(tmp_path, made_photos, capsys):
    for kind in ("curves", "matches", "attention"):
        data = [] if kind == "curves" else ["--data", str(made_photos)]
        assert main(["figures", kind, str(tmp_path), *data, "--out", str(tmp_path / "x.png")]) == 2
        assert str(tmp_path) in capsys.readouterr().err


# ---- matched cells ---------------------------------------------------------------------------------------------------


def test_matched_cells_that_are_nearest_to_each_other_have_the_same_number():
    match = torch.tensor([[True, False, True], [False, False, False], [False, False, True]])
    distance = torch.tensor([[0.1, 9, 0.3], [0, 0, 0], [9, 9, 0.2]])
    queries, keys = matches.cell_numbers(match, distance)
    assert queries == [1, None, 2]
    assert keys == [1, None, 2]
    distance[2, 2] = 0.4  # now the last key is nearer to the first query, which is nearer to the first key
    assert matches.cell_numbers(match, distance) == ([1, None, None], [1, None, None])


@pytest.mark.parametrize("seed", range(20))
def test_every_number_stands_once_in_either_view(seed):
    random = torch.Generator().manual_seed(seed)
    match, distance = torch.rand(16, 25, generator=random) < 0.1, torch.rand(16, 25, generator=random)
    queries, keys = ([number for number in own if number] for own in matches.cell_numbers(match, distance))
    assert queries == sorted(keys) == list(range(1, len(queries) + 1))
    assert queries


def test_distances_between_cells_are_those_of_their_centers_in_the_photo():
    boxes = torch.tensor([[0.0, 0, 1, 1], [1.0, 0, 0, 1]])  # the second is flipped
    distance = matches.center_distances(boxes, [(2, 2), (1, 2)])
    assert distance.shape == (4, 2)
    assert distance[1].tolist() == pytest.approx([0.25, np.hypot(0.5, 0.25)])  # upper right to right half, to left half


def test_matched_cells_are_tinted_and_the_others_dark():
    spec = ViewSpec((View(size=64, scale=(0.2, 0.6), gray=0.0),) * 2)
    white = np.full((90, 120, 3), 255, dtype=np.uint8)
    figure = matches.matched_cells([white], spec, (0, 1), [(4, 4), (4, 4)], 0.7)
    pixels = rendered(figure)
    whole, left, right = figure.axes
    assert len(whole.patches) == 2  # the crops
    for axes in (left, right):
        numbered = {(text.get_position(), text.get_text()) for text in axes.texts}
        places = {place for place, _ in numbered}
        assert 0 < len(places) < 16
        for row in range(4):
            for column in range(4):
                x, y = 16 * column + 7.5, 16 * row + 7.5
                dark = close(color_at(pixels, axes, x - 5, y - 5), (102, 102, 102))
                assert not (dark and (x, y) in places), (row, column)
    assert {text.get_text() for text in right.texts} == {text.get_text() for text in left.texts}
    assert_readable(figure)


def test_cells_without_room_for_numbers_have_none():
    spec = ViewSpec((View(size=64, scale=(0.2, 0.6), gray=0.0),) * 2)
    figure = matches.matched_cells(
        [np.full((90, 120, 3), 255, dtype=np.uint8)], spec, (0, 1), [(16, 16), (16, 16)], 0.7
    )
    assert not figure.axes[1].texts


@pytest.mark.parametrize("views", [(0, 0), (0, 8), (-1, 0)])
def test_views_that_the_run_does_not_have_are_refused(run, made_photos, views):
    with pytest.raises(ValueError, match="expected two different numbers from 0 to 7"):
        matches.draw(arguments(matches, run, "--data", made_photos, "--views", *views))


# ---- attention -------------------------------------------------------------------------------------------------------


def test_attention_is_that_of_the_predictor_on_the_projected_cells(run, made_photos):
    learned = load_method(run)
    image = whole_square(read_image(found_photos([made_photos], 1)[0])).resize((128, 128))
    weights = attention.predictor_attention(learned, Photo("x", image), 128)
    assert weights.shape == (2, 4, 4, 4, 4)
    student = learned.method.student
    pixels = normalized(image, learned.preprocessing.mean, learned.preprocessing.std)[None]
    cells = student["projector"](feature_map(student["backbone"], pixels))[0].flatten(1).T.double()  # (16, 8)
    query, key, _ = (cells @ part.double().T for part in student["predictor"].qkv.weight.split(8))
    for head in range(2):
        q, k = (F.normalize(part[:, 4 * head : 4 * head + 4], dim=1) for part in (query, key))
        expected = ((q @ k.T) / 0.2).exp()
        expected /= expected.sum(1, keepdim=True)
        assert torch.allclose(weights[head].view(16, 16).double(), expected, atol=1e-5)


def one_sided() -> torch.Tensor:
    """Two heads on 4 x 4 cells: all look evenly, but the first from the lower left quarter at the upper left one."""
    weights = torch.full((2, 4, 4, 4, 4), 1 / 16)
    weights[0, 2:, :2] = 0
    weights[0, 2:, :2, :2, :2] = 1 / 4
    return weights


def test_the_brightest_cells_are_those_that_are_looked_at():
    image = np.full((64, 64, 3), (30, 90, 150), dtype=np.uint8)
    figure = attention.attention_maps([image], [one_sided()], [(0.2, 0.8)], 64)
    photo, first, second, scale = figure.axes
    pixels = rendered(figure)
    assert close(color_at(pixels, photo, 10, 10), (30, 90, 150))
    viridis = [np.round(255 * np.array(colormaps["viridis"](value)[:3])) for value in (0.0, 0.25, 1.0)]
    assert close(color_at(pixels, first, 10, 10), viridis[2])  # four times an even share, the most there is
    assert close(color_at(pixels, first, 60, 20), viridis[0])
    assert close(color_at(pixels, second, 10, 10), viridis[1], 6)  # an even share
    assert scale.get_xlim() == pytest.approx((0, 4))
    assert_readable(figure)


def test_a_method_without_attention_is_refused(tmp_path, made_photos):
    other = save_run(tmp_path / "run", "moco", {"global_size": 64, "queue": 8})
    with pytest.raises(ValueError, match="run has no attention heads: give a run of clove"):
        attention.draw(arguments(attention, other, "--data", made_photos))
    with pytest.raises(
        ValueError,
        match="is of the method moco, which has no matched cells: give the folder of a run of clove or pixpro",
    ):
        matches.draw(arguments(matches, other, "--data", made_photos))


def test_a_small_picture_of_attention_is_as_it_was_when_it_was_looked_at():
    """Without words and scale, as fonts differ."""
    gradient = np.stack(np.broadcast_arrays(np.arange(64)[None] * 4, np.arange(64)[:, None] * 4, 128), 2)
    figure = attention.attention_maps([gradient.astype(np.uint8)], [one_sided()], [(0.3, 0.6)], 64)
    for text in [*figure.texts, *(axes.title for axes in figure.axes)]:
        text.set_text("")
    figure.axes[-1].remove()
    found = Image.fromarray(rendered(figure)).resize((180, 80), Image.Resampling.BOX)
    expected = Image.open(Path(__file__).parents[2] / "golden" / "figure_attention.png").convert("RGB")
    difference = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.mean() < 4
    assert np.quantile(difference, 0.95) < 40  # edges may have moved a little


# ---- principal components and comparison -----------------------------------------------------------------------------


def test_components_are_the_eigenvectors_of_the_covariance_of_all_maps():
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(5, 6, 4)) * [[[4]], [[3]], [[2]], [[0.1]], [[0.1]]] for _ in range(2)]
    found = pca.components([torch.from_numpy(one) for one in maps])
    assert [one.shape for one in found] == [(6, 4, 3)] * 2
    flat = np.concatenate([one.reshape(5, -1).T for one in maps])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(np.cov(flat.T))
    scores = (flat - flat.mean(0)) @ vectors[:, :-4:-1]
    for component in range(3):
        own = np.concatenate([one[..., component].numpy().ravel() for one in found])
        inside = (own > 0) & (own < 1)  # two percent at each end are cut off
        assert inside.sum() > 40
        assert abs(np.corrcoef(own[inside], scores[inside, component])[0, 1]) > 0.999999
    assert all(
        torch.equal(a, b) for a, b in zip(found, pca.components([torch.from_numpy(one) for one in maps]), strict=True)
    )


def luminance(color: torch.Tensor) -> torch.Tensor:
    linear = torch.where(color > 0.04045, ((color + 0.055) / 1.055) ** 2.4, color / 12.92)
    return linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=color.dtype)


def test_colors_of_components_are_told_apart_without_red_and_green():
    steps = torch.linspace(0, 1, 9)
    half = torch.full_like(steps, 0.5)
    gray = pca.colors_of(torch.stack([steps, half, half], 1))
    assert torch.allclose(gray, gray.mean(1, keepdim=True).expand(-1, 3), atol=1e-3)  # the first alone is gray
    assert (luminance(gray).diff() > 0.02).all()
    blue, yellow = pca.colors_of(torch.tensor([[0.5, 0.0, 0.5], [0.5, 1.0, 0.5]]))
    assert blue[2] - blue[:2].max() > 0.2
    assert yellow[:2].min() - yellow[2] > 0.2
    green, purple = pca.colors_of(torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 1.0]]))
    assert green[1] > green[0]
    assert purple[0] > purple[1]
    every = pca.colors_of(torch.cartesian_prod(steps, steps, steps))
    assert 0 <= every.min() < every.max() <= 1


def test_the_same_feature_has_the_same_color_below_every_photo():
    first = torch.ones(3, 4, 4)
    first[0, :, 2:] = 5  # the right half
    second = torch.ones(3, 4, 4)
    second[0, :2] = 5  # the upper half
    for number, one in enumerate((first, second)):
        one[1:] += 0.01 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(number))
    photos = [np.full((64, 64, 3), value, dtype=np.uint8) for value in (40, 200)]
    figure = pca.component_maps(
        photos, {"model": pca.components([first, second])}, ["a_photo_with_a_long_name_000000123", "b"], 64
    )
    pixels = rendered(figure)
    above, below = figure.axes[:2], figure.axes[2:]
    assert [color_at(pixels, axes, 32, 32)[0] for axes in above] == [40, 200]
    light = [[color_at(pixels, axes, x, y).sum() for x, y in ((8, 8), (56, 8), (8, 56), (56, 56))] for axes in below]
    bright = np.array(light) > np.mean(light)
    assert bright.tolist() in (
        [[False, True] * 2, [True] * 2 + [False] * 2],
        [[True, False] * 2, [False] * 2 + [True] * 2],
    )
    assert_readable(figure)


def test_similarity_is_the_cosine_to_the_cell_of_the_point_without_the_mean():
    features = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    found = compare.similarity(features, (0.9, 0.1))  # the last column of the first row
    cells = features.flatten(1).T.double().numpy()
    cells = cells - cells.mean(0)
    expected = [cell @ cells[3] / np.linalg.norm(cell) / np.linalg.norm(cells[3]) for cell in cells]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert float(found[0, 3]) == pytest.approx(1)


def test_a_comparison_has_a_row_for_each_backbone_and_two_panels_for_each_photo():
    image = np.full((64, 64, 3), (30, 90, 150), dtype=np.uint8)
    alike = torch.zeros(4, 4)
    alike[:, 2:] = 1
    colors = torch.full((4, 4, 3), 0.5)
    rows = [compare.Found(name, [colors] * 3, [alike] * 3) for name in ("resnet50.clove_in1k_200ep", "random:resnet50")]
    figure = compare.comparison([image] * 3, rows, (0.5, 0.5), 64)
    assert len(figure.axes) == 3 * 6 + 1  # and the scale
    pixels = rendered(figure)
    grid = np.array(figure.axes[:18]).reshape(3, 6)
    for axes in grid[0]:
        assert close(color_at(pixels, axes, 8, 8), (30, 90, 150))
    gray = np.round(255 * pca.colors_of(torch.full((3,), 0.5)).numpy())
    viridis = [np.round(255 * np.array(colormaps["viridis"](value)[:3])) for value in (0.0, 1.0)]
    for components, similar in grid[1:].reshape(-1, 2):
        assert close(color_at(pixels, components, 8, 8), gray)
        assert close(color_at(pixels, similar, 8, 8), viridis[0])
        assert close(color_at(pixels, similar, 56, 8), viridis[1])
    assert [text.get_text() for text in figure.texts][:2] == [row.heading for row in rows]
    assert_readable(figure)


def test_there_are_as_many_names_as_models(made_photos):
    options = arguments(compare, "--model", "random:test_resnet", "--names", "a", "b", "--data", made_photos)
    with pytest.raises(ValueError, match="give a name for each"):
        compare.draw(options)


# ---- photos and runs -------------------------------------------------------------------------------------------------


def test_photos_are_spread_over_the_folder(made_photos, tmp_path):
    assert [path.name for path in found_photos([made_photos], 3)] == ["00.jpg", "12.jpg", "23.jpg"]
    one = made_photos / "05.jpg"
    assert found_photos([one], 3) == [one]
    with pytest.raises(ValueError, match="is not a folder"):
        found_photos([tmp_path / "nowhere"], 3)


@pytest.mark.parametrize(("option", "value", "said"), [("--photos", 0, "at least 1"), ("--size", 0, "at least 1")])
def test_numbers_out_of_range_are_refused(made_photos, option, value, said):
    with pytest.raises(ValueError, match=said):
        pca.draw(arguments(pca, "--model", "random:test_resnet", "--data", made_photos, option, value))


@pytest.mark.parametrize("text", ["0.5", "a,b", "1.5,0", "0.5,0.5,0.5", "nan,0"])
def test_points_outside_the_photo_are_refused(run, made_photos, text, capsys):
    with pytest.raises(SystemExit):
        arguments(attention, run, "--data", made_photos, "--points", text)
    assert text in capsys.readouterr().err


def test_a_point_belongs_to_the_cell_that_shows_it():
    assert cell_of((0.0, 0.99), 4, 2) == (3, 0)
    assert cell_of((1.0, 1.0), 4, 2) == (3, 1)
    assert middle_of((3, 1), 4, 2) == (0.75, 0.875)
    assert cell_of(middle_of((2, 1), 7, 5), 7, 5) == (2, 1)


def test_the_middle_of_a_photo_is_seen_as_the_backbone_wants_it(tmp_path):
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 20:60] = 255
    Image.fromarray(image).save(tmp_path / "x.png")
    photo = Photo("x", whole_square(read_image(tmp_path / "x.png")))
    assert photo.square.size == (40, 40)
    assert photo.shown(64).shape == (40, 40, 3)
    assert photo.shown(20).shape == (20, 20, 3)
    assert np.asarray(photo.at(64))[:, 4:-4].min() > 250
    backbone = load_backbone("random:test_resnet")
    how = backbone.preprocessing
    with torch.no_grad():
        expected = feature_map(backbone.model, normalized(photo.at(64), how.mean, how.std)[None])[0]
    assert torch.allclose(seen(backbone, photo, -1, 64), expected, atol=1e-6)
    assert torch.equal(seen(backbone, photo, -1, 70), seen(backbone, photo, -1, 64))  # the nearest with whole cells


@pytest.mark.parametrize("name", METHODS)
def test_the_method_of_a_run_comes_back_with_its_weights(name, tmp_path):
    small = (
        {"global_size": 64} if name.startswith("moco") else {"global_size": 64, "projector_hidden": 8, "feature_dim": 8}
    )
    if name == "clove":
        small |= {"global_size": 128, "local_size": 64}
    run = save_run(tmp_path / "run", name, small)
    learned = load_method(run)
    torch.manual_seed(1)
    other = load_method(run)  # what is drawn when it is built is overwritten
    assert learned.name == name
    assert not learned.method.training
    pairs = zip(learned.method.state_dict().values(), other.method.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert learned.preprocessing.mean == (0.5, 0.5, 0.5)
