"""Revisiting's FCN (Van Gansbeke et al. 2021) against numbers and facts of its released code (tests/golden)."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from fine_tuning import SEGMENTER, downstream
from torch import nn

from clove_hub.evaluation.result import read
from clove_hub.training.finetune import crops, dataset, fine_tune, schedule
from clove_hub.training.finetune.forms import SquashedImages, SteppedCrops
from clove_hub.training.finetune.settings import read_settings
from clove_hub.weights import load

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")
pytest_plugins = ["downstream_fixtures"]

FACTS = json.loads((Path(__file__).parents[2] / "golden" / "fcn_shapes.json").read_text())["revisiting_fcn"]
IMAGES = {"voc": 10_582, "cityscapes": 2975}
CLASSES = {"voc": 21, "cityscapes": 19}


@pytest.fixture(scope="module", params=IMAGES)
def case(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(case) -> nn.Module:
    from clove_hub.training.finetune import networks

    settings = read_settings("segmentation", [], f"fcn_revisiting_{case}")
    return networks.build(load("random:resnet50"), settings, CLASSES[case], 0).eval()


def released_name(name: str) -> str:
    """torchvision's name of a module or tensor of the backbone, decoder.N of the head."""
    return re.sub(r"^head\.", "decoder.", name.removeprefix("backbone.body."))


# ---- the network -----------------------------------------------------------------------------------------------------


def test_the_convolutions_are_the_released_ones(case, network):
    facts = FACTS[case]["convolutions"]
    ours = {
        released_name(name): {
            "shape": list(conv.weight.shape),
            "stride": conv.stride[0],
            "padding": conv.padding[0],
            "dilation": conv.dilation[0],
            "bias": conv.bias is not None,
        }
        for name, conv in network.named_modules()
        if isinstance(conv, nn.Conv2d)
    }
    assert {name: value for name, value in ours.items() if name.startswith(("layer4", "decoder"))} == facts
    head = {f"decoder.{name}": list(tensor.shape) for name, tensor in network.head.named_parameters()}
    assert head == FACTS[case]["parameters"]


