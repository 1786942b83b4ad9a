"""Models of transformers, trained by its Trainer on the folders of every fine-tuning: killed, gone on with, opened elsewhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from synthetic import trained

from clove_hub.cli import main
from clove_hub.evaluation.result import read

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'clove-hub[downstream]'")
pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install 'clove-hub[downstream]'")

from clove_hub.training.transformers import fine_tune, train  # noqa: E402  (they import transformers)
from clove_hub.training.transformers.settings import read_settings  # noqa: E402

pytest_plugins = ["downstream_fixtures"]
pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")

SMALL = [
    *("batch.total=2", "schedule.steps=4", "run.log_every=1", "run.save_every=2", "run.precision=fp32"),
    *("data.workers=0", "images.size=64"),
]
NETWORK = {
    "detr": [
        "images.longest_edge=96",
        "network.encoder_layers=1",
        "network.decoder_layers=1",
        "network.num_queries=20",
    ],
    "rt_detr_v2": ["network.decoder_layers=2", "network.num_queries=20"],
    "d_fine": ["network.decoder_layers=2", "network.num_queries=20"],
    "mask2former": ["network.encoder_layers=1", "network.decoder_layers=1", "network.num_queries=10"],
    "upernet": ["network.hidden_size=32"],
}
READER = """
import json, sys
from pathlib import Path
import numpy as np, torch, transformers
from PIL import Image, ImageOps
torch.set_num_threads(1)
folder, opened_by, photos, truth = sys.argv[1:]
processor = transformers.AutoImageProcessor.from_pretrained(folder)
model = getattr(transformers, opened_by).from_pretrained(folder).eval()
def look(path):
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    with torch.no_grad():
        return model(**processor(image, return_tensors="pt")), [(image.height, image.width)]
