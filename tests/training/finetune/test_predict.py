"""A fine-tuned model in use: what `predict` writes, what `load_detector` refuses, the way over the Hub, and ONNX."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fine_tuning import DETECTOR, SEGMENTER, downstream
from loopback_hub import LoopbackHub
from patience import PATIENCE
from perfect import average_precisions
from PIL import Image
from safetensors.torch import load_file, save_file

import clove_hub
from clove_hub.cli import main
from clove_hub.runs import sha256

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")
pytest_plugins = ["downstream_fixtures"]
pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")

NAME = "acme/my-people"


@pytest.fixture(scope="module")
def people(coco_photos, tmp_path_factory) -> Path:
    """A run that has hardly learned: with one class alone, it finds something everywhere all the same."""
    out = tmp_path_factory.mktemp("runs") / "people"
    assert downstream("keypoints", coco_photos, out, DETECTOR, network__detections=5) == 0
    return out


@pytest.fixture(scope="module")
def exported(people) -> Path:
    assert main(["export", str(people), "--license", "mit"]) == 0
    return people / "bundle"


def predict(model: Path | str, images: Path, out: Path, *more: object) -> int:
    return main(["predict", str(model), str(images), "--out", str(out), "--device", "cpu", *map(str, more)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def changed(source: Path, out: Path, **changes: object) -> Path:
    """A copy of a run's model with another config.json."""
    out.mkdir()
    shutil.copy(source / "model.safetensors", out)
    config = json.loads((source / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_the_json_scores_what_the_run_did(people, coco_photos, tmp_path):
    annotations = coco_photos / "annotations" / "person_keypoints_val.json"
    assert predict(people, coco_photos / "val", tmp_path, "--annotations", annotations) == 0
    found = json.loads((tmp_path / "coco_results.json").read_text())
    recorded = json.loads((people / "results.json").read_text())["metrics"]
    truth = json.loads(annotations.read_text())
    assert len(found) >= 4
    for kind, suffix in (("bbox", "bb"), ("keypoints", "kp")):
        figures = average_precisions(truth, found, kind, "pycocotools")
        assert round(100 * figures[0], 9) == recorded[f"AP{suffix}"]  # which has nine decimals
        assert round(100 * figures[1], 9) == recorded[f"AP50{suffix}"]
    assert recorded["APbb"] > 0


def test_it_writes_a_data_set_and_pictures_and_leaves_out_what_is_broken(people, coco_photos, tmp_path, caplog):
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    for number, path in enumerate(sorted((coco_photos / "val").iterdir())[:3]):
        shutil.copy(path, photos / "inner" / f"{number}.jpg")
    (photos / "broken.jpg").write_bytes(b"no picture")
    assert predict(people, photos, tmp_path / "out", "--threshold", 0.2) == 0
    document = json.loads((tmp_path / "out" / "coco_dataset.json").read_text())
    assert [row["file_name"] for row in document["images"]] == ["inner/0.jpg", "inner/1.jpg", "inner/2.jpg"]
    assert document["info"]["left_out"][0][0] == "broken.jpg"
    assert "1 of 4 images cannot be read and are left out" in caplog.text
    assert {row["id"] for row in document["images"]} >= {row["image_id"] for row in document["annotations"]}
    assert all(row["score"] >= 0.2 and row["area"] > 0 for row in document["annotations"])
    assert document["categories"][0]["name"] == "person"
    for number in range(3):
        assert (tmp_path / "out" / "pictures" / "inner" / f"{number}.jpg").is_file()


def test_a_list_without_a_detection_is_announced(people, coco_photos, tmp_path, capsys):
    photo = next((coco_photos / "val").iterdir())
    assert predict(people, photo, tmp_path, "--threshold", 1.0, "--no-pictures") == 0
    assert json.loads((tmp_path / "coco_results.json").read_text()) == []
    assert "empty list" in capsys.readouterr().out


def test_its_example_works(people, coco_photos):
    import doctest

    photo = next((coco_photos / "val").iterdir())
    part = doctest.DocTestFinder(recurse=False).find(
        clove_hub.load_detector, globs={"fine_tuned": people, "photo": photo}
    )[0]
    assert doctest.DocTestRunner().run(part).failed == 0


def test_a_photo_is_seen_as_training_sees_it(people, tmp_path):
    """Turned the way its EXIF says: what is found lies in the upright picture."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    detector = clove_hub.load_detector(people, device="cpu")
    found = next(detector.predict([tmp_path / "turned.png"]))
    assert found.size == (90, 60)
    assert np.array_equal(found.boxes, detector.find(np.rot90(pixels, -1)).boxes)  # a view, with a negative stride


def test_a_segmenter_gives_a_class_for_each_pixel(streets, tmp_path):
    from pycocotools import mask

    assert downstream("segmentation", streets, tmp_path / "run", SEGMENTER) == 0
    assert predict(tmp_path / "run", streets / "images", tmp_path / "out") == 0
    rows = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    classes = np.asarray(Image.open(tmp_path / "out" / "masks" / "s0.jpg.png"))
    own = {row["category_id"]: mask.decode(row["segmentation"]) for row in rows if row["image_id"] == 1}
    assert classes.shape == (60, 80)
    assert own.keys() == set(np.unique(classes).tolist())
    assert all(np.array_equal(shape, classes == number) for number, shape in own.items())


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_input_is_told_in_a_sentence(people, coco_photos, tmp_path, capsys):
    photos, out = coco_photos / "val", tmp_path / "out"
    told = refusal(capsys, "predict", people, photos, "--out", out, "--threshold", 1.5)
    assert "threshold 1.5: must be a score from 0 to 1" in told
    assert "does not exist" in refusal(capsys, "predict", tmp_path / "nowhere", photos, "--out", out)
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refusal(capsys, "predict", people, tmp_path / "empty", "--out", out)
    assert "has no config.json" in refusal(capsys, "predict", tmp_path / "empty", photos, "--out", out)
    told = refusal(capsys, "evaluate", "knn", "--model", people, "--data", photos)
    assert "is a fine-tuned model, whose backbone was changed" in told
    annotations = coco_photos / "annotations" / "instances_val.json"
    document = json.loads(annotations.read_text())
    document["categories"] = [row | {"name": f"not {row['name']}"} for row in document["categories"]]
    (tmp_path / "other.json").write_text(json.dumps(document))
    told = refusal(capsys, "predict", people, photos, "--out", out, "--annotations", tmp_path / "other.json")
    assert "the file lacks 1 person" in told
    assert not out.exists()


def test_a_folder_that_is_not_what_was_trained_is_refused(people, tmp_path):
    config = json.loads((people / "config.json").read_text())
    two = [*config["categories"], config["categories"][0] | {"id": 2, "name": "cat"}]
    with pytest.raises(ValueError, match="names 2 classes, but its weights are for 1"):
        clove_hub.load_detector(changed(people, tmp_path / "classes", categories=two))
    with pytest.raises(ValueError, match=r"its sha256 is not the one in config\.json"):
        clove_hub.load_detector(changed(people, tmp_path / "sum", sha256="0" * 64))
    with pytest.raises(ValueError, match="All names and shapes must match"):
        clove_hub.load_detector(
            changed(people, tmp_path / "other", backbone={"architecture": "resnet18", "model_args": {}})
        )
    settings = config["settings"] | {"preset": "keypoints_9x"}
    with pytest.raises(ValueError, match="use the version of clove-hub that wrote it"):
        clove_hub.load_detector(changed(people, tmp_path / "preset", settings=settings))
    tensors = load_file(people / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = torch.nan
    damaged = changed(people, tmp_path / "nan")
    save_file(tensors, damaged / "model.safetensors")
    (damaged / "config.json").write_text(json.dumps(config | {"sha256": sha256(damaged / "model.safetensors")}))
    with pytest.raises(ValueError, match="non-finite"):
        clove_hub.load_detector(damaged)


# ---- the way over the Hub --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
def test_from_the_hub_to_boxes_in_a_fresh_process(exported, coco_photos, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in [*sorted((coco_photos / "train").iterdir())[:5]]:
        shutil.copy(path, photos)
    with LoopbackHub() as hub:

        def clove(*words: object) -> str:
            command = [sys.executable, "-m", "clove_hub.cli", *map(str, words)]
            environment = os.environ | hub.environment(tmp_path / "home")
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        assert "Nothing was changed" in clove("publish", exported, "--repo", NAME)
        assert hub.repositories == {}
        clove("publish", exported, "--repo", NAME, "--yes")
        held = hub.repositories[NAME].held
        assert held.keys() == {"README.md", "clove_hub.json", "config.json", "model.safetensors"}
        assert f'load_detector("hf-hub:{NAME}@v1.0.0")' in held["README.md"].decode()
        assert "license: mit" in held["README.md"].decode()
        clove("predict", f"hf-hub:{NAME}@v1.0.0", photos, "--out", tmp_path / "far", "--device", "cpu")
    assert predict(exported, photos, tmp_path / "near") == 0
    far, near = ((tmp_path / place / "coco_results.json").read_text() for place in ("far", "near"))
    assert far == near
    assert len(json.loads(near)) >= 5


def test_an_export_without_a_license_or_with_other_bytes_is_not_published(people, exported, tmp_path, capsys):
    assert main(["export", str(people), "--out", str(tmp_path / "unlicensed")]) == 0
    assert "names no license" in refusal(capsys, "publish", tmp_path / "unlicensed", "--repo", NAME)
    shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text((exported / "config.json").read_text() + "\n")
    assert "config.json is not what was exported" in refusal(capsys, "publish", tmp_path / "copy", "--repo", NAME)


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_onnxruntime_finds_what_torch_finds(people, coco_photos, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'clove-hub[onnx]'")
    import onnxruntime
    from torchvision.ops import box_iou

    out = tmp_path / "people.onnx"
    assert "converts only with --to onnx" in refusal(
        capsys, "convert", people, "--to", "timm", "--out", tmp_path / "x.safetensors"
    )
    assert main(["convert", str(people), "--to", "onnx", "--out", str(out)]) == 0
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == {"1": "person"}
    detector = clove_hub.load_detector(people, device="cpu")
    for path in sorted((coco_photos / "train").iterdir())[:4]:
        image = np.asarray(Image.open(path).convert("RGB"))
        boxes, *_ = session.run(None, {"image": image.transpose(2, 0, 1).astype("float32") / 255})
        expected = detector.find(image).boxes
        assert len(boxes) == len(expected) > 0
        assert box_iou(torch.from_numpy(boxes), torch.from_numpy(expected)).max(0).values.min() > 0.99


@pytest.mark.slow
def test_an_onnx_file_that_finds_something_else_is_not_written(people, tmp_path, capsys, monkeypatch):
    """With other weights in one layer, few boxes are the same."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'clove-hub[onnx]'")
    from clove_hub.export import onnx_detector

    exported = onnx_detector._exported

    def of_other_weights(network, *arguments, **named):
        content = exported(network, *arguments, **named)
        with torch.no_grad():
            next(network.parameters()).mul_(1.05)
        return content

    monkeypatch.setattr(onnx_detector, "_exported", of_other_weights)
    said = refusal(capsys, "convert", people, "--to", "onnx", "--out", tmp_path / "people.onnx")
    assert re.search(r"torch finds \d+ boxes and onnxruntime \d+, of which \d+ agree", said)
    assert not (tmp_path / "people.onnx").exists()
