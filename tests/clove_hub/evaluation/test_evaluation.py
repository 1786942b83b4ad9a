"""Evaluation: results, backbones, the command, and the protocols that look at whole images or need no labels."""

import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scenes
import timm
import torch
import yaml
from PIL import Image
from torch import distributed as dist
from torch import multiprocessing as mp

from clove_hub import evaluate
from clove_hub.cli import main
from clove_hub.evaluation import PROTOCOLS, result
from clove_hub.evaluation.correspond import count_found
from clove_hub.evaluation.reading import central_square, in_threads
from clove_hub.evaluation.run import find_protocol, make_settings, run_protocol
from clove_hub.geometry import cell_centers
from clove_hub.weights import Backbone, Preprocessing, load_backbone
from clove_hub.weights.backbone import padded, with_stride_one

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    return scenes.class_images(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def segmented(tmp_path_factory) -> Path:
    return scenes.segmented_images(tmp_path_factory.mktemp("segmented"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return scenes.moving_clips(tmp_path_factory.mktemp("clips"), clips=3, frames=4)


@pytest.fixture(scope="module")
def distant(tmp_path_factory) -> Path:
    return scenes.distant_blocks(tmp_path_factory.mktemp("distant"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return scenes.keypoint_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def boxed(tmp_path_factory) -> Path:
    return scenes.boxed_objects(tmp_path_factory.mktemp("boxed"))


SMALL = {
    "correspond": ("segmented", {"size": 64, "batch": 3}),
    "knn": ("classes", {"neighbors": (3, 5), "batch": 5}),
    "linear-svm": ("classes", {"resize": 32, "crop": 32, "batch": 5}),
    "dense-probe": ("segmented", {"height": 64, "width": 96, "epochs": 2, "seeds": 3, "batch": 4}),
    "linear-seg": ("segmented", {"steps": 3, "batch": 2, "crop": 64}),
    "in-context": ("segmented", {"size": 64, "neighbors": 5}),
    "cluster": ("segmented", {"size": 64, "clusters": [0, 5], "seeds": 2}),
    "retrieve": ("segmented", {"regions": 4}),
    "propagate": ("clips", {"context": 2}),
    "depth": ("distant", {"crop": [64, 96], "steps": 6, "batch": 3, "seeds": 2}),
    "match": ("pairs", {"size": 64}),
    "discover": ("boxed", {"patches": 4}),
}
"""Every protocol in miniature: the fixture with its data, and settings."""


# ---- every protocol --------------------------------------------------------------------------------------------------


def test_every_protocol_is_tried_here():
    assert SMALL.keys() == PROTOCOLS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_protocol_leaves_no_trace_and_says_the_same_twice(name, request):
    """Random numbers, modes, parameters, buffers and gradients are to the bit what they were."""
    fixture, settings = SMALL[name]
    data = request.getfixturevalue(fixture)
    model = scenes.small_resnet().train()
    model.layer1.eval()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    model.layer2.requires_grad_(False)

    def state():
        tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        rest = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        numpy_state = np.random.get_state()  # noqa: NPY002  # the state that must not change
        return (
            tensors,
            gradients,
            rest,
            torch.get_rng_state(),
            numpy_state[1].tolist(),
            numpy_state[2],
            random.getstate(),
        )

    before = state()
    first = run_protocol(name, model, PLAIN, data, settings, seed=3, what="small")
    after = state()
    for old, new in zip(before[0].items(), after[0].items(), strict=True):
        assert old[0] == new[0]
        assert torch.equal(old[1], new[1]), old[0]
    for old, new in zip(before[1], after[1], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])
    assert before[4:] == after[4:]

    torch.manual_seed(12345)  # whatever the state, the seed alone decides
    second = run_protocol(name, model, PLAIN, data, settings, seed=3, what="small")
    assert dataclasses.replace(second, date=first.date, seconds=first.seconds) == first
    assert (first.protocol, first.model) == (name, "small")
    assert first.settings.keys() >= settings.keys()
    assert first.seeds[0] == 3
    assert len(first.data.fingerprint) == 64


FAMILIES = (
    "vit_tiny_patch16_224",
    *(
        pytest.param(one, marks=pytest.mark.slow)
        for one in ("resnet18", "convnext_atto", "swin_tiny_patch4_window7_224")
    ),
)
OWN_SIZE = {"linear-svm": {"resize": 72, "crop": 64}, "knn": {}}
"""Settings of protocols that show whole images at a size of their own."""


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_protocol_takes_every_family_by_its_defaults(architecture, name, request):
    """What is chosen by the architecture (the level, a finer map) is not said here; it never fails."""
    fixture, settings = SMALL[name]
    source = f"random:{architecture}"
    settings = settings | OWN_SIZE.get(name, {})
    record = evaluate(name, source, request.getfixturevalue(fixture), device="cpu", **settings)
    assert record.architecture == architecture
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.settings.keys() == {field.name for field in dataclasses.fields(find_protocol(name).Settings)}


def one_of_two(rank: int, folder: str, data: dict[str, str]) -> None:
    """Every protocol in a process group, and one on broken data; what came of it goes into `RANK.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, (fixture, settings) in SMALL.items():
        record = run_protocol(name, scenes.small_resnet(), PLAIN, data[fixture], settings, 1)
        found[name] = [record.metrics, record.deviations, record.data.samples, list(record.seeds)]
    try:
        run_protocol("dense-probe", scenes.small_resnet(), PLAIN, data["broken"], SMALL["dense-probe"][1])
    except ValueError as error:
        found["broken"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(classes, segmented, clips, distant, pairs, boxed, tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("together")
    broken = scenes.segmented_images(folder / "broken")
    (broken / "labels" / "train5.png").write_bytes(b"torn")  # in the second batch, which the second process reads
    data = {"classes": classes, "segmented": segmented, "clips": clips, "broken": broken}
    data |= {"distant": distant, "pairs": pairs, "boxed": boxed}
    mp.start_processes(
        one_of_two, args=(str(folder), {k: str(v) for k, v in data.items()}), nprocs=2, start_method="forkserver"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_two_processes_say_what_one_says(name, together, request):
    first, second = (found[name] for found in together)
    assert first == second
    fixture, settings = SMALL[name]
    alone = run_protocol(name, scenes.small_resnet(), PLAIN, request.getfixturevalue(fixture), settings, 1)
    assert first == [alone.metrics, alone.deviations, alone.data.samples, list(alone.seeds)]


def test_an_error_of_one_process_is_the_error_of_all(together):
    first, second = (found["broken"] for found in together)
    assert first == second
    assert "train5.png cannot be read" in first


def test_settings_are_checked(segmented):
    with pytest.raises(ValueError, match=r"no protocol 'dense_probe' .did you mean 'dense-probe'"):
        make_settings("dense_probe", {})
    with pytest.raises(ValueError, match=r"unknown key dense-probe.epoch .did you mean 'epochs'"):
        make_settings("dense-probe", {"epoch": 3})
    with pytest.raises(ValueError, match=r"dense-probe.epochs='many' is a str, expected int"):
        make_settings("dense-probe", {"epochs": "many"})
    with pytest.raises(ValueError, match=r"train_images=1\.5 is a float, expected int or null"):
        make_settings("dense-probe", {"train_images": 1.5})
    with pytest.raises(ValueError, match="epochs=True is a bool"):
        make_settings("dense-probe", {"epochs": True})
    with pytest.raises(ValueError, match="must be positive"):
        make_settings("dense-probe", {"epochs": 0})
    assert make_settings("dense-probe", {"levels": [-1, -2], "learning_rate": 1}).levels == (-1, -2)
    assert make_settings("dense-probe", {"levels": -2}).levels == (-2,)
    with pytest.raises(ValueError, match="seed is -1"):
        run_protocol("correspond", scenes.Patches(), PLAIN, segmented, seed=-1)
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        run_protocol("correspond", scenes.Patches(), PLAIN, "nowhere")


@pytest.mark.parametrize("name", SMALL)
def test_every_protocol_has_a_page_of_its_version_and_settings(name):
    page = (Path(__file__).parents[3] / "docs" / "protocols" / f"{name}.md").read_text()
    protocol = find_protocol(name)
    assert f"# {name}\n\n*Version {protocol.VERSION}, rule `{protocol.RULE}`.*" in page
    table = page[page.index("| setting |") :].splitlines()[2:]
    documented = {key.strip(): yaml.safe_load(value) for _, key, value, *_ in (line.split("|") for line in table)}
    defaults = {field.name: field.default for field in dataclasses.fields(protocol.Settings)}
    assert documented == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}
    assert f"[{name}]({name}.md)" in (Path(__file__).parents[3] / "docs" / "protocols" / "README.md").read_text()


def test_the_table_of_protocols_is_there_without_torch():
    code = "import sys, clove_hub.evaluation.command; print('torch' in sys.modules, 'sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- the data --------------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_files_and_not_their_place(tmp_path):
    prints = []
    for name, change in (("a", None), ("b", None), ("c", b"different")):
        folder = scenes.class_images(tmp_path / name, train=2, val=1, classes=2)
        if change:
            (folder / "train" / "class0" / "new.png").write_bytes((folder / "train" / "class0" / "0.png").read_bytes())
        prints.append(run_protocol("knn", scenes.Colors(), PLAIN, folder, {}).data.fingerprint)
    assert prints[0] == prints[1] != prints[2]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(classes, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["knn", "--model", "random:test_resnet", "--data", str(classes), "neighbors=3", "--json", str(out)]
    assert main(["evaluate", *arguments, "--device", "cpu", "--seed", "2"]) == 0
    said = capsys.readouterr().out
    found = result.read(out)
    assert f"{found.metrics['top1']:.2f}" in said
    assert "random:test_resnet, knn v2 by the rule wu2018, 12 samples" in said
    assert (found.settings["neighbors"], found.seeds, found.model) == ([3], (2,), "random:test_resnet")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["kn", "--model", "random:test_resnet"], "did you mean 'knn'"),
        (
            ["knn", "--model", "resnet1800"],
            "'resnet1800' does not exist (did you mean resnet18",
        ),
        (["knn", "--model", "random:resnet1800"], "is not an architecture of timm"),
        (["knn", "--model", "random:test_resnet", "neighbors"], "'neighbors' is not a setting; expected key=value"),
        (["knn", "--model", "random:test_resnet", "neighbors=[1"], "neighbors='[1' is not valid YAML"),
        (["knn", "--model", "random:test_resnet", "--device", "abacus"], "--device abacus"),
    ],
)
def test_the_command_refuses_with_a_reason(arguments, expected, classes, capsys):
    assert main(["evaluate", *arguments, "--data", str(classes)]) == 2
    assert expected in capsys.readouterr().err


def test_evaluate_is_a_command_of_clove_hub(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "dense-probe" in capsys.readouterr().out


# ---- the backbone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "output_stride", "level"), [("layer4", 16, -1), ("layer3", 8, -2)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_stage_with_stride_one_is_the_dilated_network_of_timm(name, stage, output_stride, level):
    model = timm.create_model(name, num_classes=0).eval()
    dilated = timm.create_model(name, num_classes=0, output_stride=output_stride).eval()
    dilated.load_state_dict(model.state_dict())
    pixels = torch.randn(1, 3, 64, 96)
    ours, theirs = (
        Backbone(m, PLAIN, name).maps(pixels, (level,))[0] for m in (with_stride_one(model, stage), dilated)
    )
    assert torch.equal(ours, theirs)
    assert ours.shape[2:] == (64 // output_stride, 96 // output_stride)
    assert model.forward_features(pixels).shape[2:] == (2, 3)  # the model itself is as before


def test_a_network_that_cannot_be_dilated_is_refused():
    for name in ("test_resnet", "test_convnext"):
        with pytest.raises(ValueError, match="not a ResNet of plain blocks, whose layer4"):
            with_stride_one(timm.create_model(name, num_classes=0), "layer4")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_levels_of_any_model_count_from_the_last(name):
    backbone = load_backbone(f"random:{name}") if name != "test_vit" else None
    if backbone is None:  # it has no feature map for pre-training, but it has levels
        backbone = Backbone(timm.create_model(name, num_classes=0).eval(), PLAIN, name)
    pixels = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        last, before = backbone.maps(pixels, (-1, -2))
        assert torch.equal(backbone.maps(pixels)[0], last)
        assert torch.equal(backbone.maps(pixels, (-2,))[0], before)
        assert backbone.pooled(pixels).ndim == 2
    assert last.shape[0] == 2
    assert before.shape[2] >= last.shape[2]
    with pytest.raises(ValueError, match=rf"{name} has \d+ feature levels.*asked for -99"):
        backbone.maps(pixels, (-99,))


def test_a_size_that_a_model_does_not_take_is_an_error_with_the_size():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).eval()
    with pytest.raises(ValueError, match=r"vit cannot take images of 96x64 pixels: .*224"):
        Backbone(model, PLAIN, "vit").maps(torch.zeros(1, 3, 64, 96))


def test_padding_repeats_the_border_to_a_multiple():
    pixels = torch.arange(12.0).view(1, 1, 3, 4)
    wide = padded(pixels, 4)
    assert wide.shape == (1, 1, 4, 4)
    assert torch.equal(wide[0, 0, :3], pixels[0, 0])
    assert torch.equal(wide[0, 0, 3], pixels[0, 0, 2])
    assert padded(torch.zeros(1, 1, 32, 64)).shape == (1, 1, 32, 64)


# ---- correspond ------------------------------------------------------------------------------------------------------


def naive_found(queries, keys, query_box, key_box, distance):
    """Cells found, cells with a match, and the expectation by chance, cell by cell in float64."""
    found = matched = chance = 0.0
    grids = [tuple(m.shape[1:]) for m in (queries, keys)]
    centers = []
    for box, (height, width) in zip((query_box, key_box), grids, strict=True):
        x0, y0, x1, y1 = map(float, box)
        xs = [x0 + (x1 - x0) * (i + 0.5) / width for i in range(width)]
        ys = [y0 + (y1 - y0) * (i + 0.5) / height for i in range(height)]
        centers.append([(x, y) for y in ys for x in xs])
    diagonal = max(
        np.hypot((float(b[2]) - float(b[0])) / g[1], (float(b[3]) - float(b[1])) / g[0])
        for b, g in zip((query_box, key_box), grids, strict=True)
    )
    flat = [m.double().flatten(1).T.numpy() for m in (queries, keys)]
    for (x, y), feature in zip(centers[0], flat[0], strict=True):
        matches = [np.hypot(x - u, y - v) < distance * diagonal for u, v in centers[1]]
        cosines = [feature @ key / np.linalg.norm(feature) / np.linalg.norm(key) for key in flat[1]]
        if any(matches):
            matched += 1
            found += matches[int(np.argmax(cosines))]
            chance += np.mean(matches)
    return found, matched, chance


def test_cells_found_are_those_of_a_count_by_hand():
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 5, 4, 3), torch.randn(3, 5, 2, 5)
    boxes = torch.tensor([[[0.1, 0.2, 0.8, 0.9], [0.7, 0.1, 0.2, 0.8]]] * 3) + 0.05 * torch.rand(3, 2, 4)
    counts = count_found(queries, keys, boxes[:, 0], boxes[:, 1], 0.7)
    for row, *pair in zip(counts, queries, keys, boxes[:, 0], boxes[:, 1], strict=True):
        assert row.tolist() == pytest.approx(naive_found(*pair, 0.7))
    assert float(counts[:, 1].min()) > 0


def test_features_that_are_the_place_find_every_cell():
    boxes = torch.tensor([[0.1, 0.1, 0.9, 0.8], [0.7, 0.0, 0.2, 0.9]])  # the second is mirrored

    def places(box, grid):
        x, y = cell_centers(box, grid)
        flat = torch.cartesian_prod(y, x)  # on a sphere, so that near by the cosine is near in the image
        return torch.stack([flat[:, 0], flat[:, 1], (4 - flat.square().sum(1)).sqrt()]).view(3, *grid)

    maps = [places(boxes[0], (7, 7))[None], places(boxes[1], (7, 7))[None]]
    right, matched, chance = count_found(*maps, boxes[:1], boxes[1:], 0.7)[0].tolist()
    assert right == matched > 10
    assert chance < 0.2 * matched
    unflipped = boxes[1:, [2, 1, 0, 3]]
    right, matched, _ = count_found(*maps, boxes[:1], unflipped, 0.7)[0].tolist()
    assert right < matched


def test_correspond_knows_a_photo_whose_colors_are_its_places(tmp_path):
    rows, columns = np.mgrid[0:160, 0:200] / np.array([160, 200])[:, None, None]
    third = np.sqrt(np.clip(2 - rows**2 - columns**2, 0, None))
    image = np.stack([rows, columns, third], 2) / np.sqrt(2)
    for number in range(6):
        Image.fromarray(np.rint(255 * image).astype(np.uint8)).save(tmp_path / f"{number}.png")
    direct = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    settings = {"size": 64, "color": False}
    found = run_protocol("correspond", scenes.Colors(), direct, tmp_path, settings).metrics
    assert found["correspond"] > 99
    assert found["chance"] < 10

    class Constant(scenes.Colors):
        def forward_features(self, pixels):
            return torch.ones_like(super().forward_features(pixels))

    blind = run_protocol("correspond", Constant(), direct, tmp_path, settings).metrics
    assert blind["correspond"] < 20
    assert blind["chance"] == pytest.approx(found["chance"])  # the same pairs of views


def test_correspond_takes_photos_spread_over_the_folder(segmented):
    few = run_protocol("correspond", scenes.Colors(), PLAIN, segmented / "images", {"size": 32, "images": 3})
    assert few.data.samples == 3


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_are_loaded_in_order_and_errors_come_through():
    assert list(in_threads(lambda x: x * 2, [[1, 2], [3, 4], [5]])) == [[2, 4], [6, 8], [10]]
    assert list(in_threads(lambda x: x, [])) == []

    def fail(x):
        raise ValueError(f"{x} is torn")

    with pytest.raises(ValueError, match="1 is torn"):
        list(in_threads(fail, [[1]]))


def test_the_central_square_is_that_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(scenes.noise(np.random.default_rng(0), 61, 83))
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(48, bicubic), transforms.CenterCrop(40)])(image)
    difference = np.array(central_square(image, 48, 40, "bicubic")).astype(int) - np.array(theirs)
    assert np.abs(difference).max() <= 40  # the longer side is rounded, not cut off: half a pixel at most
    square = image.resize((50, 50))
    assert np.array_equal(
        central_square(square, 48, 40, "bicubic"),
        transforms.Compose([transforms.Resize(48, bicubic), transforms.CenterCrop(40)])(square),
    )
