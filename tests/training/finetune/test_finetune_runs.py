"""Fine-tuning runs with torchvision: trained, scored, drawn; stopped and gone on with; refused."""

import copy
import csv
import json
import math
import multiprocessing
import re
import signal

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from fine_tuning import DETECTOR, SEGMENTER, downstream, put, rows
from PIL import Image
from safetensors.torch import load_file
from synthetic import write_run

from clove_hub.cli import main
from clove_hub.evaluation.result import read
from clove_hub.runs import newest_checkpoint
from clove_hub.training.finetune import dataset
from clove_hub.training.finetune import settings as finetune_settings
from clove_hub.training.run.folder import RunFolder
from clove_hub.weights import load

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]
pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


@pytest.mark.parametrize(
    ("task", "backbone", "metric"),
    [
        ("instances", "random:test_resnet", "APmk"),
        ("keypoints", "random:test_resnet", "APkp"),
        ("segmentation", "random:resnet18", "mIoU"),
    ],
)
def test_every_task_is_trained_scored_and_drawn(task, backbone, metric, coco_photos, streets, tmp_path):
    data, base = (streets, SEGMENTER) if task == "segmentation" else (coco_photos, DETECTOR)
    assert downstream(task, data, tmp_path, base, backbone) == 0
    record = read(tmp_path / "results.json")
    assert record.protocol == f"torchvision-{task}"
    assert 0 <= record.metrics[metric] <= 100
    assert record.data.samples == (2 if task == "segmentation" else 4)
    assert record.settings["batch"]["total"] == 2
    assert record.versions["torchvision"]
    assert record.random_weights  # others for each seed
    assert record.architecture == backbone.removeprefix("random:")
    assert record.seconds > 0
    figure = "IoU" if task == "segmentation" else metric
    assert all(0 <= each[figure] <= 100 for each in record.items.get("class", {}).values())
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 1
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert (figure in table[0]) == bool(record.items.get("class"))
    assert {row[0] for row in table[1:]} >= set(record.absent)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300
    assert "layer4.0.conv2.weight" in "".join(load_file(tmp_path / "model.safetensors"))
    assert downstream(task, data, tmp_path, base, backbone) == 0  # again: there is nothing to do
    assert read(tmp_path / "results.json").date == record.date


def test_a_detector_learns_a_quarter_of_the_photos(coco_photos, tmp_path):
    changes = {"schedule__steps": 12, "optimizer__learning_rate": 0.04, "data__fraction": 0.25, "run__precise_bn": 0}
    assert downstream("detection", coco_photos, tmp_path, DETECTOR, **changes) == 0
    assert "APbb" in read(tmp_path / "results.json").metrics
    assert len(json.loads((tmp_path / "train_images.json").read_text())["images"]) == 2
    losses = [row["loss"] for row in rows(tmp_path)]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])


def test_the_images_that_are_scored_can_be_limited(coco_photos, tmp_path):
    changes = {"data__test_images": 2, "data__train_images": 3, "data__test": "train", "schedule__steps": 1}
    assert downstream("detection", coco_photos, tmp_path, DETECTOR, **changes) == 0
    assert read(tmp_path / "results.json").data.samples == 2
    assert len(json.loads((tmp_path / "train_images.json").read_text())["images"]) == 3


EXTRAS = {
    "plain": {},
    "average and AdamW": {"optimizer.name": "adamw", "optimizer.ema": 0.9, "optimizer.clip_norm": 0.5},
    "best": {"run.evaluate_every": 1, "run.precise_bn": 0, "optimizer.ema": 0.9},
    "large-scale jitter": {"images.lsj": 96},
}


@pytest.mark.parametrize(
    "extra", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in EXTRAS if name != "plain")]
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(extra, coco_photos, tmp_path, monkeypatch):
    task, data = "detection", coco_photos
    base = DETECTOR | {"schedule.steps": 3, "run.pictures": 0} | EXTRAS[extra]
    assert downstream(task, data, tmp_path / "straight", base) == 0

    append = RunFolder.append

    def interrupted(self, name, row):
        append(self, name, row)
        if row["step"] == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "append", interrupted)
    assert downstream(task, data, tmp_path / "stopped", base) == 75
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert downstream(task, data, tmp_path / "stopped", base) == 0

    straight, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    timed = ("images_per_second",)
    pair = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(tmp_path / n)]
        for n in ("straight", "stopped")
    )
    assert next(pair) == next(pair)
    assert read(tmp_path / "straight/results.json").metrics == read(tmp_path / "stopped/results.json").metrics


