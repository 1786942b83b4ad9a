"""The papers' tasks in Detectron2: right set-ups run, wrong ones are refused with their reason.

What needs Detectron2 itself is skipped where it is not installed; the names and shapes of its models were recorded from
version 0.6 (`detectron2_tasks.json`, `detectron2_resnet50.json`), so that the check of names runs everywhere.
"""

import copy
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_detectron2 import SMALL, photos_of_coco
from small_detectron2 import command as small_command
from synthetic import trained, write_run
from torch import nn

from clove_hub.cli import main
from clove_hub.evaluation.result import CHANGED, Data, Record, read
from clove_hub.export.detectron2 import command, runs, suite
from clove_hub.export.detectron2.config import (
    BATCH,
    ITERATIONS,
    RATE,
    Resolved,
    require_right_setup,
    rescheduled,
    said,
    scaled,
)
from clove_hub.export.detectron2.layouts import LAYOUTS
from clove_hub.export.detectron2.tasks import TASKS, Order
from clove_hub.export.detectron2.verify import place, require_placed
from clove_hub.export.seeds import Found, count_gpus, require_same
from clove_hub.weights import Weights, load
from clove_hub.zoo.models import protocols
from clove_hub.zoo.resnets import rename

HERE = Path(__file__).parent
needs_detectron2 = pytest.mark.skipif(
    find_spec("detectron2") is None,
    reason="Detectron2 is not installed; its recorded names and shapes are checked instead",
)


@pytest.fixture(scope="module")
def backbone() -> Weights:
    return Weights("made", "a made backbone", "file", "resnet50", dict(trained("resnet50").state_dict()))


# ---- wrong set-ups ---------------------------------------------------------------------------------------------------

RIGHT: dict[str, Any] = {
    "INPUT": {"FORMAT": "RGB"},
    "MODEL": {
        "WEIGHTS": "/runs/backbone.pth",
        "PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PIXEL_STD": [58.395, 57.12, 57.375],
        "BACKBONE": {"FREEZE_AT": 0},
        "RESNETS": {
            "DEPTH": 50,
            "NUM_GROUPS": 1,
            "WIDTH_PER_GROUP": 64,
            "RES2_OUT_CHANNELS": 256,
            "STRIDE_IN_1X1": False,
        },
    },
}