if opened_by == "AutoModelForObjectDetection":
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    ground = COCO(truth)
    ids = {category["name"]: category["id"] for category in ground.dataset["categories"]}
    rows = []
    for image in ground.dataset["images"]:
        outputs, sizes = look(Path(photos) / image["file_name"])
        (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        for score, label, (x0, y0, x1, y1) in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes"))):
            category = ids[model.config.id2label[label]]
            rows.append({"image_id": image["id"], "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    scored = COCOeval(ground, ground.loadRes(rows), "bbox")
    scored.evaluate(), scored.accumulate(), scored.summarize()
    print(json.dumps([len(rows), 100 * scored.stats[0], 100 * scored.stats[1]]))
else:
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    inside, union = np.zeros(len(names)), np.zeros(len(names))
    for mask in sorted(Path(truth).glob("*.png")):
        outputs, sizes = look(Path(photos) / f"{mask.stem}.jpg")
        (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        mask = np.array(Image.open(mask))
        found = found.numpy()[mask != 255], mask[mask != 255]
        for number in range(len(names)):
            one, other = (part == number for part in found)
            inside[number] += (one & other).sum()
            union[number] += (one | other).sum()
    print(json.dumps([names, 100 * float((inside[union > 0] / union[union > 0]).mean())]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a mean and a deviation of its own."""
    folder = tmp_path_factory.mktemp("source") / "resnet"
    folder.mkdir()
    from safetensors.torch import save_file

    save_file(trained("test_resnet").state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 64, 64], "mean": [0.3, 0.5, 0.6], "std": [0.2, 0.3, 0.1]}
    config = {"architecture": "test_resnet", "num_classes": 0, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def downstream(model: str, source: Path, data: Path, out: Path, *changes: str) -> int:
    words = ["--backbone", str(source), "--data", str(data), "--out", str(out), *SMALL, *NETWORK[model], *changes]
    return main(["downstream", "transformers", model, *words])


def killed_at(step: int, *arguments: Any) -> int | None:
    """The exit code of a process that is killed when a step begins, as `kill -9` kills it."""

    def work() -> None:
        usual = train.Follower.on_step_begin

        def dies(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            usual(self, args, state, control, **more)
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        train.Follower.on_step_begin = dies  # type: ignore[method-assign]
        downstream(*arguments)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def in_a_fresh_process(out: Path, opened_by: str, photos: Path, truth: Path) -> list[Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", READER, str(out / "model"), opened_by, str(photos), str(truth)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORK)
def test_a_model_is_trained_killed_gone_on_with_and_opened_by_plain_transformers(
    model: str, source: Path, coco_photos: Path, streets: Path, tmp_path: Path
) -> None:
    boxes = model not in ("mask2former", "upernet")
    data = coco_photos if boxes else streets
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert downstream(model, source, data, whole) == 0
    record = read(whole / "results.json")

    # Killed after three steps it goes on from the checkpoint after two, and ends where it would have ended.
    assert killed_at(3, model, source, data, cut) == -signal.SIGKILL
    assert not (cut / "results.json").exists()
    assert downstream(model, source, data, cut) == 0
    again = read(cut / "results.json")
    assert again.metrics == record.metrics
    assert again.seconds is None
    assert record.seconds is not None
    one, other = (load_file(out / "model/model.safetensors") for out in (whole, cut))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [row["step"] for row in rows(cut)] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows(cut)] == [row["loss"] for row in rows(whole)]

    # What it says of itself.
    assert record.protocol == f"transformers-{model.replace('_', '-')}"
    assert record.preprocessing is not None
    assert record.preprocessing["mean"] == [0.3, 0.5, 0.6]
    processor = json.loads((whole / "model/preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.3, 0.5, 0.6], [0.2, 0.3, 0.1])
    sizes = {"detr": {"shortest_edge": 64, "longest_edge": 96}, "upernet": {"shortest_edge": 64, "longest_edge": 2048}}
    assert processor["size"] == sizes.get(model, sizes["upernet"] if not boxes else {"height": 64, "width": 64})
    assert sorted(path.name for path in (whole / "model").iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ]
    assert downstream(model, source, data, whole) == 0  # again: there is nothing to do
    assert read(whole / "results.json").date == record.date

    # Others, with nothing but transformers, get the same figures.
    if boxes:
        truth = coco_photos / "annotations/instances_val.json"
        found = in_a_fresh_process(whole, "AutoModelForObjectDetection", coco_photos / "val", truth)
        assert found[0] >= 4 * 20
        np.testing.assert_allclose(found[1:], [record.metrics["APbb"], record.metrics["AP50bb"]], rtol=0, atol=1e-9)
        return
    kind = "AutoModelForSemanticSegmentation" if model == "upernet" else "AutoModelForUniversalSegmentation"
    (tmp_path / "labels").mkdir()
    for name in (streets / "val.txt").read_text().split():
        (tmp_path / "labels" / f"{name}.png").write_bytes((streets / "labels" / f"{name}.png").read_bytes())
    names, miou = in_a_fresh_process(whole, kind, streets / "images", tmp_path / "labels")
    assert names == ["sky", "road"]
    assert miou == pytest.approx(record.metrics["mIoU"], abs=1e-9)


@pytest.mark.slow
def test_the_lines_of_the_card_work(
    source: Path, coco_photos: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert downstream("detr", source, coco_photos, tmp_path / "out", "schedule.steps=1") == 0
    card = (tmp_path / "out/model/README.md").read_text()
    monkeypatch.chdir(tmp_path / "out/model")
    Image.new("RGB", (90, 60)).save("photo.jpg")
    lines = card.partition("```python\n")[2].partition("```")[0].replace("threshold=0.5", "threshold=0.0")
    capsys.readouterr()
    exec(lines, {})
    assert len(capsys.readouterr().out.splitlines()) == 20  # one for each query


# ---- what is learned from ----------------------------------------------------------------------------------------------


def batches(model: str, data: Path, *changes: str) -> Any:
    """The training batches, as the run makes them, and the test photos' reader."""
    settings = read_settings(model, [*SMALL, *NETWORK[model], "images.scale=[1,1]", *changes])
    loaded = fine_tune.load_data(fine_tune._as_finetune(settings), data, (0.3, 0.5, 0.6))
    kind = fine_tune.MODELS[model]
    processor = getattr(transformers, kind.processor)(
        do_normalize=True,
        image_mean=[0.3, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.1],
        size=fine_tune.size_of(settings.images),
    )
    from clove_hub.training.transformers.examples import batches_of

    return batches_of(loaded.train, settings, processor), processor, loaded


def test_a_detector_learns_what_transformers_own_processor_makes_of_the_annotations(coco_photos: Path) -> None:
    made, processor, loaded = batches("rt_detr_v2", coco_photos)
    document = json.loads((coco_photos / "annotations/instances_train.json").read_text())
    files = {row["id"]: coco_photos / "train" / row["file_name"] for row in document["images"]}
    numbers = {
        row["id"]: number for number, row in enumerate(sorted(document["categories"], key=lambda row: row["id"]))
    }
    seen = set()
    for index, photo in enumerate(loaded.train.photos):
        for epoch in range(8):
            ours = made.__getitems__([(epoch, index)])
            image = ImageOps.exif_transpose(Image.open(files[photo.id])).convert("RGB")
            own = [row for row in document["annotations"] if row["image_id"] == photo.id and not row["iscrowd"]]
            kept = [row | {"category_id": numbers[row["category_id"]]} for row in own]
            theirs = processor(image, annotations={"image_id": photo.id, "annotations": kept}, return_tensors="pt")
            boxes, expected = ours["labels"][0]["boxes"], theirs["labels"][0]["boxes"]
            flipped = not torch.equal(ours["pixel_values"], theirs["pixel_values"])
            seen.add(flipped)
            if flipped:
                turned = processor(ImageOps.mirror(image), return_tensors="pt")
                torch.testing.assert_close(ours["pixel_values"], turned["pixel_values"], rtol=0, atol=0)
                expected = expected * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
            torch.testing.assert_close(boxes, expected, rtol=0, atol=2e-3)  # boxes inside the image: COCO's lie over it
            assert ours["labels"][0]["class_labels"].tolist() == theirs["labels"][0]["class_labels"].tolist()
    assert seen == {True, False}


def test_a_segmenter_learns_what_transformers_own_processor_makes_of_the_masks(streets: Path) -> None:
    by_masks, processor, _ = batches("mask2former", streets)
    by_pixels, *_ = batches("upernet", streets)
    items = [(0, 0), (3, 5)]
    masks, pixels = by_masks.__getitems__(items), by_pixels.__getitems__(items)
    assert pixels["labels"].shape == (2, 64, 64)
    theirs = processor(
        [np.zeros((64, 64, 3), np.uint8)] * 2,
        segmentation_maps=[one.numpy().astype(np.uint8) for one in pixels["labels"]],
        ignore_index=255,
        do_resize=False,
        return_tensors="pt",
    )
    for ours, wanted in zip(masks["class_labels"], theirs["class_labels"], strict=True):
        assert ours.tolist() == wanted.tolist()
    for ours, wanted in zip(masks["mask_labels"], theirs["mask_labels"], strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(masks["pixel_values"], pixels["pixel_values"])


def test_a_crop_without_a_class_is_no_reason_to_stop(source: Path, streets: Path, tmp_path: Path) -> None:
    """As where all of a crop is void."""
    settings = read_settings("mask2former", [*SMALL, *NETWORK["mask2former"]])
    loaded = fine_tune.load_data(fine_tune._as_finetune(settings), streets, (0.3, 0.5, 0.6))
    network, *_ = fine_tune.build(fine_tune.load(str(source)), settings, loaded, tmp_path / "model")
    for labels in ([[], []], [[0], []]):
        loss = network.train()(
            pixel_values=torch.zeros(2, 3, 64, 64),
            mask_labels=[torch.ones(len(one), 64, 64) for one in labels],
            class_labels=[torch.tensor(one, dtype=torch.int64) for one in labels],
        ).loss
        assert torch.isfinite(loss)
        loss.backward()


# ---- training ----------------------------------------------------------------------------------------------------------


def test_the_backbone_has_a_tenth_of_the_rate_and_norms_do_not_decay(
    source: Path, streets: Path, tmp_path: Path
) -> None:
    settings = read_settings("upernet", [*SMALL, *NETWORK["upernet"]])
    loaded = fine_tune.load_data(fine_tune._as_finetune(settings), streets, (0.3, 0.5, 0.6))
    network, _, prefix = fine_tune.build(fine_tune.load(str(source)), settings, loaded, tmp_path / "model")
    optimizer = train.make_optimizer(network, prefix, settings)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["lr"] == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4), name
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert network.config.id2label == {0: "sky", 1: "road"}


@pytest.mark.slow
def test_gradients_of_a_step_in_parts_are_averaged(source: Path, streets: Path, tmp_path: Path) -> None:
    """The Trainer takes these models for language models by their signature, and would add the parts up."""
    norms = []
    for parts in (4, 2):
        out = tmp_path / str(parts)
        changes = ("batch.total=4", f"batch.per_device={parts}", "schedule.steps=1")
        assert downstream("upernet", source, streets, out, *changes) == 0
        norms.append(rows(out)[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.4)


@pytest.mark.slow
def test_a_segmenter_learns(source: Path, streets: Path, tmp_path: Path) -> None:
    changes = ("schedule.steps=40", "optimizer.learning_rate=2e-3", "optimizer.backbone_rate=1", "images.scale=[1,1]")
    assert downstream("upernet", source, streets, tmp_path, *changes, "batch.total=4") == 0
    assert read(tmp_path / "results.json").metrics["mIoU"] > 80


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_a_sentence(source: Path, streets: Path, tmp_path: Path, capsys: Any) -> None:
    changes = ("optimizer.learning_rate=1e30", "optimizer.clip_norm=0", "run.save_every=1", "schedule.warmup_steps=0")
    assert downstream("upernet", source, streets, tmp_path, *changes) == 1
    assert "is not finite after step" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())


def test_another_run_needs_another_folder(source: Path, streets: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "setup.json").write_text(json.dumps({"settings": {"model": "upernet"}, "backbone": "x"}))
    assert downstream("upernet", source, streets, tmp_path) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["setup.json"]


@pytest.mark.parametrize(
    ("model", "change", "why"),
    [
        ("upernet", "images.size=100", r"images.size=100: must be a multiple of 32, such as 96"),
        ("upernet", "batch.per_device=1", r"upernet has a batch norm over one value"),
        ("upernet", "network.hiden_size=3", r"has no 'hiden_size' \(did you mean 'hidden_size'\?\)"),
        ("upernet", "network.id2label={}", r"the classes and their names come from the data"),
        ("upernet", "network.num_labels=3", r"the classes and their names come from the data"),
        ("rt_detr_v2", "network.decoder_layers=1", r"transformers cannot build rt_detr_v2 with {'decoder_layers': 1, "),
        ("upernet", "network.pool_scales=3", r"transformers cannot build upernet with .*pool_scales"),
        ("rt_detr_v2", "network.num_queries=85", r"pixels, have 84 cells .* choose network.num_queries=84 or less"),
        ("rt_detr_v2", "images.longest_edge=900", r"=900: rt_detr_v2 takes squares: leave it out"),
        (
            "detr",
            "images.longest_edge=null",
            r"=null: detr keeps an image's aspect ratio and needs a limit: leave it out",
        ),
        ("detr", "schedule.epochs=3", r"give one of them"),
        ("detr", "optimiser.learning_rate=3", r"unknown section 'optimiser'.*did you mean 'optimizer'"),
        ("upernet", "schedule.warmup_steps=4", r"schedule.warmup_steps=4, but the run has 4 steps"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(
    model: str, change: str, why: str, source: Path, streets: Path, coco_photos: Path, tmp_path: Path, capsys: Any
) -> None:
    import re

    data = streets if model == "upernet" else coco_photos
    assert downstream(model, source, data, tmp_path / "out", change) == 2
    assert re.search(why, capsys.readouterr().err)
    assert not (tmp_path / "out/results.json").exists()
