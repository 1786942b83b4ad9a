"""Segmentation: the presets of the FCN protocols, the network, its crops, its scoring, several processes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from fine_tuning import SEGMENTER, SMALL, downstream, rows
from PIL import Image
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F

from clove_hub.cli import main
from clove_hub.data.masks import open_segmented
from clove_hub.evaluation.result import read
from clove_hub.evaluation.run import run_protocol
from clove_hub.training.finetune import dataset, schedule
from clove_hub.training.finetune.forms import RandomCrops
from clove_hub.training.finetune.settings import PRESETS, as_sections, differences, read_settings
from clove_hub.weights import load

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]
pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Path:
    """Blocks of three colors, each a class, in images of 64 x 96 pixels: no multiple of the crops' side."""
    return scenes.segmented_images(tmp_path_factory.mktemp("blocks"), size=(64, 96))


# ---- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_tasks_and_complete(name):
    preset = PRESETS[name]
    settings = read_settings(preset.task, [], name)
    assert settings.preset == name == preset.preset
    plan = schedule.plan(settings, images=1000)
    assert plan.scaled is None
    assert schedule.plan(preset, images=1000) == plan
    assert schedule.learning_rate(plan.warmup, plan) == preset.optimizer.learning_rate
    plain = as_sections(settings)
    assert differences(plain, plain) == []
    with pytest.raises(
        ValueError, match=f"--preset {name[:-1]} .did you mean '{name}'.* is not one of {preset.task}'s presets"
    ):
        read_settings(preset.task, [], name[:-1])


@pytest.mark.parametrize("name", PRESETS)
def test_help_shows_a_presets_settings(name, capsys):
    preset = PRESETS[name]
    for given in (["--preset", name], [f"--preset={name}"]):
        with pytest.raises(SystemExit, match="0"):
            main(["downstream", "torchvision", preset.task, *given, "--help"])
        said = capsys.readouterr().out
        assert f"settings of {preset.task} as {name} has them" in said
        assert f"optimizer.learning_rate={preset.optimizer.learning_rate}" in said
        assert f"schedule.steps={preset.schedule.steps or 'null'}" in said


def test_the_batch_scales_sgds_learning_rate_and_not_adams():
    voc = schedule.plan(read_settings("segmentation", ["batch.total=8"], "fcn_revisiting_voc"), images=1600)
    assert (voc.steps, voc.peak) == (45 * 200, 0.0015)
    assert "0.003 -> 0.0015" in voc.scaled
    cityscapes = schedule.plan(
        read_settings("segmentation", ["batch.total=16"], "fcn_revisiting_cityscapes"), images=1600
    )
    assert (cityscapes.steps, cityscapes.peak, cityscapes.scaled) == (150 * 100, 1e-4, None)