def drawn(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    shape = tuple(like.shape)
    if name.endswith(("running_mean", "num_batches_tracked")):
        values = np.zeros(shape)
    elif name.endswith("running_var"):
        values = np.ones(shape)
    elif len(shape) > 1:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        values = rng.uniform(0.5, 1.0, shape) * (0.25 if name.endswith("bn3.weight") else 1)
    else:
        values = rng.standard_normal(shape) * 0.1
    return torch.from_numpy(np.asarray(values)).to(like.dtype)


def test_the_network_gives_the_released_networks_scores(case, network, golden):
    facts = golden["fcn_forward"]
    seed = int(facts["seed"])
    state = {name: drawn(released_name(name), tensor, seed) for name, tensor in network.state_dict().items()}
    state |= {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}  # the image is normalized already
    network.load_state_dict(state)
    image = np.random.default_rng([seed, 1]).standard_normal((1, 3, *facts["image_size"]))
    pixels = torch.from_numpy(image).float()
    with torch.no_grad():
        layer4 = list(network.backbone["body"](pixels).values())[-1][0, ::32]
        scores = network.scores(pixels)[0, :, ::6, ::6]
    for ours, theirs in ((layer4, facts[f"{case}_layer4"]), (scores, facts[f"{case}_logits"])):
        assert np.abs(ours.numpy() - theirs).max() < 1e-4 * np.abs(theirs).max()


# ---- the schedule ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_of_every_epoch_is_the_released_one(case):
    settings, facts = read_settings("segmentation", [], f"fcn_revisiting_{case}"), FACTS[case]
    plan = schedule.plan(settings, IMAGES[case])
    assert plan.epoch == IMAGES[case] // facts["settings"]["train_batch"]  # drop_last
    assert plan.steps == plan.epoch * facts["settings"]["epochs"]
    for step_of_epoch in (0, plan.epoch // 2, plan.epoch - 1):
        rates = [schedule.learning_rate(start + step_of_epoch, plan) for start in range(0, plan.steps, plan.epoch)]
        assert rates == pytest.approx(facts["learning_rate_of_each_epoch"], rel=1e-12)


def test_the_optimizer_and_data_are_the_released_ones(case):
    settings, facts = read_settings("segmentation", [], f"fcn_revisiting_{case}"), FACTS[case]["settings"]
    chosen, released = settings.optimizer, facts["optimizer_kwargs"]
    assert (chosen.name, chosen.learning_rate) == (facts["optimizer"], released["lr"])
    assert (chosen.weight_decay, chosen.decay_all) == (released["weight_decay"], True)
    assert chosen.momentum == released.get("momentum", chosen.momentum)
    assert settings.batch.total == facts["train_batch"]
    assert facts["train_split"].startswith(settings.data.train + " ")
    assert settings.run.precise_bn == 0


def test_an_epoch_leaves_out_what_does_not_fill_a_batch():
    order = dataset.OrderByKind([0] * 7, 3, seed=0, whole_epochs=True)
    batches = list(order.batches(range(0, 12, 3), 3))
    assert [[epoch for epoch, _ in batch] for batch in batches] == [[0] * 3, [0] * 3, [1] * 3, [1] * 3]
    first, second = ({index for batch in pair for _, index in batch} for pair in (batches[:2], batches[2:]))
    assert len(first) == len(second) == 6
    with pytest.raises(ValueError, match=r"5 training images do not fill a batch of 16.*batch.total=5 or less"):
        schedule.plan(read_settings("segmentation", [], "fcn_revisiting_voc"), 5)
    fitting = read_settings("segmentation", ["batch.total=5"], "fcn_revisiting_voc")
    assert schedule.plan(fitting, 5).steps == 45


# ---- pixels ----------------------------------------------------------------------------------------------------------


def recorded(golden, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    facts = golden["revisiting_pixels"]
    label = "label" if name == "image" else f"{name}_label"
    return torch.from_numpy(facts[name]).permute(2, 0, 1), torch.from_numpy(facts[label])


def assert_same_pixels(ours, theirs) -> None:
    """OpenCV interpolates in fixed point: one value of some thousands is rounded the other way."""
    assert ours[0].shape == theirs[0].shape
    difference = (ours[0].float() - theirs[0].float()).abs()
    assert float(difference.max()) <= 1
    assert float(difference.mean()) < 0.001
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("number", [0, 1])
def test_a_squashed_view_is_the_released_one(number, golden):
    draws = golden["revisiting_pixels"]["squashed_draws"][number]
    ours = crops.for_training(*recorded(golden, "image"), SquashedImages(side=64), draws, (9, 9, 9))
    assert_same_pixels(ours, recorded(golden, f"squashed{number}"))
    # The second is made smaller: what comes from beyond it counts as the first class.
    assert bool((ours[1][[0, -1]] == 0).all()) == (number == 1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stepped_crop_is_the_released_one(number, golden):
    draws = golden["revisiting_pixels"]["crop_draws"][number].copy()
    draws[0] = (draws[0] + 0.5) / 7  # the number of the factor
    ours = crops.for_training(*recorded(golden, "image"), SteppedCrops(crop=48), draws, (9, 9, 9))
    assert_same_pixels(ours, recorded(golden, f"crop{number}"))


def test_a_test_image_is_squashed_and_its_classes_are_brought_back(golden):
    image, mask = recorded(golden, "image")
    tested, tested_mask = recorded(golden, "tested")
    images = SquashedImages(side=64)
    assert_same_pixels((crops.for_testing(image, images), crops.nearest(mask, (64, 64))), (tested, tested_mask))
    own_size = torch.from_numpy(golden["revisiting_pixels"]["own_size"])
    assert torch.equal(crops.nearest(tested_mask, mask.shape), own_size)
    # A perfect prediction in the squashed image is not one at the image's own size.
    one_hot = nn.functional.one_hot(tested_mask.long().where(tested_mask < 11, 0), 11).movedim(2, 0)
    own, view = (fine_tune.counts(one_hot, mask, 11, by_view) for by_view in (False, True))
    right = (own_size.where(own_size < 11, 0) == mask) & (mask < 11)
    assert int(own.diagonal().sum()) == int(right.sum()) < int(own.sum()) == int((mask < 11).sum())
    assert int(view.diagonal().sum()) == int(view.sum()) == int((tested_mask < 11).sum())


# ---- runs ------------------------------------------------------------------------------------------------------------

SHORT = {key: value for key, value in SEGMENTER.items() if key not in ("schedule.steps", "images.crop")} | {
    "images.side": 64,
    "schedule.epochs": 3,
    "data.train": "train",
    "run.pictures": 1,
    "run.precise_bn": 0,
}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Path:
    return scenes.segmented_images(tmp_path_factory.mktemp("blocks"), size=(64, 96))


def epochs_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


def test_the_best_epoch_is_reported(blocks, tmp_path, monkeypatch):
    """Of three epochs whose scores are made up, the second is best; its network is the one that is written and scored."""
    from safetensors.torch import load_file

    given, evaluate = iter([10.0, 30.0, 20.0]), fine_tune.evaluate

    def scored(*args, **options):
        found = evaluate(*args, **options)
        return found._replace(metrics={"mIoU": next(given)}) if options else found

    monkeypatch.setattr(fine_tune, "evaluate", scored)
    out = tmp_path / "out"
    changes = {"run__keep": 9, "optimizer__learning_rate": 0.1}
    assert downstream("segmentation", blocks, out, SHORT, preset="fcn_revisiting_voc", **changes) == 0
    rows = epochs_of(out)
    assert [row["mIoU"] for row in rows] == [10.0, 30.0, 20.0]
    assert read(out / "results.json").settings["scored_step"] == rows[1]["step"]
    written = load_file(out / "model.safetensors")
    epochs = [load_file(out / "checkpoints" / f"step_{row['step']:08d}" / "model.safetensors") for row in rows]
    same = [all(torch.equal(written[name], epoch[name]) for name in written) for epoch in epochs]
    assert same == [False, True, False]


@pytest.mark.slow
def test_a_run_that_was_stopped_knows_its_epochs(blocks, tmp_path):
    """Killed after a checkpoint at an epoch's end and before its score: the score comes first when it goes on."""
    from safetensors.torch import load_file

    out = tmp_path / "out"
    base = SHORT | {"run.keep": 9, "optimizer.learning_rate": 0.1}
    assert downstream("segmentation", blocks, out, base, preset="fcn_revisiting_voc") == 0
    rows, straight = epochs_of(out), load_file(out / "model.safetensors")
    for name in ("results.json", "model.safetensors", "best.safetensors"):
        (out / name).unlink()
    last = out / "checkpoints" / f"step_{rows[-1]['step']:08d}"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    (out / "evaluations.jsonl").write_text("")  # no epoch is scored, two are trained
    assert downstream("segmentation", blocks, out, base, preset="fcn_revisiting_voc") == 0
    assert epochs_of(out) == rows[1:]  # the first epoch's network is gone
    if max(rows, key=lambda row: row["mIoU"]) != rows[0]:
        again = load_file(out / "model.safetensors")
        assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_classes_that_never_occur_count_as_zero():
    matrix = torch.tensor([[5, 1, 0], [0, 4, 0], [0, 0, 0]])
    found = fine_tune.segmentation_scores(matrix, absent_as_zero=True)["mIoU"]
    assert found == pytest.approx(fine_tune.segmentation_scores(matrix)["mIoU"] * 2 / 3)
    for case in IMAGES:
        assert read_settings("segmentation", [], f"fcn_revisiting_{case}").data.absent_as_zero


@pytest.mark.parametrize("name", ["fcn_voc", "fcn_cityscapes"])
def test_the_former_names_say_what_is_the_papers_protocol(name, blocks, tmp_path, capsys):
    new = name.replace("fcn", "fcn_revisiting")
    out = tmp_path / "out"
    changes = {"schedule__epochs": 1, "network__channels": 8, "batch__total": 2, "data__train": "train"}
    side = {"images__side": 64} if name == "fcn_voc" else {"images__crop": 64}
    assert downstream("segmentation", blocks, out, {}, preset=name, **changes) == 2
    said = capsys.readouterr().err
    assert f"--preset {name} was removed: give --preset {new}," in said
    assert downstream("segmentation", blocks, out, {}, preset=new, **changes, **side, run__pictures=0) == 0
    assert read(out / "results.json").rule == "changed"


def test_what_is_segmentations_is_refused_elsewhere():
    for setting in ("schedule.by_epoch=true", "data.absent_as_zero=true"):
        with pytest.raises(ValueError, match=f"{setting} is for segmentation, not for detection"):
            read_settings("detection", [setting])