def test_the_average_of_the_weights_is_scored_and_kept(coco_photos, tmp_path):
    base = DETECTOR | {"schedule.steps": 3, "run.precise_bn": 0, "run.save_every": 1, "run.keep": 9}
    assert downstream("detection", coco_photos, tmp_path, base, optimizer__ema=0.5, optimizer__learning_rate=0.5) == 0
    written = load_file(tmp_path / "model.safetensors")
    steps = [load_file(tmp_path / f"checkpoints/step_0000000{n}/model.safetensors") for n in (1, 2, 3)]
    name = "backbone.body.layer1.0.conv1.weight"
    # The share that stays is (1 + step) / (10 + step), counted from 0, and at most the setting.
    mean = load("random:test_resnet").tensors["layer1.0.conv1.weight"].double()
    for step, weights in enumerate(steps):
        stays = min(0.5, (1 + step) / (10 + step))
        own = weights[f"network.{name.replace('body.', 'body.model.')}"].double()
        mean = stays * mean + (1 - stays) * own
    torch.testing.assert_close(written[name.replace("body.", "body.model.")].double(), mean, rtol=1e-6, atol=1e-7)


def test_a_signal_during_the_evaluation_ends_the_run_with_its_exit_code(coco_photos, tmp_path, monkeypatch):
    from clove_hub.training.finetune import fine_tune

    found_in = fine_tune.found_in

    def signaled(*args):
        for each in found_in(*args):
            yield each
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(fine_tune, "found_in", signaled)
        with pytest.raises(SystemExit) as ended:
            downstream("detection", coco_photos, tmp_path, DETECTOR)
    assert ended.value.code == 75
    assert not {"results.json", "lock.json"} & {path.name for path in tmp_path.iterdir()}
    assert downstream("detection", coco_photos, tmp_path, DETECTOR) == 0
    assert (tmp_path / "results.json").is_file()


def test_classes_are_absent_that_no_scored_image_has(coco_photos, tmp_path):
    assert downstream("detection", coco_photos, tmp_path, DETECTOR, data__test_images=1) == 0
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        counted = {row["class"]: int(row["instances"]) for row in csv.DictReader(file)}
    absent = {name for name, count in counted.items() if not count}
    assert absent
    assert set(read(tmp_path / "results.json").absent) == absent


def test_the_best_network_by_ap_is_kept_and_reported(coco_photos, tmp_path, monkeypatch):
    """Of three scorings, whose scores are made up, the second is best."""
    from clove_hub.training.finetune import fine_tune

    given, evaluate = iter([10.0, 30.0, 20.0]), fine_tune.evaluate

    def scored(*args, **options):
        found = evaluate(*args, **options)
        return found._replace(metrics={**found.metrics, "APbb": next(given)}) if options else found

    monkeypatch.setattr(fine_tune, "evaluate", scored)
    base = DETECTOR | {"run.precise_bn": 0, "run.keep": 9, "schedule.steps": 5, "run.pictures": 0}
    assert downstream("detection", coco_photos, tmp_path, base, run__evaluate_every=2) == 0
    found = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["step"], row["APbb"]) for row in found] == [(2, 10.0), (4, 30.0), (5, 20.0)]
    written = load_file(tmp_path / "model.safetensors")
    for step in (2, 4, 5):
        weights = load_file(tmp_path / f"checkpoints/step_0000000{step}/model.safetensors")
        assert all(torch.equal(written[name], weights[name]) for name in written) == (step == 4)
    record = read(tmp_path / "results.json")
    assert (record.settings["steps"], record.settings["scored_step"], record.rule) == (5, 4, "changed")


def test_a_gradient_is_clipped_as_torch_clips_it(streets, tmp_path):
    """The steps of SGD without momentum are not longer than rate times limit."""
    base = SEGMENTER | {"schedule.steps": 1, "optimizer.momentum": 0, "optimizer.weight_decay": 0, "run.precise_bn": 0}
    moved = {}
    for limit in (0.01, "null"):
        out = tmp_path / str(limit)
        changes = {"optimizer__clip_norm": limit, "optimizer__learning_rate": 8.0}  # of a batch of 16
        assert downstream("segmentation", streets, out, base, **changes) == 0
        after = load_file(out / "model.safetensors")
        start = {f"backbone.body.model.{k}": v for k, v in load("random:test_resnet").tensors.items()}
        names = [name for name in start if name in after and "running" not in name and "num_batches" not in name]
        moved[limit] = torch.stack([(after[name] - start[name]).double().norm() for name in names]).norm()
    assert 0 < moved[0.01] <= 0.01 * 1.0001 < moved["null"]