def test_evaluate_fcn_names_the_command_which_then_works(blocks, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["evaluate", "fcn", "--model", "random:test_resnet", "--data", str(blocks), "schedule=cityscapes"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    command = shlex.split(re.search(r"clove-hub (downstream .*)", said)[1])
    assert command[command.index("--preset") + 1] == "fcn_revisiting_cityscapes"
    tiny = SMALL | {
        "images.crop": 48,
        "network.channels": 8,
        "schedule.epochs": 1,
        "data.train_images": 4,
        "data.test_images": 2,
    }
    del tiny["schedule.steps"]
    assert main([*command, "--out", str(out), *(f"{key}={value}" for key, value in tiny.items())]) == 0
    record = read(out / "results.json")
    assert record.settings["preset"] == "fcn_revisiting_cityscapes"
    assert (record.settings["train_images"], record.settings["steps"], record.data.samples) == (4, 2, 2)
    with pytest.raises(ValueError, match="--preset fcn_revisiting_voc --backbone SOURCE --data DIR"):
        run_protocol("fcn", torch.nn.Identity(), None, blocks)


# ---- the network -----------------------------------------------------------------------------------------------------


def segmenter(architecture: str = "test_resnet", classes: int = 3, aligned: bool = False) -> torch.nn.Module:
    from clove_hub.training.finetune import networks

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = read_settings("segmentation", ["network.channels=8", f"network.align_corners={aligned}"])
        return networks.build(load(f"random:{architecture}", seed=0), settings, classes, 0)


@pytest.mark.parametrize(("architecture", "stride"), [("resnet18", 16), ("resnet26", 16), ("convnext_atto", 32)])
def test_a_resnets_last_map_has_stride_16_and_other_models_keep_theirs(architecture, stride, caplog):
    from clove_hub.training.finetune import networks

    network = segmenter(architecture).eval()
    maps = list(networks.body_of(network)(torch.zeros(1, 3, 64, 96)).values())
    assert maps[-1].shape[2:] == (64 // stride, 96 // stride)
    assert ("is not a ResNet of plain blocks" in caplog.text) == (stride == 32)


def test_whole_images_are_padded_for_the_network_and_cut_back():
    network = segmenter().eval()
    image = torch.rand(3, 50, 75)
    around = F.pad(image[None], (0, 21, 0, 14), mode="replicate")[0]
    with torch.no_grad():
        (found,), (whole,) = network([image]), network([around])
    assert found.shape == (3, 50, 75)
    torch.testing.assert_close(found, whole[:, :50, :75])


def test_slotcons_preset_is_its_configs_network_and_schedule():
    """SlotCon's config for MMSegmentation, resolved and recorded in tests/golden."""
    facts = json.loads((Path(__file__).parents[2] / "golden" / "fcn_shapes.json").read_text())
    config = facts["slotcon_mmseg"]["voc12aug"]
    head, preset = config["model"]["decode_head"], PRESETS["fcn_slotcon"]
    assert (preset.network.channels, preset.network.dilation) == (head["channels"], head["dilation"])
    assert preset.network.align_corners is head["align_corners"] is True
    assert (preset.optimizer.learning_rate, preset.optimizer.weight_decay) == (0.003, 0.0001)
    assert preset.optimizer.learning_rate == config["optimizer"]["lr"]
    plan = schedule.plan(preset, images=10_582)
    assert (plan.steps, list(plan.decays)) == (config["runner"]["max_iters"], config["lr_config"]["step"])
    assert [preset.images.crop] * 2 == list(config["crop_size"])


@pytest.mark.parametrize("size", [(50, 75), (64, 96), (65, 33)])
def test_with_aligned_corners_scores_are_resized_as_mmsegmentation_does(size):
    """`resize(scores, size, mode="bilinear", align_corners=True)` of an image that is not padded."""
    network = segmenter(aligned=True).eval()
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        coarse = network.head(list(networks_maps(network, image).values())[-1])
        (found,) = network([image[0]])
    assert found.shape == (3, *size)
    expected = F.interpolate(coarse, size, mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(found, expected)
    other = F.interpolate(coarse, size, mode="bilinear", align_corners=False)[0]
    assert (found - other).abs().max() > 1e-4


def networks_maps(network: torch.nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    from clove_hub.training.finetune import networks

    return networks.body_of(network)((image - network.mean) / network.std)


def halves(void: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Four images of which the first two have classes in few pixels, so that a mean of means is another loss."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 64, 64, generator=generator)
    classes = torch.randint(0, 3, (4, 64, 64), generator=generator).to(torch.uint8)
    classes[:2, :, :void] = 255
    return images, classes


def gradients(part: slice) -> tuple[torch.Tensor, list[torch.Tensor]]:
    network = segmenter().train()
    for module in network.modules():  # statistics of its own would make each process another network
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, classes = halves()
    loss = network(list(images[part]), [{"classes": one} for one in classes[part]])["loss_pixels"]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained))


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loss, own = gradients(slice(2 * rank, 2 * rank + 2))
    for tensor in (loss, *own):  # as data parallelism does
        dist.all_reduce(tensor)
        tensor /= 2
    torch.save((loss, own), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradient_of_the_whole_batch(tmp_path):
    mp.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    whole_loss, whole = gradients(slice(0, 4))
    for rank in range(2):
        loss, own = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, whole_loss)
        for ours, theirs in zip(own, whole, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_batch_without_classes_has_loss_zero():
    images, classes = halves()
    losses = segmenter().train()(list(images), [{"classes": one * 0 + 255} for one in classes])
    assert losses["loss_pixels"].item() == 0


# ---- crops -----------------------------------------------------------------------------------------------------------


def test_a_crop_and_its_mask_show_the_same_place(blocks):
    """Every pixel whose neighbors have its class has the color of its class; beyond the image all have the given one."""
    part = open_segmented(blocks, "train")
    images = dataset.SegmentationDataset(part, RandomCrops(crop=80), (1, 2, 3), seed=0)
    colors = torch.from_numpy(scenes.COLORS[:3]).float() * 0.8 + 25
    beyond = 0
    for epoch in range(20):
        image, target = images[epoch, 0]
        pixels, truth = image.permute(1, 2, 0), target["classes"]
        assert (image.shape, truth.shape) == ((3, 80, 80), (80, 80))
        known = truth != 255
        nearest = (pixels[:, :, None].float() - colors).square().sum(3).argmin(2)
        assert float((nearest == truth)[known].float().mean()) > 0.95
        beyond += int((pixels == torch.tensor([1, 2, 3])).all(2)[~known].sum())
    assert beyond > 0
    assert torch.equal(images[7, 0].image, images[7, 0].image)
    assert not torch.equal(images[7, 0].image, images[8, 0].image)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fcn_revisiting_voc", "fcn_revisiting_cityscapes"])
def test_the_network_learns(preset, blocks, tmp_path):
    base = {key: value for key, value in SEGMENTER.items() if key != "images.crop"}
    base |= {"schedule.steps": 30, "batch.total": 3, "data.train": "train", "run.pictures": 0, "run.precise_bn": 0}
    base["images.side" if preset == "fcn_revisiting_voc" else "images.crop"] = 64
    rates = {"fcn_revisiting_voc": 0.1, "fcn_revisiting_cityscapes": 0.003}
    found = {}
    for name, rate in {"untrained": 1e-7, "trained": rates[preset]}.items():
        out = tmp_path / name
        status = downstream("segmentation", blocks, out, base, preset=preset, optimizer__learning_rate=rate)
        assert status == 0
        found[name] = read(out / "results.json").metrics["mIoU"]
    assert found["trained"] > found["untrained"] + 10


@pytest.mark.slow
def test_an_adam_run_that_was_stopped_ends_as_if_it_had_not_been(blocks, tmp_path):
    from safetensors.torch import load_file

    base = SEGMENTER | {
        "data.train": "train",
        "schedule.steps": 4,
        "run.pictures": 0,
        "run.save_every": 2,
        "run.keep": 9,
    }
    out = tmp_path / "out"
    assert downstream("segmentation", blocks, out, base, preset="fcn_revisiting_cityscapes") == 0
    straight = load_file(out / "model.safetensors")
    for path in (out / "results.json", out / "model.safetensors"):
        path.unlink()
    for path in (out / "checkpoints" / "step_00000004").iterdir():
        path.unlink()
    (out / "checkpoints" / "step_00000004").rmdir()
    assert downstream("segmentation", blocks, out, base, preset="fcn_revisiting_cityscapes") == 0
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_train_and_score_together(blocks, tmp_path):
    changes = {key: value for key, value in SEGMENTER.items() if key != "images.crop"}
    changes |= {"images.side": 64, "data.train": "train", "run.pictures": 0}
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "clove_hub.cli",
        "downstream",
    ]
    what = [
        "torchvision",
        "segmentation",
        "--preset",
        "fcn_revisiting_voc",
        "--backbone",
        "random:test_resnet",
        "--data",
        str(blocks),
    ]
    how = ["--out", str(tmp_path / "out"), *(f"{key}={value}" for key, value in changes.items())]
    found = subprocess.run([sys.executable, *command, *what, *how], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    record = read(tmp_path / "out" / "results.json")
    assert record.data.samples == 4
    assert [row["step"] for row in rows(tmp_path / "out")] == [1, 2]


def test_bad_masks_and_images_are_named(tmp_path, capsys):
    folder = scenes.segmented_images(tmp_path / "data", size=(64, 96))
    changes = SEGMENTER | {"run.pictures": 0, "schedule.epochs": 1, "data.workers": 0}
    del changes["schedule.steps"]

    def said(what: str) -> str:
        assert downstream("segmentation", folder, tmp_path / what, changes) == 2
        return capsys.readouterr().err

    mask = folder / "labels" / "train1.png"
    kept = mask.read_bytes()
    Image.fromarray(np.full((64, 96), 7, np.uint8)).save(mask)
    assert re.search(r"train1\.png has the class 7; expected 0 to 2", said("class"))
    Image.new("RGB", (96, 64), "red").save(mask)
    assert re.search(r"train1\.png is an image of mode RGB", said("colors"))
    Image.new("L", (96, 61)).save(mask)
    assert re.search(r"train1\.png is 96x61 pixels, but .*train1\.png is 96x64", said("size"))
    mask.unlink()
    assert "the mask of train1.png is missing" in said("absent")
    mask.write_bytes(kept)
    (folder / "images" / "train2.png").write_bytes(b"torn")
    assert re.search(r"error: .*train2\.png", said("torn"))
    (folder / "images" / "train2.png").write_bytes((folder / "images" / "train3.png").read_bytes())
    for name in (folder / "val.txt").read_text().split():
        Image.new("L", (96, 64), 255).save(folder / "labels" / f"{name}.png")
    assert "the masks of val are all void" in said("void")


# ---- real photos -----------------------------------------------------------------------------------------------------


def test_the_layout_of_cityscapes_and_real_street_scenes_are_fine_tuned(tmp_path):
    """CamVid's photos and masks under Cityscapes' names and ids."""
    from conftest import SHARED

    from clove_hub.data.masks import CITYSCAPES_IDS

    camvid = SHARED / "data" / "camvid"
    if not camvid.is_dir():
        pytest.skip(f"the street scenes are not at hand ({camvid})")
    table = np.full(256, 0, np.uint8)
    table[:11] = CITYSCAPES_IDS[:11]
    for split in ("train", "val"):
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / "data" / kind / split / "ulm").mkdir(parents=True)
        for pair in open_segmented(camvid, split).spread(2).pairs:
            name = pair[0].stem
            with Image.open(pair[0]) as photo:
                photo.resize((240, 180)).save(tmp_path / f"data/leftImg8bit/{split}/ulm/{name}_leftImg8bit.png")
            with Image.open(pair[1]) as mask:
                ids = table[np.array(mask.resize((240, 180), Image.Resampling.NEAREST))]
            Image.fromarray(ids).save(tmp_path / f"data/gtFine/{split}/ulm/{name}_gtFine_labelIds.png")
    assert (
        downstream("segmentation", tmp_path / "data", tmp_path / "out", SEGMENTER, preset="fcn_revisiting_cityscapes")
        == 0
    )
    record = read(tmp_path / "out" / "results.json")
    assert 0 < record.metrics["mIoU"] < 100
    assert set(record.items["class"]) & {"road", "building"}
    assert "bicycle" in record.absent
