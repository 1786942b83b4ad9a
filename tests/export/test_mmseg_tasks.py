"""SlotCon's segmentation tasks in MMSegmentation: what is written is the released config on our backbone; what is run is scored.

The released configs, resolved, lie in `tests/golden/fcn_shapes.json` in the form of MMSegmentation 0.x; here they are
brought to that of 1.x. What needs MMSegmentation itself is skipped where it is not installed.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import trained, write_run

from clove_hub.cli import main
from clove_hub.data.files import Data
from clove_hub.evaluation.result import CHANGED, read
from clove_hub.export.mmseg import layouts, suite
from clove_hub.export.mmseg.config import plain, protocol, resolve
from clove_hub.export.mmseg.layouts import require_layout
from clove_hub.export.mmseg.tasks import TASKS, Order
from clove_hub.export.rehearsal import REHEARSED
from clove_hub.export.seeds import Found, Trained
from clove_hub.settings import flat
from clove_hub.weights import Weights, load

needs_mmseg = pytest.mark.skipif(
    find_spec("mmseg") is None,
    reason="MMSegmentation is not installed; its configs are compared with the released ones",
)
RELEASED = json.loads((Path(__file__).parents[1] / "golden" / "fcn_shapes.json").read_text())["slotcon_mmseg"]
WEIGHTS = Path("/runs/backbone.pth")


@pytest.fixture(scope="module")
def backbone() -> Weights:
    return Weights("made", "a made backbone", "file", "resnet50", dict(trained("resnet50").state_dict()))


# ---- the released configs --------------------------------------------------------------------------------------------


def new_form(old: Mapping[str, Any]) -> dict[str, Any]:
    """A config of MMSegmentation 0.x as 1.x has it, but for what 1.x alone has.

    Resize with a range is RandomResize; normalizing and padding are the data preprocessor's; packing replaces what
    formats and collects; the mask is read after the resizing of a test image; a dataset of two lists is two datasets.
    """
    train, test = old["data"]["train"], old["data"]["test"]
    steps = {step["type"]: step for step in train["pipeline"]}
    normalize, pad = steps["Normalize"], steps["Pad"]
    labels = steps["LoadAnnotations"]
    resize = {"type": "RandomResize", "keep_ratio": True, "scale": steps["Resize"]["img_scale"]}
    crop = {"cat_max_ratio": 1.0} | steps["RandomCrop"]
    training = [{"type": "LoadImageFromFile"}, labels, resize | {"ratio_range": steps["Resize"]["ratio_range"]}, crop]
    training += [steps["RandomFlip"], *(steps[name] for name in steps if name == "PhotoMetricDistortion")]
    augmented = test["pipeline"][1]
    assert augmented["flip"] is False
    assert augmented["transforms"][0] == {"type": "Resize", "keep_ratio": True}
    assert [step for step in augmented["transforms"] if step["type"] == "Normalize"] == [normalize]
    testing = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": augmented["img_scale"], "keep_ratio": True}]
    testing += [labels]

    def datasets(part: Mapping[str, Any], pipeline: list[Any]) -> list[dict[str, Any]]:
        masks = part["ann_dir"] if isinstance(part["ann_dir"], list) else [part["ann_dir"]]
        lists = part.get("split", [])
        names = [{"ann_file": name} for name in (lists if isinstance(lists, list) else [lists])] or [{}]
        return [
            {
                "type": part["type"],
                "data_root": part["data_root"].rstrip("/"),
                "data_prefix": {"img_path": part["img_dir"], "seg_map_path": mask},
                "pipeline": [*pipeline, {"type": "PackSegInputs"}],
            }
            | name
            for mask, name in zip(masks, names, strict=True)
        ]

    training_sets = datasets(train, training)
    together = training_sets[0] if len(training_sets) == 1 else {"type": "ConcatDataset", "datasets": training_sets}
    rate = dict(old["lr_config"])
    policy = rate.pop("policy")
    scheduler = {"type": {"step": "MultiStepLR", "poly": "PolyLR"}[policy]} | {
        {"step": "milestones", "min_lr": "eta_min"}.get(name, name): value for name, value in rate.items()
    }
    if policy == "poly":
        scheduler |= {"begin": 0, "end": old["runner"]["max_iters"]}
    model = dict(old["model"])
    if model["auxiliary_head"] is None:
        del model["auxiliary_head"]
    return {
        "model": model
        | {
            "data_preprocessor": {
                "type": "SegDataPreProcessor",
                "mean": normalize["mean"],
                "std": normalize["std"],
                "bgr_to_rgb": normalize["to_rgb"],
                "pad_val": pad["pad_val"],
                "seg_pad_val": pad["seg_pad_val"],
                "size": pad["size"],
            },
        },
        "train_dataloader": {"dataset": together},
        "test_dataloader": {"dataset": datasets(test, testing)[0]},
        "val_dataloader": {"dataset": datasets(old["data"]["val"], testing)[0]},
        "optim_wrapper": {"type": "OptimWrapper", "optimizer": old["optimizer"]},
        "param_scheduler": [scheduler],
        "train_cfg": {"max_iters": old["runner"]["max_iters"], "val_interval": old["evaluation"]["interval"]},
        "default_hooks": {
            "checkpoint": {
                "by_epoch": old["checkpoint_config"]["by_epoch"],
                "interval": old["checkpoint_config"]["interval"],
            }
        },
        "val_evaluator": {"iou_metrics": [old["evaluation"]["metric"]]},
    }


EXPLAINED = {
    "model.backbone.init_cfg.checkpoint": (str(WEIGHTS), "the converted backbone, wherever it is"),
    "model.backbone.frozen_stages": (-1, "ResNet's default, said since other configs freeze"),
    "model.pretrained": (None, "EncoderDecoder's default: the backbone's own init_cfg counts"),
}
HEADS = {
    "kernel_size": (3, "FCNHead's default"),
    "dilation": (1, "FCNHead's default, where the released config says none"),
}
NEW = (
    *(
        "default_scope",
        "custom_imports",
        "custom_hooks",
        "env_cfg",
        "log_processor",
        "log_level",
        "load_from",
        "resume",
    ),
    *(
        "val_cfg",
        "test_cfg",
        "test_evaluator",
        "default_hooks.timer",
        "default_hooks.logger",
        "default_hooks.sampler_seed",
    ),
    *("default_hooks.param_scheduler", "default_hooks.checkpoint.type", "default_hooks.checkpoint.max_keep_ckpts"),
    *("train_cfg.type", "val_evaluator.type"),
    *(f"{part}_dataloader.{key}" for part in ("train", "val", "test") for key in ("num_workers", "persistent_workers")),
    *(f"{part}_dataloader.{key}" for part in ("train", "val", "test") for key in ("batch_size", "sampler")),
)
"""What MMEngine 1.x alone has, and what says how a run is carried out. 16 images an iteration have a test of their own."""


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_released_config_but_for_what_is_explained(backbone: Weights, name: str) -> None:
    config, notes = resolve(TASKS[name], backbone, WEIGHTS, "data", 4)
    assert notes == ()
    ours = {
        key: value
        for key, value in flat(json.loads(json.dumps(config))).items()
        if not any(key == new or key.startswith(f"{new}.") for new in NEW)
    }
    released = flat(new_form(RELEASED[name]))
    explained = {key: value for key, (value, _) in EXPLAINED.items()}
    for head in ("decode_head", "auxiliary_head"):
        if head in config["model"]:
            explained |= {f"model.{head}.{key}": value for key, (value, _) in HEADS.items()}
    differing = {key for key in ours.keys() | released.keys() if ours.get(key, ...) != released.get(key, ...)}
    assert differing <= explained.keys()
    assert {key: ours[key] for key in differing} == {key: explained[key] for key in differing}


@pytest.mark.parametrize("name", TASKS)
def test_sixteen_images_make_an_iteration_as_released(backbone: Weights, name: str) -> None:
    per_gpu = RELEASED[name]["data"]["samples_per_gpu"]  # of 2 GPUs, of 4 for ADE20K
    assert 16 % per_gpu == 0
    for gpus in (1, 2, 4, 8):
        config, notes = resolve(TASKS[name], backbone, WEIGHTS, "data", gpus)
        assert (config["train_dataloader"]["batch_size"] * gpus, notes) == (16, ())
    with pytest.raises(ValueError, match="16 images per iteration are not divisible among 3 GPUs"):
        resolve(TASKS[name], backbone, WEIGHTS, "data", 3)


# ---- changes ---------------------------------------------------------------------------------------------------------


def test_normalization_is_slotcons_where_its_figures_are_and_can_be_the_sane_one(backbone: Weights) -> None:
    def mean(name: str, *chosen: Any) -> tuple[list[float], tuple[str, ...]]:
        config, notes = resolve(TASKS[name], backbone, WEIGHTS, "data", 4, *chosen)
        return config["model"]["data_preprocessor"]["mean"], notes

    sane = [123.675, 116.28, 103.53]
    assert mean("voc12aug") == mean("cityscapes") == mean("voc12aug", "slotcon") == ([0.485, 0.456, 0.406], ())
    assert mean("ade20k") == (sane, ())
    assert mean("voc12aug", "imagenet") == (sane, ("normalization=imagenet in place of the protocol's slotcon",))


def test_a_shorter_run_scales_what_counts_iterations(backbone: Weights) -> None:
    short, notes = resolve(TASKS["voc12aug"], backbone, WEIGHTS, "data", 4, None, ["train_cfg.max_iters=300"])
    assert short["param_scheduler"][0]["milestones"] == [210, 270]
    assert short["train_cfg"] == {"type": "IterBasedTrainLoop", "max_iters": 300, "val_interval": 30}
    assert short["default_hooks"]["checkpoint"]["interval"] == 30
    assert "param_scheduler.0.milestones [21000, 27000] -> [210, 270]" in notes
    given = ["train_cfg.max_iters=300", "default_hooks.checkpoint.interval=7"]
    config, _ = resolve(TASKS["ade20k"], backbone, WEIGHTS, "data", 4, None, given)
    assert (config["param_scheduler"][0]["end"], config["default_hooks"]["checkpoint"]["interval"]) == (300, 7)
    assert TASKS["voc12aug"].scheduler["milestones"] == [21000, 27000]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "train_cfg.max_iter=3",
            r"unknown key train_cfg.max_iter \(did you mean 'max_iters'\?\): train_cfg has type, max_",
        ),
        ("optim_wrapper.optimizer.lr.x=3", "optim_wrapper.optimizer.lr has no keys"),
        ("param_scheduler.3.end=3", "param_scheduler has 0"),
        ("batch", "is not key=value"),
        ("train_cfg.max_iters=0", "expected a whole number from 1"),
    ],
)
def test_a_wrong_change_is_refused(backbone: Weights, change: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve(TASKS["voc12aug"], backbone, WEIGHTS, "data", 4, None, [change])


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_config_and_weights_are_written_for_another_machine(
    tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", "resnet18")
    arguments = ["downstream", "mmseg", task, "--backbone", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert (
        f"mim train mmsegmentation {tmp_path / 'out' / task}.py --launcher pytorch --gpus 4" in capsys.readouterr().out
    )
    written = runpy.run_path(str(tmp_path / "out" / f"{task}.py"))
    weights = tmp_path / "out" / "backbone.pth"
    assert written["model"]["backbone"]["init_cfg"] == {"type": "Pretrained", "checkpoint": str(weights)}
    assert written["model"]["decode_head"]["in_channels"] == 512
    assert written["custom_hooks"][0] == {"type": "RequireBackbone", "file": str(weights)}
    assert written["train_dataloader"]["batch_size"] == 4
    stored = torch.load(weights, weights_only=True)["state_dict"]
    expected = load(tmp_path / "run").tensors
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in expected.items()}
    assert torch.equal(stored["layer4.1.bn2.weight"], expected["layer4.1.bn2.weight"])
    assert main(arguments) == 0  # ours may be replaced
    (tmp_path / "out" / f"{task}.py").write_text("mine")
    assert main(arguments) == 2
    assert f"{task}.py exists and was not written by clove-hub" in capsys.readouterr().err


# ---- data and results ------------------------------------------------------------------------------------------------


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    """Made images and masks in all three layouts: 3 to train on (VOC: 2 and 1 of aug), 2 to score."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"

    def put(path: Path, pixels: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    voc, streets, ade = root / "VOCdevkit/VOC2012", root / "cityscapes", root / "ade/ADEChallengeData2016"
    parts = {"a": "train", "b": "train", "c": "aug", "d": "val", "e": "val"}
    for name, part in parts.items():
        photo = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        mask = np.repeat(np.repeat(rng.integers(0, 4, (6, 8), dtype=np.uint8), 8, 0), 8, 1)
        mask[:4] = 255
        put(voc / f"JPEGImages/{name}.jpg", photo)
        put(voc / f"SegmentationClass{'Aug' if part == 'aug' else ''}/{name}.png", mask)
        split = "val" if part == "val" else "train"
        put(streets / f"leftImg8bit/{split}/ulm/{name}_leftImg8bit.png", photo)
        put(streets / f"gtFine/{split}/ulm/{name}_gtFine_labelTrainIds.png", mask)
        folder = "validation" if part == "val" else "training"
        put(ade / f"images/{folder}/{name}.jpg", photo)
        put(ade / f"annotations/{folder}/{name}.png", mask + 1)  # 255 -> 0
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    for part in ("train", "aug", "val"):
        names = [name for name, own in parts.items() if own == part]
        (voc / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.mark.parametrize("task", TASKS)
def test_a_data_set_is_found_whole_or_what_is_missing_is_named(streets: Path, task: str) -> None:
    layout = TASKS[task].layout
    found = require_layout(layout, streets)
    assert (found.train, found.test) == (3, 2)
    mask = next(
        path for path in sorted(streets.rglob("*.png")) if path.stem.startswith("e") and layout[:3] in str(path).lower()
    )
    mask.unlink()
    with pytest.raises(ValueError, match=f"2 images and their masks for validation: 1 files are missing: {mask}"):
        require_layout(layout, streets)
    with pytest.raises(ValueError, match="is not a folder, but the data set should be there"):
        require_layout(layout, streets / "elsewhere")


@pytest.mark.parametrize("task", TASKS)
def test_a_rehearsal_has_a_few_images_in_the_same_layout(
    tmp_path: Path, streets: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = TASKS[task].layout
    monkeypatch.setattr(layouts, "FEW", 1)
    photo = layouts.write_miniature(layout, streets, tmp_path / "few")
    assert photo.is_file()
    found = require_layout(layout, tmp_path / "few")
    assert (found.train, found.test) == (2 if layout == "voc" else 1, 1)  # one of each list


def test_what_mmsegmentation_opens_needs_nothing_of_ours(backbone: Weights) -> None:
    config, _ = resolve(TASKS["voc12aug"], backbone, WEIGHTS, "data", 4)
    assert "clove_hub" in json.dumps(config)
    assert "clove_hub" not in json.dumps(plain(config))
    assert config.keys() ^ plain(config).keys() == {"custom_imports", "custom_hooks", "test_pipeline"}


def test_without_mmsegmentation_the_way_out_is_named_and_works(
    tmp_path: Path, streets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "find_spec", lambda name: None if name == "mmseg" else object())
    write_run(tmp_path / "run", "resnet18")
    arguments = ["downstream", "mmseg", "voc12aug", "--backbone", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--data", str(streets)]) == 2
    assert "mmseg, see https://mmsegmentation" in (said := capsys.readouterr().err)
    assert "Without --data, config and weights are written" in said
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0


def test_a_result_has_all_that_it_was_measured_with(backbone: Weights) -> None:
    config, _ = resolve(TASKS["voc12aug"], backbone, WEIGHTS, "data", 4)
    order = Order("voc12aug", "x", Path("d"), Path("o"), 4, 2, None, ())
    found = Found(10_582, 1449, "f" * 64)
    scores = {
        seed: {
            "metrics": {"aAcc": 90.0, "mAcc": 80.0, "mIoU": 70.0 + seed},
            "classes": ["cat", "dog"],
            "class": {"cat": {"IoU": 50.0 + seed, "pixels": 9.0}},
        }
        for seed in (0, 1)
    }
    for notes, diverged, rule in (((), [], "slotcon"), (("lr=1, as given",), [], CHANGED), ((), ["seed 2"], CHANGED)):
        record = suite.summarize(order, backbone, config, notes, found, Trained(scores, diverged, 3.0), 4)
        assert (record.protocol, record.rule, record.data) == ("mmseg-voc12aug", rule, Data("voc12aug", "f" * 64, 1449))
        assert (record.metrics["mIoU"], record.items, record.absent) == (
            70.5,
            {"class": {"cat": {"IoU": 50.5, "pixels": 9.0}}},
            ("dog",),
        )
        assert record.settings["batch"] == {"total": 16}
        assert record.preprocessing["mean"] == [0.485, 0.456, 0.406]
        assert (record.seeds, record.deviations["mIoU"], record.seconds) == ((0, 1), pytest.approx(0.5**0.5), 3.0)
    scores[1]["metrics"]["mIoU"] = None
    with pytest.raises(FloatingPointError, match=r"seed_1/scores\.json has no mIoU"):
        suite.summarize(order, backbone, config, (), found, Trained(scores, [], 3.0), 4)


# ---- the real MMSegmentation -----------------------------------------------------------------------------------------


@needs_mmseg
@pytest.mark.parametrize("task", TASKS)
def test_the_real_mmsegmentation_holds_the_backbone_and_gives_timms_map(
    backbone: Weights, tmp_path: Path, task: str
) -> None:
    from types import SimpleNamespace

    import timm
    from mmengine.config import Config
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from clove_hub.export.mmseg.hooks import RequireBackbone

    register_all_modules()
    order = Order(task, "x", None, tmp_path, None, 1, None, ())
    config = protocol(TASKS[task], backbone, order.weights, "data", 4, sync=False)
    suite.write_protocol(order, backbone, config)
    cfg = Config.fromfile(str(order.config))
    model = MODELS.build(cfg.model)
    model.init_weights()
    RequireBackbone(str(order.weights)).before_train(SimpleNamespace(iter=0, model=model))
    stride = 8 if task == "ade20k" else 16
    reference = timm.create_model("resnet50", num_classes=0, output_stride=stride).eval()
    reference.load_state_dict(backbone.tensors)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model.eval().backbone(image)[-1], reference.forward_features(image))
        model.backbone.bn1.weight[0] += 1
    with pytest.raises(ValueError, match=r"does not hold the backbone.*bn1\.weight"):
        RequireBackbone(str(order.weights)).before_train(SimpleNamespace(iter=0, model=model))


SHORT = ("train_cfg.max_iters=2", "train_dataloader.batch_size=2", "default_hooks.checkpoint.interval=1")
SMALL = {
    "model.data_preprocessor.size": "[33,33]",
    **{f"{part}_dataloader.dataset.pipeline.1.scale": "[64,48]" for part in ("val", "test")},
    **{f"{part}_dataloader.num_workers": "1" for part in ("train", "val", "test")},
}


def plain_tools_open(seed: Path, photo: Path) -> None:
    """Opens a trained seed in a process that has MMSegmentation and nothing of ours."""
    code = """
import sys
import torch
from mmseg.apis import inference_model, init_model
model = init_model(sys.argv[1], sys.argv[2], device="cpu")
state = model.state_dict()
assert inference_model(model, sys.argv[3]).pred_sem_seg.data.shape[-2:] == (48, 64)
trained = torch.load(sys.argv[2], weights_only=False)["state_dict"]
assert trained.keys() == state.keys() and all(torch.equal(state[name], trained[name]) for name in trained)
assert "clove_hub" not in sys.modules
"""
    words = [sys.executable, "-W", "ignore", "-c", code, str(seed / "config.py"), str(seed / "iter_2.pth"), str(photo)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_mmseg
@pytest.mark.long
def test_a_training_that_diverges_leaves_its_reason(
    tmp_path: Path, streets: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from clove_hub.export.mmseg import rehearsal

    monkeypatch.setattr(rehearsal, "rehearse_task", lambda *_: None)  # which would stop before, with the same reason
    write_run(tmp_path / "run", "resnet18")
    arguments = [
        "downstream",
        "mmseg",
        "ade20k",
        "--backbone",
        str(tmp_path / "run"),
        "--data",
        str(streets),
        "--gpus",
        "0",
    ]
    crops = [
        "train_dataloader.dataset.pipeline.2.scale=[64,48]",
        "train_dataloader.dataset.pipeline.3.crop_size=[33,33]",
    ]
    changes = [*SHORT, *(f"{key}={value}" for key, value in SMALL.items()), *crops]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), *changes, "optim_wrapper.optimizer.lr=1e30"]) == 1
    reason = (out / "seed_0" / "diverged.txt").read_text()
    assert "is not finite after iteration" in reason
    assert "Choose a lower optim_wrapper.optimizer.lr and another --out" in reason
    assert f"error: seed 0 diverged and is left out: {reason.strip()}" in capfd.readouterr().err


@needs_mmseg
@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_trained_scored_and_collected_and_goes_on_where_it_was_stopped(
    tmp_path: Path, streets: Path, task: str
) -> None:
    parts = [f"datasets.{number}." for number in range(2)] if task == "voc12aug" else [""]
    crops = {f"train_dataloader.dataset.{part}pipeline.2.scale": "[64,48]" for part in parts}
    crops |= {f"train_dataloader.dataset.{part}pipeline.3.crop_size": "[33,33]" for part in parts}
    write_run(tmp_path / "run", "resnet18")
    arguments = [
        "downstream",
        "mmseg",
        task,
        "--backbone",
        str(tmp_path / "run"),
        "--data",
        str(streets),
        "--gpus",
        "0",
    ]
    arguments += ["--out", str(tmp_path / "out"), *SHORT, *(f"{key}={value}" for key, value in (SMALL | crops).items())]
    assert main(arguments) == 0
    first = read(tmp_path / "out" / "results.json")
    assert first.rule == CHANGED
    assert (
        f"trained on 3 images, the data set has {layouts.PUBLISHED[TASKS[task].layout][0]}" in first.settings["notes"]
    )
    assert (tmp_path / "out" / REHEARSED).is_file()
    assert not (tmp_path / "out" / "rehearsal").exists()
    plain_tools_open(tmp_path / "out" / "seed_0", streets / "VOCdevkit/VOC2012/JPEGImages/d.jpg")
    assert set(first.items["class"]) >= {"background"} if task == "voc12aug" else first.items["class"]
    seed = tmp_path / "out" / "seed_0"
    for path in (seed / "scores.json", seed / "iter_2.pth", tmp_path / "out" / "results.json"):
        path.unlink()
    (seed / "iter_2.pth").write_bytes(b"cut off")
    assert main(arguments) == 0
    assert read(tmp_path / "out" / "results.json").metrics == first.metrics
