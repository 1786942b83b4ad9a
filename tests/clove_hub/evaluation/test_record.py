"""The record of a result: what it holds, how it is written and read, and that it identifies the weights."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import scenes
import timm
import torch
from synthetic import write_run

from clove_hub.cli import main
from clove_hub.data.files import Data
from clove_hub.evaluation import result
from clove_hub.evaluation.result import Record
from clove_hub.evaluation.run import run_protocol
from clove_hub.weights import Preprocessing, fingerprint, load, load_backbone
from clove_hub.weights.weights import architecture_of

PLAIN = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), crop_pct=1.0)


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    return scenes.class_images(tmp_path_factory.mktemp("classes"))


def record(**changes) -> Record:
    known = Record(
        protocol="knn",
        version=1,
        rule="wu2018",
        split="val",
        model="m",
        architecture="resnet18",
        weights="a" * 64,
        metrics={"top1": 50.0},
        deviations={},
        seeds=(0,),
        randomness="",
        random_weights=False,
        absent=("cow",),
        left_out=(("torn.jpg", "cannot be read"),),
        data=Data("d", "0" * 64, 4),
        settings={"batch": 2, "levels": [-1]},
        preprocessing={"mean": [0.5, 0.5, 0.5]},
        items={"class": {"cat": {"top1": 50.0, "images": 2}}},
        seconds=1.5,
        versions={"torch": "2"},
        date="now",
    )
    return dataclasses.replace(known, **changes)


FORMAT_1 = {
    "format": 1,
    "protocol": "knn",
    "version": 1,
    "model": "m",
    "metrics": {"top1": 50.0},
    "settings": {"batch": 2},
    "data": {"name": "d", "fingerprint": "0" * 64, "samples": 4},
    "seeds": [0],
    "deviations": {},
    "versions": {"torch": "2"},
    "date": "2025-01-01",
}
"""As version 0.1 wrote it."""


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    for one in (record(), record(seeds=(1, 2), split="", left_out=(), absent=(), items={}, seconds=None)):
        result.write(one, tmp_path / "new" / "result.json")
        assert result.read(tmp_path / "new" / "result.json") == one


def test_a_record_of_format_1_is_read_and_what_it_lacks_is_none(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(FORMAT_1))
    old = result.read(path)
    assert (old.metrics, old.seeds, old.data.samples) == ({"top1": 50.0}, (0,), 4)
    lacking = ("rule", "split", "architecture", "weights", "randomness", "random_weights", "absent", "left_out")
    assert all(getattr(old, name) is None for name in (*lacking, "preprocessing", "items", "seconds"))


NESTED: list = []
for _ in range(60):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"cannot be read as JSON \(the file is empty"),
        ("[]", "is not a result"),
        ("{}", "is not a result"),
        ('{"format": 2}', "is not a result"),
        ('{"format": [2]}', "is not a result"),
        ("[" * 100_000, r"cannot be read as JSON \(it is nested too deeply"),
        ({"settings": {"a": NESTED}}, "has lists or objects nested more than 50 deep"),
        ({"format": 3}, "is not a result of format 2.*use the version of clove-hub that wrote it"),
        ({"more": 1}, "is not a result"),
        ({"metrics": [50.0]}, r"metrics=\[50.0\] is a list, expected dict"),
        ({"metrics": {"top1": "50"}}, "top1 is not a finite number"),
        ({"metrics": {"top1": float("nan")}}, "top1 is not a finite number"),
        ({"items": {"class": {"cat": {"top1": None}}}}, "class/cat/top1 is not a finite number"),
        ({"items": {"class": 3}}, "class is not a finite number"),
        ({"items": {"class": {"cat": 3.0}}}, "class/cat is not a finite number"),
        ({"items": {"class": {"cat": {"IoU": {"a": 3.0}}}}}, "class/cat/IoU is not a finite number"),
        ({"metrics": {"top1": 10**400}}, "top1 is not a finite number"),
        ({"metrics": {}}, "has 0 figures"),
        ({"deviations": {"top2": 1.0}}, "deviations of top2"),
        ({"data": {"name": "d", "fingerprint": "f", "samples": 0}}, "over 0 samples, with deviations"),
        ({"seeds": ["zero"]}, r"seeds\[0\]='zero' is a str, expected int"),
        ({"data": 3}, "data=3: expected an object with name, fingerprint and samples"),
        ({"data": {"name": "d", "fingerprint": "f", "samples": "four"}}, "data.samples='four' is a str"),
        ({"left_out": [["a.jpg"]]}, "left_out"),
    ],
)
def test_what_is_no_record_is_refused_by_its_path(content, message, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(content if isinstance(content, str) else json.dumps(result.plain(record()) | content))
    with pytest.raises(ValueError, match=rf"(?s)result\.json.*{message}"):
        result.read(path)


def test_a_figure_that_is_not_finite_is_never_written(tmp_path):
    for change in ({"metrics": {"top1": float("nan")}}, {"deviations": {"top1": float("inf")}}):
        with pytest.raises(ValueError, match="top1 of m, which is not a finite number"):
            result.write(record(**change), tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    result.write(record(), path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"result\.json cannot be written: No space left on device"):
        result.write(record(metrics={"top1": 99.0}), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    os.link(path, tmp_path / "as_it_was")
    result.write(record(metrics={"top1": 99.0}), path)
    assert (tmp_path / "as_it_was").read_bytes() == before  # whoever has it open goes on reading a whole file


def test_where_no_file_can_be_it_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path, "is a folder; give a file"), (tmp_path / "file" / "a.json", "cannot be written")):
        with pytest.raises(ValueError, match=message):
            result.write(record(), out)
        monkeypatch.setattr("clove_hub.weights.backbone.load_backbone", lambda *_: pytest.fail("work was begun"))
        assert main(["evaluate", "knn", "--model", "random:test_resnet", "--data", "x", "--json", str(out)]) == 2
        assert str(out) in capsys.readouterr().err


def test_a_pipe_is_written_to_and_a_link_followed(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    (tmp_path / "real.json").write_text("old")
    result.write(record(), link)
    assert link.is_symlink()
    assert result.read(tmp_path / "real.json") == record()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    result.write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_values_names_and_architecture_and_nothing_else():
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    own = fingerprint("test_resnet", state)
    assert len(own) == 64
    channels_last = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    assert fingerprint("test_resnet", dict(reversed(channels_last.items()))) == own
    assert fingerprint("resnet10t", state) != own
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["conv1.0.weight"].view(-1)[3] += 1e-6
    assert fingerprint("test_resnet", changed) != own
    assert fingerprint("test_resnet", {f"a.{name}": tensor for name, tensor in state.items()}) != own
    flat = {name: tensor.reshape(-1) for name, tensor in state.items()}
    assert fingerprint("test_resnet", flat) != own


def test_weights_stored_in_half_precision_are_those_of_the_model_made_of_them():
    state = {name: t.half() if t.is_floating_point() else t for name, t in scenes.small_resnet().state_dict().items()}
    model = scenes.small_resnet(seed=1)
    model.load_state_dict(state)
    assert fingerprint("resnet18", model.state_dict()) == fingerprint("resnet18", state)


def test_one_model_has_one_fingerprint_wherever_it_is(tmp_path, classes):
    """In a run, as a bundle, by local-dir:, as timm reads it, and in memory."""
    write_run(tmp_path / "run", "test_resnet")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]) == 0
    found = {}
    for source in (tmp_path / "run", tmp_path / "bundle", f"local-dir:{tmp_path / 'bundle'}"):
        out = tmp_path / f"{len(found)}.json"
        assert main(["evaluate", "knn", "--model", str(source), "--data", str(classes), "--json", str(out)]) == 0
        found[str(source)] = result.read(out)
    model = timm.create_model(f"local-dir:{tmp_path / 'bundle'}", pretrained=True, num_classes=0)
    assert {one.weights for one in found.values()} == {fingerprint(architecture_of(model), model.state_dict())}
    assert {one.architecture for one in found.values()} == {"test_resnet"}
    assert len({json.dumps(one.preprocessing) for one in found.values()}) == 1


def test_what_timm_has_saved_in_half_precision_with_arguments_is_what_was_evaluated(tmp_path, classes):
    """The arguments change no tensor, but what the model computes."""
    arguments = {"output_stride": 16}
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    for name, given in (("with", arguments), ("without", {})):
        model = timm.create_model("test_resnet", num_classes=0, **given)
        model.load_state_dict(state)
        timm.models.save_for_hf(model.half(), tmp_path / name, model_args=given)
        out = tmp_path / f"{name}.json"
        source = ["--model", str(tmp_path / name), "--data", str(classes)]
        assert main(["evaluate", "correspond", *source, "size=64", "batch=4", "--json", str(out)]) == 0
        assert result.read(out).weights == load(tmp_path / name).fingerprint
    assert load(tmp_path / "with").fingerprint != load(tmp_path / "without").fingerprint


def test_a_bare_model_is_named_by_its_class(classes):
    one = run_protocol("knn", scenes.Colors(), PLAIN, classes)
    assert one.architecture == "Colors"
    assert not one.random_weights


# ---- items -----------------------------------------------------------------------------------------------------------


def test_of_classes_objects_and_pixels_the_mean_is_the_metric(classes, tmp_path):
    knn = run_protocol("knn", scenes.Colors(), PLAIN, classes, {"neighbors": 3})
    each = knn.items["class"]
    assert list(each) == ["class0", "class1", "class2"]
    assert knn.metrics["top1"] == pytest.approx(np.mean([c["top1"] for c in each.values()]))  # as many images in each
    assert [c["images"] for c in each.values()] == [4, 4, 4]

    svm = run_protocol("linear-svm", scenes.Colors(), PLAIN, classes, {"resize": 32, "crop": 32})
    assert svm.metrics["mAP"] == pytest.approx(np.mean([c["AP"] for c in svm.items["class"].values()]))

    masks = scenes.segmented_images(tmp_path / "masks")
    small = {"height": 64, "width": 96, "epochs": 2, "seeds": 3}
    for protocol, settings in (("dense-probe", small), ("retrieve", {"regions": 4})):
        found = run_protocol(protocol, scenes.Colors(), PLAIN, masks, settings)
        each = found.items["class"]
        assert found.metrics["mIoU"] == pytest.approx(np.mean([c["IoU"] for c in each.values()]))
        assert sum(c["pixels"] for c in each.values()) == 4 * 68 * 100  # four masks without their void rows
        assert found.split == ("test" if protocol == "dense-probe" else "val")

    clips = scenes.moving_clips(tmp_path / "clips", clips=2, frames=4)
    found = run_protocol("propagate", scenes.small_resnet(), PLAIN, clips, {"context": 2})
    each = found.items["object"]
    assert list(each) == ["clip0/1", "clip0/2", "clip1/1", "clip1/2"]
    for metric in ("J", "F"):
        assert found.metrics[metric] == pytest.approx(np.mean([o[metric] for o in each.values()]))


def test_the_items_of_camvid_are_those_of_its_classes(photos):
    camvid = photos.parent / "camvid"
    if not camvid.is_dir():
        pytest.skip(f"CamVid is not at hand ({camvid})")
    few = {"train_images": 4, "test_images": 2, "height": 90, "width": 120, "epochs": 1, "seeds": 1}
    backbone = load_backbone("random:test_resnet")
    found = run_protocol("dense-probe", backbone.model, backbone.preprocessing, camvid, few)
    names = {entry["name"] for entry in json.loads((camvid / "classes.json").read_text())["classes"]}
    assert found.items["class"].keys() <= names
    assert found.metrics["mIoU"] == pytest.approx(np.mean([c["IoU"] for c in found.items["class"].values()]))


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_what_was_left_out_is_said(classes, capsys, monkeypatch):
    from clove_hub.evaluation import knn

    evaluate = knn.evaluate

    def few(*arguments):
        left_out = tuple((f"{number}.jpg", "cut off") for number in range(4))
        return dataclasses.replace(evaluate(*arguments), left_out=left_out, absent=("cow", "dog"))

    monkeypatch.setattr(knn, "evaluate", few)
    assert main(["evaluate", "knn", "--model", "random:test_resnet", "--data", str(classes)]) == 0
    said = capsys.readouterr().out
    assert "4 images left out (0.jpg: cut off; 1.jpg: cut off; 2.jpg: cut off; ...)" in said
    assert "classes that never occurred: cow, dog" in said
