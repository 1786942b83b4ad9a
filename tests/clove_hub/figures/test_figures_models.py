"""Every kind of figure with every kind of network, one and several in a picture, large and small, in every format."""

import re
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image
from rendering import arguments, assert_readable, save_run
from timm.models import VisionTransformer

from clove_hub.cli import main
from clove_hub.figures import FIGURES, attention, compare, matches, output, pca, propagate, prototypes, retrieve
from clove_hub.figures.photos import Photo
from clove_hub.figures.sheet import Row, sheet
from clove_hub.figures.words import printed_width, wrapped
from clove_hub.weights import Backbone, Preprocessing, load_backbone

NETWORKS = {
    "resnet18": {"layers": [1, 1, 1, 1]},
    "vit_tiny_patch16_224": {"depth": 2},
    "convnext_atto": {"depths": [1, 1, 1, 1]},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1, 1, 1], "embed_dim": 24},
    "vit_small_patch14_reg4_dinov2": {"depth": 2},
}
"""With arguments that make a run's checkpoint small."""
RUNS = {
    "clove": {"global_size": 224, "local_size": 112, "projector_hidden": 8, "feature_dim": 8, "attention_heads": 2},
    "slotcon": {"global_size": 224, "projector_hidden": 8, "feature_dim": 8, "prototypes": 12},
}
LONG = "organization/a_rather_long_name-of_a_backbone.clove_in1k_200ep_and_what_else_there_is_to_say_of_it"


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(network) -> Backbone:
    return load_backbone(f"random:{network}")


@pytest.fixture(scope="module")
def photos() -> list[Photo]:
    random = np.random.default_rng(0)
    return [Photo(name, Image.fromarray(scenes.noise(random, 120, 120))) for name in ("a_photo_with_a_long_name", "b")]


@pytest.fixture(scope="module")
def labeled(tmp_path_factory) -> Path:
    return scenes.segmented_images(tmp_path_factory.mktemp("labeled"), 3, 2, size=(64, 96))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return scenes.moving_clips(tmp_path_factory.mktemp("clips"), clips=1, frames=4)


# ---- every network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreground", [False, True])
def test_components_and_resemblance_of_any_network(backbone, photos, foreground):
    for figure in (
        pca.draw_backbones({backbone.name: backbone}, photos, 112, foreground=foreground),
        compare.draw_backbones({backbone.name: backbone}, photos, 112),
    ):
        assert_readable(figure)
        multiple = backbone.multiple
        side = (
            round(112 / multiple)
            * multiple
            * backbone.maps(torch.zeros(1, 3, multiple, multiple))[0].shape[2]
            // multiple
        )
        assert f"({side}×{side} cells)" in figure.texts[0].get_text()


def test_protocols_of_any_network_with_their_own_settings(backbone, labeled, clips):
    models = {backbone.name: backbone}
    assert_readable(retrieve.draw_backbones(models, labeled, {"regions": 3}, images=2))
    assert_readable(propagate.draw_backbones(models, clips, {}, shown=3))


@pytest.mark.parametrize("method", RUNS)
def test_runs_of_any_network(network, method, made_photos, tmp_path):
    run = save_run(tmp_path / "run", method, RUNS[method], network, NETWORKS[network])
    kinds = {"clove": (attention, matches), "slotcon": (prototypes,)}[method]
    for kind in kinds:
        size = () if kind is matches else ("--size", 112)
        assert_readable(kind.draw(arguments(kind, run, "--data", made_photos, "--photos", 2, *size)))


def test_what_needs_a_run_or_a_transformer_says_so_in_a_sentence(network, made_photos, capsys, tmp_path):
    said = {
        "matches": f"random:{network} is only a backbone, which has no matched cells: give the folder of a run of clove or pixpro\n",
        "prototypes": f"random:{network} is only a backbone, which has no prototypes: give the folder of a run of slotcon\n",
    }
    if not network.startswith("vit"):
        said["attention"] = f"random:{network} has no attention heads: give a run of clove, or a vision"
    for kind, sentence in said.items():
        words = ["figures", kind, f"random:{network}", "--data", str(made_photos), "--out", str(tmp_path / "x.png")]
        assert main(words) == 2
        assert f"error: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_attention_of_a_transformer_is_that_of_its_last_block(name, photos):
    backbone = load_backbone(f"random:{name}")
    weights = attention.block_attention(backbone, photos[0], 112)
    block = backbone.model.blocks[-1].attn
    seen = {}
    block.attn_drop.register_forward_hook(lambda _, given, out: seen.setdefault("weights", given[0]))
    block.fused_attn = False  # in which timm multiplies the weights itself
    assert isinstance(backbone.model, VisionTransformer)
    with torch.no_grad():
        backbone.model(photos[0].pixels(backbone, 112))
    prefix, side = backbone.model.num_prefix_tokens, weights.shape[1]
    assert weights.shape == (block.num_heads, side, side, side, side)
    expected = seen["weights"][0, :, prefix:, prefix:]
    assert torch.allclose(weights.reshape(expected.shape), expected, atol=1e-6)
    assert not block._forward_pre_hooks  # the model is left as it was