def with_change(key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(RIGHT)
    *folders, last = key.split(".")
    inside = config
    for folder in folders:
        inside = inside[folder]
    inside[last] = value
    return config


def test_the_right_set_up_is_accepted() -> None:
    require_right_setup(RIGHT, RIGHT, "resnet50")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INPUT.FORMAT", "BGR", "INPUT.FORMAT is 'BGR': the backbone was trained on RGB"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], r"MODEL.PIXEL_MEAN is .* \(the order BGR\)"),
        ("MODEL.PIXEL_MEAN", [0.485, 0.456, 0.406], r"MODEL.PIXEL_MEAN is \[0.485.*trained with \[123.675"),
        (
            "MODEL.PIXEL_STD",
            [1.0, 1.0, 1.0],
            r"MODEL.PIXEL_STD is \[1.0, 1.0, 1.0\] \(the value for the Caffe weights",
        ),
        ("MODEL.PIXEL_STD", [57.375, 57.12, 58.395], r"MODEL.PIXEL_STD is .*trained with \[58.395"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "STRIDE_IN_1X1 is True"),
        ("MODEL.BACKBONE.FREEZE_AT", 1, "FREEZE_AT is 1, which freezes its stem:"),
        ("MODEL.BACKBONE.FREEZE_AT", 2, "FREEZE_AT is 2, which freezes its stem and 1 stages"),
        ("MODEL.RESNETS.DEPTH", 101, "DEPTH is 101, but the backbone is a resnet50: set 50"),
        ("MODEL.RESNETS.NUM_GROUPS", 32, "NUM_GROUPS is 32, but the backbone is a resnet50"),
        ("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "supervised weights of ImageNet"),
        ("MODEL.WEIGHTS", "detectron2://COCO-InstanceSegmentation/mask_rcnn/model.pkl", "a whole detector"),
        ("MODEL.WEIGHTS", "", "start from random weights"),
        ("MODEL.WEIGHTS", "/elsewhere/model.pth", "is not the converted backbone"),
    ],
)
def test_each_wrong_set_up_has_a_message_of_its_own(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        require_right_setup(with_change(key, value), RIGHT, "resnet50")
    assert len(str(caught.value).splitlines()) == 2, "only what is wrong is complained about"


def test_all_that_is_wrong_is_said_at_once() -> None:
    config = with_change("INPUT.FORMAT", "BGR")
    config["MODEL"]["BACKBONE"]["FREEZE_AT"] = 2
    with pytest.raises(ValueError, match=r"(?s)FORMAT.*FREEZE_AT"):
        require_right_setup(config, RIGHT, "resnet50")


def test_a_detector_is_no_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("backbone.bottom_up.stem.conv1.weight", "roi_heads.box_head.fc1.weight", "proposal_generator.x.weight")
    torch.save({"model": {name: torch.ones(2) for name in names}}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match="a Detectron2 detector, not a ResNet"):
        load(tmp_path / "detector.pth")


# ---- batch and schedule ----------------------------------------------------------------------------------------------

PROTOCOL = {BATCH: 16, RATE: 0.02, **dict(zip(ITERATIONS, (90000, (60000, 80000), 1000, 0), strict=True))}


def test_half_the_batch_takes_half_the_learning_rate_and_twice_the_iterations() -> None:
    changes = scaled(PROTOCOL, 8)
    assert changes == {
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": 180000,
        "SOLVER.STEPS": (120000, 160000),
        "SOLVER.WARMUP_ITERS": 2000,
    }
    sentence = said(PROTOCOL, 8, changes)
    assert "8 images per iteration in place of the protocol's 16" in sentence
    assert "SOLVER.BASE_LR 0.02 -> 0.01, SOLVER.MAX_ITER 90000 -> 180000" in sentence


def test_the_protocols_own_batch_changes_nothing() -> None:
    assert scaled(PROTOCOL, 16) == {}


def test_another_number_of_iterations_takes_the_schedule_with_it() -> None:
    assert rescheduled(PROTOCOL, 9000) == {"SOLVER.STEPS": (6000, 8000), "SOLVER.WARMUP_ITERS": 100}
    assert rescheduled(PROTOCOL, 270_000) == {"SOLVER.STEPS": (180_000, 240_000)}, "as Detectron2's own 3x"
    assert rescheduled(PROTOCOL, 90_000) == {}


# ---- tasks and names -------------------------------------------------------------------------------------------------


def test_every_task_has_a_protocol_a_layout_and_figures_to_stand_beside() -> None:
    for name, task in TASKS.items():
        reported = {ours for names in task.metrics.values() for ours in names.values()}
        assert set(protocols()[name].baselines["supervised"]) <= reported
        assert task.layout in LAYOUTS


RECORDED = json.loads((HERE / "detectron2_tasks.json").read_text())
RESNET = {name: tuple(shape) for name, shape in json.loads((HERE / "detectron2_resnet50.json").read_text()).items()}


def recorded(task: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a task's model, as Detectron2 0.6 builds it."""
    found = {name: tuple(shape) for name, shape in RECORDED[task]["others"].items()}
    for prefix, stages in RECORDED[task]["resnet"].items():
        found |= {
            prefix + name: shape
            for name, shape in RESNET.items()
            if name.split(".")[0] in stages and (RECORDED[task]["counters"] or not name.endswith("num_batches_tracked"))
        }
    return found


@pytest.mark.parametrize("task", TASKS)
def test_every_tensor_of_the_backbone_has_one_place_in_the_recorded_model(backbone: Weights, task: str) -> None:
    names = recorded(task)
    converted = rename(backbone.tensors, "timm", "detectron2")
    assert len(converted) == 318
    for name, tensor in converted.items():
        at = place(name, names)
        if at is None:
            assert name.endswith("num_batches_tracked")
            assert not RECORDED[task]["counters"], "only a frozen norm has no counter"
        else:
            assert names[at] == tuple(tensor.shape)
            # Detectron2 places by the end of a name: no other tensor may end in it.
            assert [other for other in names if other.endswith(f".{name}")] == [at]
    assert len([name for name in names if name not in RECORDED[task]["others"]]) == (
        318 if RECORDED[task]["counters"] else 318 - 53
    )


def test_the_c4_tasks_have_a_norm_behind_res5_and_the_pyramids_norms_where_the_protocol_says() -> None:
    for task in ("coco_c4", "voc_c4"):
        assert recorded(task)["roi_heads.res5.norm.weight"] == (2048,)
    assert "backbone.fpn_output2.norm.running_mean" in recorded("coco_fpn")
    assert "roi_heads.box_head.conv4.norm.weight" in recorded("coco_fpn")
    assert not any("fpn" in name and "norm" in name for name in recorded("lvis_fpn"))


def test_a_tensor_that_is_not_in_its_place_is_named() -> None:
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.stem = nn.Linear(2, 2)
    tensors = {"stem.weight": model.backbone.stem.weight.detach().clone(), "stem.bias": torch.zeros(2) + 7}
    with pytest.raises(ValueError, match=r"1 of 2 tensors are wrong \(backbone.stem.bias has another value"):
        require_placed(model, tensors)
    with pytest.raises(ValueError, match=r"res5.0.conv1.weight is missing"):
        require_placed(model, {"res5.0.conv1.weight": torch.ones(1)})


# ---- the command without what it needs -------------------------------------------------------------------------------


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(runs, "find_spec", lambda name: None if name in names else object())


def test_without_detectron2_its_install_page_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(command.DATA, "datasets")
    absent(monkeypatch, "detectron2", "lvis")
    for dry in ([], ["--dry-run"]):
        assert main(["downstream", "detectron2", "lvis_fpn", "--backbone", "random:resnet50", *dry]) == 2
        message = capsys.readouterr().err
        assert "not installed in this Python: detectron2: https://detectron2.readthedocs.io" in message
        assert "lvis: https://github.com/lvis-dataset/lvis-api" in message
        assert not list(tmp_path.iterdir())


def test_missing_data_and_gpus_are_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(command.DATA, str(tmp_path))
    absent(monkeypatch)
    assert main(["downstream", "detectron2", "coco_fpn", "--backbone", "random:resnet50"]) == 2
    assert "instances_train2017.json is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"finds no GPU .*--gpus 0"):
        count_gpus(None)
    with pytest.raises(ValueError, match="--gpus 8, but PyTorch finds 0"):
        count_gpus(8)
    assert count_gpus(0) == 0


@pytest.mark.parametrize(
    ("task", "architecture", "fraction", "message"),
    [
        ("coco_fpn", "vit_tiny_patch16_224", 1.0, "which Detectron2 does not build"),
        ("voc_c4", "resnet18", 1.0, "has bottlenecks in its head, but resnet18 has basic blocks"),
        ("voc_c4", "resnet50", 0.1, "--fraction takes a part of COCO's images"),
    ],
)
def test_what_a_task_cannot_have_is_refused(task: str, architecture: str, fraction: float, message: str) -> None:
    order = Order(task, "x", Path("d"), Path("o"), 0, 1, (), fraction)
    source = Weights("made", "a made backbone", "file", architecture, {})
    with pytest.raises(ValueError, match=message):
        suite.prepare(order, TASKS[task], source, 0)


def test_a_folder_with_runs_of_another_set_up_is_not_gone_on_with(tmp_path: Path) -> None:
    facts = {"config": {"SOLVER": {"BASE_LR": 0.02, "STEPS": [1, 2]}}, "backbone": "a"}
    path = tmp_path / "setup.json"
    require_same(path, facts)
    path.write_text(json.dumps(facts))
    require_same(path, facts)
    other = {"config": {"SOLVER": {"BASE_LR": 0.01, "STEPS": [1, 2]}}, "backbone": "a"}
    with pytest.raises(ValueError, match=r"other settings \(config.SOLVER.BASE_LR: 0.02 -> 0.01\)"):
        require_same(path, other)


# ---- results ---------------------------------------------------------------------------------------------------------


def test_figures_get_our_names_and_a_detector_that_finds_nothing_has_0() -> None:
    scores: dict[str, dict[str, float | None]] = {
        "bbox": {"AP": 40.6, "AP50": 60.0, "AP75": 44.0, "APs": None},
        "segm": {"AP": 35.4, "AP50": 57.0, "AP75": 38.0},
    }
    found = {"APbb": 40.6, "AP50bb": 60.0, "AP75bb": 44.0, "APmk": 35.4, "AP50mk": 57.0, "AP75mk": 38.0}
    assert runs.metrics(TASKS["coco_c4"], scores) == (found, [])
    # Detectron2 then has no figures of masks at all, and those of boxes are NaN; DensePose says -1.
    nothing: dict[str, dict[str, float | None]] = {"bbox": dict.fromkeys(("AP", "AP50", "AP75"))}
    assert runs.metrics(TASKS["coco_c4"], nothing) == (dict.fromkeys(found, 0.0), list(found))
    dense: dict[str, dict[str, float | None]] = {
        "bbox": {"AP": 1.0},
        **{group: {"AP": -1.0} for group in ("densepose_gps", "densepose_gpsm", "densepose_segm")},
    }
    assert runs.metrics(TASKS["densepose_fpn"], dense)[1] == ["APgps", "APgpsm", "APmk"]


def test_the_table_has_the_papers_rows_below_ours() -> None:
    record = Record(
        protocol="coco_c4",
        version=1,
        model="mine",
        metrics={"APbb": 40.0, "APmk": 35.0},
        settings={"notes": ["8 images in an iteration"]},
        data=Data("COCO 2017", "f", 5000),
        seeds=(0, 1),
        deviations={"APbb": 0.2, "APmk": 0.1},
        versions={},
        date="today",
    )
    table = suite.beside_the_papers(record).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    header, mine = rows[0], rows[2]
    assert header[:1] == ["backbone"]
    assert mine[0] == "mine, 2 seeds"
    assert mine[header.index("APbb")] == "40.0 ± 0.2"
    clove = next(row for row in rows if row[0].startswith("resnet50.clove_in1k_200ep"))
    assert clove[header.index("APbb")] == "40.6"
    assert next(row for row in rows if row[0].startswith("supervised"))[header.index("APmk")] == "33.3"
    assert table[-1] == "Not as in the protocol: 8 images in an iteration."


def test_a_result_has_the_papers_rule_only_with_the_papers_config(
    backbone: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "installed", dict)
    solver = SimpleNamespace(MAX_ITER=90_000, IMS_PER_BATCH=16, BASE_LR=0.02)
    order = Order("coco_fpn", "mine", Path("data"), Path("out"), 8, 2, (), 1.0)
    found = Found(train=118_287, test=5000, fingerprint="f" * 64)
    resolved = Resolved(SimpleNamespace(SOLVER=solver), ())
    training = runs.Training(order, backbone, resolved, 8, {"config": {}})
    scores = {0: {"APbb": 40.0}, 1: {"APbb": 41.0}}
    for notes, rule in (((), "coco_fpn"), (("8 images in an iteration",), "changed")):
        record = suite.summarize(training, found, scores, notes, 3.0)
        assert (record.rule, record.split, record.weights) == (rule, "val2017", backbone.fingerprint)
        assert (record.metrics, record.seeds, record.randomness) == ({"APbb": 40.5}, (0, 1), "fine-tuning")
        assert record.architecture == "resnet50"


# ---- the real Detectron2 ---------------------------------------------------------------------------------------------


@needs_detectron2
@pytest.mark.parametrize("task", TASKS)
def test_every_config_builds_as_recorded_and_holds_the_backbone(backbone: Weights, tmp_path: Path, task: str) -> None:
    from clove_hub.export.convert import write_converted
    from clove_hub.export.detectron2.config import resolve
    from clove_hub.export.detectron2.verify import require_held

    if TASKS[task].densepose:
        pytest.importorskip("densepose", reason="Detectron2's DensePose project is not installed")
    from detectron2.modeling import build_model

    weights = tmp_path / "backbone.pth"
    write_converted(backbone, "detectron2", weights)
    cfg = resolve(TASKS[task], backbone, weights, 0, []).cfg
    names = {name: tuple(tensor.shape) for name, tensor in build_model(cfg).state_dict().items()}
    assert names == recorded(task)
    assert require_held(cfg, backbone) <= 1e-5


@needs_detectron2
def test_the_resolved_config_is_the_protocol_and_a_wrong_change_is_refused(backbone: Weights) -> None:
    from clove_hub.export.detectron2.config import resolve

    weights = Path("backbone.pth")
    cfg = resolve(TASKS["voc_c4"], backbone, weights, 8, []).cfg
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS, solver.IMS_PER_BATCH) == (
        24000,
        (18000, 22000),
        100,
        16,
    )
    assert cfg.MODEL.RESNETS.NORM == "SyncBN"
    assert cfg.TEST.PRECISE_BN.ENABLED
    cityscapes = resolve(TASKS["cityscapes_fpn"], backbone, weights, 8, []).cfg
    assert "COCO" not in cityscapes.MODEL.WEIGHTS
    assert cityscapes.SOLVER.IMS_PER_BATCH == 32

    few = resolve(TASKS["coco_fpn"], backbone, weights, 0, [BATCH, "4", "SOLVER.MAX_ITER", "7"])
    assert (few.cfg.SOLVER.BASE_LR, few.cfg.SOLVER.MAX_ITER) == (0.005, 7)
    assert few.cfg.SOLVER.STEPS == (5, 6)
    assert "SOLVER.STEPS (5, 6), to fit SOLVER.MAX_ITER" in few.notes
    given = resolve(TASKS["coco_fpn"], backbone, weights, 8, ["SOLVER.MAX_ITER", "9000", "SOLVER.STEPS", "(8000,)"])
    assert (given.cfg.SOLVER.STEPS, given.cfg.SOLVER.WARMUP_ITERS) == ((8000,), 100)
    assert few.cfg.MODEL.RESNETS.NORM == "BN"
    assert any("BN in place of SyncBN" in note for note in few.notes)
    for changes, message in (
        (["MODEL.RESNETS.DEPTH", "101"], "DEPTH is 101"),
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT is 'BGR'"),
        (["SOLVER.NOTHING", "1"], "SOLVER.NOTHING 1: Non-existent key"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER many"),
        (["SOLVER.MAX_ITER"], "has no value"),
        ([BATCH, "12"], "is not divisible among 8 GPUs: choose a multiple of 8"),
        ([RATE, "-0.1"], r"SOLVER.BASE_LR is -0.1; expected a finite number from 0"),
        ([RATE, "1e400"], "SOLVER.BASE_LR is inf; expected a finite number from 0"),
        ([RATE, "nan"], "SOLVER.BASE_LR nan: Type mismatch"),
        (["SOLVER.MOMENTUM", "-0.9"], "SOLVER.MOMENTUM is -0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve(TASKS["coco_fpn"], backbone, weights, 8, changes)


@needs_detectron2
def test_a_wrong_feature_map_is_found(backbone: Weights, tmp_path: Path) -> None:
    from clove_hub.export.convert import write_converted
    from clove_hub.export.detectron2.config import resolve
    from clove_hub.export.detectron2.verify import require_held

    weights = tmp_path / "backbone.pth"
    write_converted(backbone, "detectron2", weights)
    cfg = resolve(TASKS["coco_fpn"], backbone, weights, 0, []).cfg
    wrong = cfg.clone()
    wrong.MODEL.RESNETS.STRIDE_IN_1X1 = True
    with pytest.raises(ValueError, match="res3 of the detector differs from timm's by"):
        require_held(wrong, backbone)
    wrong = cfg.clone()
    wrong.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="does not normalize images as the backbone"):
        require_held(wrong, backbone)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos_of_coco(tmp_path_factory.mktemp("datasets"))


def plain_tools_open(seed: Path, imports: str) -> None:
    """Opens a trained seed in a process that has Detectron2, and nothing of ours but what is imported here."""
    code = f"""
import sys
import torch
{imports}
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
state = DefaultPredictor(cfg).model.state_dict()
trained = torch.load(sys.argv[2], weights_only=False)["model"]
assert len(trained) > 300 and all(torch.equal(state[name], trained[name]) for name in trained)
assert {bool(imports)} or "clove_hub" not in sys.modules
"""
    words = [sys.executable, "-W", "ignore", "-c", code, str(seed / "config.yaml"), str(seed / "model_final.pth")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((seed / "clove_hub.json").read_text())["architecture"] == "resnet50"


@needs_detectron2
@pytest.mark.parametrize("task", ["coco_fpn", "coco_c4"])
def test_a_task_trains_with_falling_loss_goes_on_where_it_stopped_and_leaves_results(
    photos: Path, tmp_path: Path, task: str
) -> None:
    write_run(tmp_path / "run", "resnet50")
    out = tmp_path / "out"

    def start(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            **small_command(task, tmp_path / "run", photos, out, *more), capture_output=True, cwd=tmp_path, check=False
        )

    if task == "coco_fpn":
        rehearsed = start("--dry-run", *SMALL)
        assert rehearsed.returncode == 0, rehearsed.stderr
        assert "cost: 1 runs of 30 iterations of 2 images" in rehearsed.stdout
        assert not out.exists()

    done = start(*SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every tensor is in its place" in done.stdout
    rows = [json.loads(line) for line in (out / "seed_0" / "metrics.json").read_text().splitlines()]
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    assert losses[-1] < losses[0]
    record = read(out / "results.json")
    assert record.protocol == task
    assert record.seeds == (0,)
    assert record.versions["detectron2"]
    assert {"APbb", "APmk"} <= record.metrics.keys()
    assert "| supervised" in (table := (out / "table.md").read_text())
    assert "trained on 8 images, the data set has 118287" in table
    assert record.rule == CHANGED
    assert not (out / "rehearsal").exists()
    plain_tools_open(out / "seed_0", "import clove_hub.export.detectron2.heads" if task == "coco_c4" else "")

    if task == "coco_fpn":  # as if it had been stopped half-way
        (out / "results.json").unlink()
        (out / "seed_0" / "scores.json").unlink()
        without_a_stop = (out / "seed_0" / "model_final.pth").rename(out / "without_a_stop.pth")
        (out / "seed_0" / "last_checkpoint").write_text("model_0000019.pth")
        again = start(*SMALL)
        assert again.returncode == 0, again.stderr[-3000:]
        assert "Starting training from iteration 20" in again.stdout + again.stderr
        assert read(out / "results.json").settings == record.settings
        assert read(out / "results.json").metrics == record.metrics
        ours, theirs = (
            torch.load(path, weights_only=False)["model"]
            for path in (out / "seed_0" / "model_final.pth", without_a_stop)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "bit for bit"
        other = start(*SMALL, "SOLVER.WEIGHT_DECAY", "0.1")
        assert other.returncode == 2
        assert "other settings (config.SOLVER.WEIGHT_DECAY" in other.stderr


@needs_detectron2
def test_a_low_data_setting_trains_on_the_same_images_as_the_torchvision_suite(
    photos: Path, backbone: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    from clove_hub.data.files import chosen
    from clove_hub.export.detectron2.config import resolve
    from clove_hub.export.detectron2.train_net import few

    annotations = photos / "coco" / "annotations" / "instances_train2017.json"
    cfg = resolve(TASKS["coco_fpn"], backbone, Path("backbone.pth"), 0, [], 0.5).cfg
    cfg.DATASETS.TRAIN = ("few_photos",)
    register_coco_instances("few_photos", {}, str(annotations), str(photos / "coco" / "train2017"))
    try:
        found = [record["image_id"] for record in few(cfg, 0.5)]
    finally:
        DatasetCatalog.remove("few_photos")
    every = [image["id"] for image in json.loads(annotations.read_text())["images"]]
    assert sorted(found) == chosen(every, 0.5, 0)
    assert len(found) == 4


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_a_short_run_has_no_step_at_its_end(iterations: int) -> None:
    schedule = {
        "SOLVER.MAX_ITER": 8000,
        "SOLVER.STEPS": (5333, 7111),
        "SOLVER.WARMUP_ITERS": 800,
        "TEST.EVAL_PERIOD": 0,
    }
    changed = rescheduled(schedule, iterations)
    assert all(0 < step < iterations for step in changed["SOLVER.STEPS"])