class Scaled(torch.amp.GradScaler):
    """float16's scaler, on the CPU, that doubles its scale after each step."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=4.0, growth_interval=1)


def test_the_scale_of_float16_goes_on_after_a_stop(streets, tmp_path, monkeypatch):
    from clove_hub.training.finetune import fine_tune

    make = fine_tune.make_accelerator
    scales = []

    def scaled(*args):
        accelerator = make("bf16", *args[1:])
        accelerator.scaler = Scaled()
        scales.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(fine_tune, "make_accelerator", scaled)
    base = SEGMENTER | {"schedule.steps": 4, "run.save_every": 2, "run.precise_bn": 0}
    assert downstream("segmentation", streets, tmp_path, base) == 0
    (tmp_path / "results.json").unlink()
    straight = load_file(tmp_path / "model.safetensors")
    for path in (tmp_path / "checkpoints/step_00000004").iterdir():
        path.unlink()
    assert downstream("segmentation", streets, tmp_path, base) == 0
    assert scales[0].get_scale() == scales[1].get_scale() == 4.0 * 2**4
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_float16_is_refused_without_an_accelerator(streets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert downstream("segmentation", streets, tmp_path, SEGMENTER, run__precision="fp16") == 2
    assert "choose bf16 or fp32 on a CPU" in capsys.readouterr().err


def test_cityscapes_is_fine_tuned_on_and_absent_classes_are_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        photos, truths = (tmp_path / "data" / kind / split / "ulm" for kind in ("leftImg8bit", "gtFine"))
        photos.mkdir(parents=True)
        truths.mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 255, (40, 64, 3), dtype=np.uint8)
            ids = rng.choice([0, 7, 26], (40, 64)).astype(np.uint8)  # void, road, car
            Image.fromarray(pixels).save(photos / f"ulm_{number}_leftImg8bit.png")
            Image.fromarray(ids).save(truths / f"ulm_{number}_gtFine_labelIds.png")
    assert downstream("segmentation", tmp_path / "data", tmp_path / "out", SEGMENTER, "random:resnet18") == 0
    record = read(tmp_path / "out" / "results.json")
    assert record.items["class"]["road"].keys() == {"IoU", "pixels"}
    assert len(record.absent) == 17
    assert "road" not in record.absent
    assert (tmp_path / "out" / "pictures" / "ulm" / "ulm_0_leftImg8bit.jpg").is_file()
    assert (
        "classes without a validation image, which the scores do not cover: sidewalk, building"
        in capsys.readouterr().err
    )


def test_the_number_of_workers_changes_nothing(streets, tmp_path):
    for workers in (0, 2):
        assert downstream("segmentation", streets, tmp_path / str(workers), SEGMENTER, data__workers=workers) == 0
    none, two = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "2"))
    assert all(torch.equal(none[name], two[name]) for name in none)


def test_training_is_bfloat16_and_evaluation_float32(coco_photos, tmp_path, monkeypatch):
    from clove_hub.training.finetune import fine_tune, networks

    seen = {"training": set(), "evaluation": set()}

    def watched(function, phase, place):
        def run(*arguments):
            body = networks.body_of(arguments[place])
            hook = body.layer1.register_forward_hook(lambda _, __, out: seen[phase].add(out.dtype))
            found = function(*arguments)
            hook.remove()
            return found

        return run

    monkeypatch.setattr(fine_tune, "train", watched(fine_tune.train, "training", 1))
    monkeypatch.setattr(fine_tune, "evaluate", watched(fine_tune.evaluate, "evaluation", 0))
    assert (
        downstream(
            "instances", coco_photos, tmp_path, DETECTOR, "random:resnet18", run__precision="bf16", run__pictures=0
        )
        == 0
    )
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))
    assert seen == {"training": {torch.bfloat16}, "evaluation": {torch.float32}}


def test_a_folder_of_another_run_is_not_gone_on_with(streets, tmp_path, capsys):
    assert downstream("segmentation", streets, tmp_path, SEGMENTER) == 0
    assert downstream("segmentation", streets, tmp_path, SEGMENTER, optimizer__learning_rate=0.5) == 2
    assert "optimizer.learning_rate: 0.003 -> 0.5" in capsys.readouterr().err
    assert downstream("segmentation", streets, tmp_path, SEGMENTER, backbone="random:resnet34") == 2
    assert "another backbone" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(streets, tmp_path, caplog):
    many = {"run__save_every": 1, "schedule__steps": 3}
    assert downstream("segmentation", streets, tmp_path, SEGMENTER, **many) == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000003"]
    (tmp_path / "checkpoints/step_00000003/model.safetensors").write_bytes(b"cut short")
    (tmp_path / "results.json").unlink()
    assert newest_checkpoint(tmp_path, ("step",))[1]["step"] == 2
    assert "skipping the damaged checkpoint" in caplog.text


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_and_there_is_a_way_on(
    streets, tmp_path, monkeypatch, capsys
):
    """The loss alone would not show it; and what the run says about going on works."""
    base = SEGMENTER | {"run.save_every": 1, "schedule.steps": 3}
    backward = Accelerator.backward

    def burst(self, loss, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        backward(self, loss, **kwargs)

    calls: list[int] = []
    monkeypatch.setattr(Accelerator, "backward", burst)
    assert downstream("segmentation", streets, tmp_path, base) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"gradient's norm (inf|nan); the optimizer has not stepped. The same command resumes from step 2", said
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    monkeypatch.undo()
    lower = base | {"optimizer.learning_rate": 0.001}
    assert downstream("segmentation", streets, tmp_path, lower) == 2
    assert "add run.amend=true" in " ".join(capsys.readouterr().err.split())
    assert downstream("segmentation", streets, tmp_path, lower | {"run.amend": "true"}) == 0
    record = read(tmp_path / "results.json")
    assert record.rule == "changed"
    assert record.settings["changes"] == [{"step": 2, "changed": ["optimizer.learning_rate: 0.003 -> 0.001"]}]


@pytest.mark.slow
def test_the_benchmark_compares_on_the_same_terms(coco_photos, tmp_path):
    from benchmarks import downstream as benchmark

    write_run(tmp_path / "run", "test_resnet")
    sizes = {"images.shortest_edge": "[64]", "images.longest_edge": 96, "network.rois": 4, "network.proposals": 20}
    changes = sizes | {"schedule.steps": 1, "schedule.warmup_steps": 0, "run.precise_bn": 0, "run.pictures": 0}
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    what = ["--data", str(coco_photos), "--backbone", str(tmp_path / "run"), "--categories", "person"]
    how = ["--device", "cpu", "--rounds", "1", *(f"{key}={value}" for key, value in changes.items())]
    benchmark.main([*what, *places, *how])
    found = json.loads((tmp_path / "downstream_cpu.json").read_text())
    assert [side["model"] for side in found["sides"].values()] == ["run", "random:test_resnet"]
    assert found["gains"]["against0"]["metric"] == "APbb"
    assert all(len(values) == 1 for values in found["losses"].values())
    kept = json.loads((tmp_path / "runs/data/annotations/instances_train.json").read_text())
    assert [category["name"] for category in kept["categories"]] == ["person"]
    assert {row["category_id"] for row in kept["annotations"]} == {kept["categories"][0]["id"]}


def test_a_pretrained_run_is_fine_tuned(streets, tmp_path):
    write_run(tmp_path / "run", "resnet18")
    assert downstream("segmentation", streets, tmp_path / "out", SEGMENTER, backbone=str(tmp_path / "run")) == 0
    assert read(tmp_path / "out/results.json").weights == load(tmp_path / "run").fingerprint


def test_a_backbone_that_gives_no_pyramid_or_is_absent_is_refused(coco_photos, tmp_path, capsys):
    assert downstream("detection", coco_photos, tmp_path / "x", DETECTOR, backbone="random:efficientvit_m0") == 2
    assert "does not give four feature maps" in capsys.readouterr().err
    assert downstream("detection", coco_photos, tmp_path / "x", DETECTOR, backbone=str(tmp_path / "none")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_folder_without_annotations_is_refused_before_anything_runs(tmp_path, capsys):
    assert downstream("detection", tmp_path, tmp_path / "out", DETECTOR) == 2
    error = capsys.readouterr().err
    assert "annotations/instances_train.json" in error
    assert "instances_train2017.json" in error
    assert downstream("segmentation", tmp_path, tmp_path / "out", SEGMENTER) == 2
    assert "ImageSets/Segmentation" in capsys.readouterr().err
    assert downstream("segmentation", tmp_path / "none", tmp_path / "out", SEGMENTER) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_splits_of_two_data_sets_are_refused(made, tmp_path, capsys):
    folder, document = made
    put(folder, document, "train")
    document["categories"][0]["name"] = "dog"
    put(folder, document, "val")
    assert downstream("detection", folder, tmp_path / "out", DETECTOR) == 2
    assert "different categories" in capsys.readouterr().err


def test_an_image_of_another_size_or_none_at_all_is_named(made, tmp_path, capsys):
    folder, document = made
    before = multiprocessing.active_children()
    document["images"][0]["width"] = 65
    put(folder, document)
    assert downstream("detection", folder, tmp_path / "out", DETECTOR, data__workers=1) == 2
    error = capsys.readouterr().err
    assert "2 of 4 images cannot be used: " in error
    assert "1.jpg: 64 x 48 pixels, its annotations are for 65 x 48" in error
    assert f"`clove-hub check {folder} --task detection`" in error
    assert "Traceback" not in error
    assert set(multiprocessing.active_children()) <= set(before)  # the worker has ended, and nobody waits for it
    (folder / "train" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.jpg: not an image"):
        dataset.read_pixels(folder / "train" / "1.jpg")


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.totl=2", "did you mean 'total'"),
        ("bach.total=2", "did you mean 'batch'"),
        ("batch.total", "is not of the form section.key=value"),
        ("batch.total=two", "expected int"),
        ("batch.total=0", "must be at least 1"),
        ("data.fraction=10", "must be above 0 and at most 1"),
        ("images.shortest_edge=[10]", "at least 32"),
        ("images.longest_edge=100", "must be at least images.shortest_edge=800"),
        ("images.crop=100", "unknown key images.crop"),
        ("network.head=deep", "choose one of mlp, conv"),
        ("schedule.decay_at=[0.9,0.5]", "rising fractions"),
        ("network.trainable_layers=6", "must be from 0 (none) to 5 (all)"),
        ("optimizer.learning_rate=0", "must be above 0"),
        ("optimizer.clip_norm=0", "must be above 0, or null"),
        ("optimizer.ema=1", "such as 0.9999, or null"),
        ("run.evaluate_every=0", "must be at least 1"),
        ("images.lsj=8", "at least 32"),
        ("schedule.steps=[", "not valid YAML"),
    ],
)
def test_wrong_settings_are_named(override, message, tmp_path, capsys):
    assert (
        main(["downstream", "torchvision", "detection", "--backbone", "random:resnet18", "--data", ".", override]) == 2
    )
    assert message in capsys.readouterr().err


def test_settings_are_typed_and_written_out_whole():
    settings = finetune_settings.read_settings("instances", ["optimizer.weight_decay=1e-5", "schedule.decay_at=[0.5]"])
    assert settings.optimizer.weight_decay == 1e-5  # YAML reads 1e-5 as a string
    assert settings.schedule.decay_at == (0.5,)
    plain = finetune_settings.as_sections(settings)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["images"]["shortest_edge"] == [640, 672, 704, 736, 768, 800]
    other = copy.deepcopy(plain)
    other["run"]["log_every"] = 7
    assert finetune_settings.differences(plain, other) == []
    other["run"]["seed"] = 7
    assert finetune_settings.differences(plain, other) == ["run.seed: 0 -> 7"]


def test_adamw_has_a_rate_of_its_own():
    def optimizer(*words: str):
        return finetune_settings.read_settings("detection", words).optimizer

    assert (optimizer().learning_rate, optimizer().weight_decay) == (0.02, 1e-4)
    usual = optimizer("optimizer.name=adamw")
    assert (usual.learning_rate, usual.weight_decay) == (1e-4, 0.05)
    given = optimizer("optimizer.name=adamw", "optimizer.learning_rate=3e-4")
    assert (given.learning_rate, given.weight_decay) == (3e-4, 0.05)


def test_the_best_network_is_not_changed_after_it_was_scored():
    with pytest.raises(ValueError, match=r"add run\.precise_bn=0"):
        finetune_settings.read_settings("segmentation", ["run.evaluate_every=100"])
    words = ["run.evaluate_every=100", "run.precise_bn=0"]
    assert finetune_settings.read_settings("segmentation", words).run.evaluate_every == 100


def test_a_missing_package_is_named_with_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("clove_hub.command.find_spec", lambda name: None)
    assert downstream("detection", tmp_path, tmp_path, DETECTOR) == 2
    assert "torchvision and pycocotools must be installed for this: pip install 'clove-hub[downstream]'" in (
        capsys.readouterr().err
    )