# ---- the foreground --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_the_edges_are_not(sign):
    """An object of three parts, before a ground whose features point elsewhere."""
    random = torch.Generator().manual_seed(0)
    features = torch.tensor([sign * 5.0, 0, 0, 0, 0])[:, None, None].repeat(1, 12, 12)
    features[:, 3:9, 3:9] = torch.tensor([-sign * 5.0, 0, 0, 0, 0])[:, None, None]
    features[1, 3:9, 3:5], features[2, 3:9, 5:7], features[3, 3:9, 7:9] = 2, 2, 2
    features += 0.01 * torch.randn(features.shape, generator=random)
    (found,) = pca.foreground_components([features])
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[3:9, 3:9] = True
    assert torch.equal(~found.isnan().any(2), inside)
    parts = [found[3:9, columns].reshape(-1, 3).mean(0) for columns in (slice(3, 5), slice(5, 7), slice(7, 9))]
    assert min(float((parts[a] - parts[b]).abs().max()) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.4
    (whole,) = pca.components([features])
    assert not whole.isnan().any()


def test_features_that_are_all_the_same_have_no_foreground():
    (found,) = pca.foreground_components([torch.ones(5, 4, 4)])
    assert found.isnan().all()
    assert_readable(pca.component_maps([np.zeros((8, 8, 3), np.uint8)], {"x": [found]}, ["x"], 64, foreground=True))


# ---- several models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> dict[str, Backbone]:
    plain = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return {LONG: Backbone(scenes.Colors(8), plain, "x"), "patches of 16": Backbone(scenes.Patches(16), plain, "y")}


@pytest.mark.parametrize("width", [3.5, 7.2, 12.0])
def test_several_models_share_photos_places_and_scales(two, photos, width, labeled, clips):
    figures = {
        "pca": pca.draw_backbones(two, photos, 64, width=width),
        "compare": compare.draw_backbones(two, photos, 64, width=width),
        "retrieve": retrieve.draw_backbones(two, labeled, {"regions": 3}, 2, width=width),
        "propagate": propagate.draw_backbones(two, clips, {"level": -1}, shown=3, width=width),
    }
    for figure in figures.values():
        assert_readable(figure)
        assert figure.get_figwidth() <= width + 1e-6
    _, *rows = np.array(figures["pca"].axes).reshape(3, 2)
    for one, other in zip(*rows, strict=True):
        assert one.get_xlim() == other.get_xlim()
        assert one.images[0].get_array().shape[:2] == (8, 8)
        assert other.images[0].get_array().shape[:2] == (4, 4)
        assert one.images[0].get_extent() == other.images[0].get_extent()
        assert one.get_position().x0 == other.get_position().x0
    scaled = [image for axes in figures["compare"].axes[:-1] for image in axes.images if image.get_array().ndim == 2]
    assert len(scaled) == 4
    assert {image.get_clim() for image in scaled} == {(0, 1)}
    titles = [axes.get_title() for axes in figures["retrieve"].axes[:4]]
    assert titles[:2] == ["photo", "truth"]
    assert titles[3].replace("\n", " ") == "patches of 16"
    named = [text.get_text() for text in figures["propagate"].texts if "J&F" in text.get_text()]
    assert len(named) == 2


def test_models_are_given_one_by_one_or_together_and_their_names_differ(made_photos, tmp_path):
    options = ("--data", made_photos, "--photos", 2, "--size", 64)

    def headings(*given: object) -> list[str]:
        return [text.get_text() for text in pca.draw(arguments(pca, *given, *options)).texts[:-1]]

    resnet, vit = "random:test_resnet", "random:test_vit"
    together = headings("--model", resnet, vit)
    assert together == headings("--model", resnet, "--model", vit)
    assert [heading.partition(" (")[0] for heading in together] == [resnet, vit]
    assert headings("--model", resnet, "--model", vit, "--names", "a", "b")[1].startswith("b (")
    with pytest.raises(ValueError, match="called x, x: give different --names"):
        headings("--model", resnet, vit, "--names", "x", "x")
    with pytest.raises(ValueError, match="called random:test_resnet, random:test_resnet: give different --names"):
        headings("--model", resnet, resnet)


# ---- cells, words and formats ----------------------------------------------------------------------------------------


def test_cells_are_drawn_as_they_are(two, photos):
    figure = pca.draw_backbones(two, photos, 64)
    assert {image.get_interpolation() for axes in figure.axes[2:] for image in axes.images} == {"nearest"}
    assert "not smoothed" in figure.texts[-1].get_text()


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("inches", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("text", [LONG, "word " * 30, "x" * 200, "n02096294_Australian_terrier", "$a_b$ 写真", ""])
def test_broken_lines_fit_and_lose_nothing_but_what_the_ellipsis_says(text, inches):
    broken = wrapped(text, inches, lines=3)
    lines = broken.split("\n")
    assert len(lines) <= 3
    assert all(printed_width(line) <= inches for line in lines)
    if not broken.endswith("…"):
        assert broken.replace("\n", "").replace(" ", "") == text.replace(" ", "")


def test_numbers_are_not_broken_at_their_point():
    assert wrapped("mean J 56.8, F 47.4", printed_width("mean J 56.")) == "mean J\n56.8, F\n47.4"


def test_names_are_no_formulas():
    """Of two dollars matplotlib would make a formula, or stop at one that it cannot read."""
    on = sheet([Row([1], "$\\frac$ and $", ["$\\bad{$"])], note="$\\worse$")
    assert_readable(on.figure)
    assert on.figure.texts[0].get_text() == "$\\frac$ and $"


@pytest.mark.parametrize("kind", ["pca", "compare"])
def test_a_pdf_embeds_truetype_fonts_and_an_svg_draws_its_words(kind, made_photos, tmp_path):
    words = ["figures", kind, "--model", "random:test_resnet", "--data", str(made_photos), "--photos", "2"]
    for ending in (".pdf", ".svg"):
        assert main([*words, "--size", "64", "--dpi", "50", "--out", str(tmp_path / f"x{ending}")]) == 0
    assert embedded_fonts((tmp_path / "x.pdf").read_bytes()) == {"Type0", "CIDFontType2"}  # not Type 3
    drawing = (tmp_path / "x.svg").read_text()
    assert "<text" not in drawing  # which would need a font
    assert drawing.count('xlink:href="#DejaVuSans') > 20 or drawing.count("<use") > 20


def embedded_fonts(pdf: bytes) -> set[str]:
    """The types of the fonts that a PDF uses, all of which must be in it."""
    objects = dict(re.findall(rb"(?ms)^(\d+) 0 obj\n(.*?)^endobj", pdf))
    fonts = {
        re.search(rb"/Subtype /(\w+)", body)[1]
        for body in objects.values()
        if b"/Type /Font\n" in body or b"/Type /Font " in body
    }
    descriptors = [body for body in objects.values() if b"/Type /FontDescriptor" in body]
    assert descriptors
    for body in descriptors:
        file = re.search(rb"/FontFile2 (\d+) 0 R", body)
        assert file, body
        assert len(objects[file[1]]) > 1000
    return {name.decode() for name in fonts}


def test_a_file_without_a_known_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a name that ends in"):
        output.save(sheet([Row([1])]).figure, tmp_path / "x.bmp")


def test_the_page_of_figures_does_what_it_says(made_photos, tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs/figures/README.md").read_text()
    kinds = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert set(kinds) == set(FIGURES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(made_photos)
    (command,) = re.findall(r"^```bash\nclove-hub (.*?)\n```", page, re.MULTILINE)
    assert main([*command.split(), "--size", "64", "--photos", "2"]) == 0
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "pca.pdf").unlink()
    exec(code.replace("runs/my_photos", "random:test_resnet").replace("limit=5", "limit=1"), {})
    assert (tmp_path / "pca.pdf").is_file()
