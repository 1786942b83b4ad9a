"""One's own labeled photos in Detectron2: what is written for it, under which names, and a whole run where it is installed."""

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from downstream_fixtures import made  # noqa: F401  (a fixture)
from fine_tuning import put
from PIL import Image
from small_detectron2 import command

from clove_hub.cli import main
from clove_hub.export.detectron2.own import OWN, with_data
from clove_hub.export.detectron2.own_data import read, write
from clove_hub.export.detectron2.runs import plain

needs_detectron2 = pytest.mark.skipif(find_spec("detectron2") is None, reason="Detectron2 is not installed")


def as_roboflow(folder: Path, document: dict[str, Any]) -> None:
    """Into the layout that Roboflow exports, with its category 0 that is only the parent of the others."""
    (folder / "val").rename(folder / "valid")
    parent = {"id": 0, "name": "animals", "supercategory": "none"}
    others = [{"id": 7, "name": "cat", "supercategory": "animals"}]
    for split in ("train", "valid"):
        text = json.dumps(document | {"categories": [parent, *others]})
        (folder / split / "_annotations.coco.json").write_text(text)


def as_voc(folder: Path, document: dict[str, Any]) -> None:
    for split in ("train", "val"):
        for image in document["images"]:
            boxes = [row["bbox"] for row in document["annotations"] if row["image_id"] == image["id"]]
            objects = "".join(
                f"<object><name>cat</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
                f"<ymax>{y + h}</ymax></bndbox></object>"
                for x, y, w, h in boxes
            )
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
            (folder / split / f"{image['id']}.xml").write_text(f"<annotation>{size}{objects}</annotation>")


LAYOUTS = {"COCO": put, "Roboflow": as_roboflow, "VOC": as_voc}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_detectron2_the_same_boxes_and_names(made: Any, layout: str) -> None:  # noqa: F811
    folder, document = made
    LAYOUTS[layout](folder, document)
    data = read(folder, "detection")
    assert (data.classes, data.found.train, data.found.test) == (["cat"], 2, 2)
    for file in write(data, folder / "out"):
        written = json.loads(file.read_text())
        assert [row["name"] for row in written["categories"]] == ["cat"]
        ids = {row["id"] for row in written["categories"]}
        assert all(row["category_id"] in ids for row in written["annotations"])
        boxes = sorted(row["bbox"] for row in written["annotations"])
        assert boxes == sorted(row["bbox"] for row in document["annotations"])
        paths = [Path(row["file_name"]) for row in written["images"]]
        assert all(path.is_absolute() and path.is_file() for path in paths)
    assert json.loads((folder / "out" / "classes.json").read_text()) == ["cat"]


def test_masks_are_polygons_or_run_lengths_as_they_were_drawn(made: Any) -> None:  # noqa: F811
    from pycocotools import mask

    folder, document = made
    first = document["annotations"][0]
    inside = np.zeros((48, 64), np.uint8, order="F")
    inside[6:22, 8:28] = 1
    rle = mask.encode(inside)
    first["segmentation"] = {"size": [48, 64], "counts": rle["counts"].decode()}
    put(folder, document)
    data = read(folder, "instances")
    learned, _ = write(data, folder / "out")
    shapes = [row["segmentation"] for row in json.loads(learned.read_text())["annotations"]]
    assert [type(shape) for shape in shapes] == [dict, list, list, list]
    assert np.array_equal(mask.decode(shapes[0]), inside)
    assert shapes[1] == document["annotations"][1]["segmentation"]
    assert with_data(OWN["instances"], data, folder).changes["INPUT.MASK_FORMAT"] == "bitmask"


def test_the_schedule_follows_the_number_of_photos(made: Any) -> None:  # noqa: F811
    folder, document = made
    put(folder, document)
    data = read(folder, "detection")
    changes = with_data(OWN["detection"], data, folder).changes
    assert (changes["SOLVER.MAX_ITER"], changes["SOLVER.STEPS"]) == (1000, (666, 888))
    assert changes["MODEL.ROI_HEADS.NUM_CLASSES"] == 1


def test_where_a_training_lies_and_its_seed_are_not_what_it_is() -> None:
    def config(place: str, rate: float) -> dict[str, Any]:
        data = {"TRAIN": [f"{place}/train.json"], "TEST": [f"{place}/val.json"], "PROPOSAL_FILES_TRAIN": []}
        sections = {"DATASETS": data, "MODEL": {"WEIGHTS": f"{place}/backbone.pth", "MASK_ON": True}}
        cfg = sections | {"SOLVER": {"BASE_LR": rate}, "OUTPUT_DIR": place, "SEED": len(place)}
        return plain(SimpleNamespace(dump=lambda: yaml.safe_dump(cfg)), "DATASETS.TRAIN", "DATASETS.TEST")

    assert config("here", 0.02) == config("there", 0.02)
    assert config("here", 0.02) != config("here", 0.01)


def test_a_photo_that_cannot_be_read_or_is_of_another_size_is_named_before_anything_runs(made: Any) -> None:  # noqa: F811
    folder, document = made
    put(folder, document)
    folder = folder.rename(folder.with_name("my photos"))
    (folder / "train" / "1.jpg").write_bytes(b"none")
    Image.new("RGB", (32, 32)).save(folder / "val" / "2.jpg")
    bad = r"2 of 4 images cannot be used: .*1\.jpg.*2\.jpg: 32 x 32 pixels"
    with pytest.raises(ValueError, match=rf"{bad}.*`clove-hub check '{folder}' --task detection`"):
        read(folder, "detection")


def test_xml_has_no_masks(made: Any) -> None:  # noqa: F811
    folder, document = made
    as_voc(folder, document)
    with pytest.raises(ValueError, match="choose the task detection"):
        read(folder, "instances")


def test_the_folder_has_to_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["downstream", "detectron2", "detection", "--backbone", "random:resnet18"]) == 2
    assert "give --data FOLDER" in capsys.readouterr().err


@needs_detectron2
def test_detectron2_reads_what_was_written_and_knows_the_classes(made: Any) -> None:  # noqa: F811
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog

    from clove_hub.export.detectron2.own_data import register

    folder, document = made
    put(folder, document)
    train, val = write(read(folder, "instances"), folder / "out")
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.MASK_ON = (str(train),), (str(val),), True
    assert register(cfg) == register(cfg) == ["cat"]
    assert MetadataCatalog.get(str(val)).evaluator_type == "coco"
    found = DatasetMapper(cfg, is_train=True)(DatasetCatalog.get(str(train))[0])["instances"]
    assert found.gt_classes.tolist() == [0, 0]
    assert found.has("gt_masks")
    assert MetadataCatalog.get(str(train)).thing_classes == ["cat"]


@needs_detectron2
def test_a_model_without_its_data_still_knows_its_classes(tmp_path: Path) -> None:
    from detectron2.config import get_cfg
    from detectron2.data import MetadataCatalog

    from clove_hub.export.detectron2.own_data import register, write_classes

    write_classes(tmp_path, ["cat", "dog"])
    cfg = get_cfg()
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (str(tmp_path / "gone" / "val.json"),), str(tmp_path)
    assert register(cfg) == ["cat", "dog"]
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == ["cat", "dog"]


@pytest.mark.long
@needs_detectron2
def test_a_run_ends_with_a_figure_a_model_and_its_classes(made: Any) -> None:  # noqa: F811
    folder, document = made
    as_roboflow(folder, document)
    small = [
        *(
            "SOLVER.IMS_PER_BATCH",
            "2",
            "SOLVER.MAX_ITER",
            "3",
            "SOLVER.BASE_LR",
            "0.001",
            "DATALOADER.NUM_WORKERS",
            "0",
        ),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "4"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    ]
    done = subprocess.run(
        **command("detection", Path("random:resnet18"), folder, folder / "run", *small),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((folder / "run" / "results.json").read_text())
    assert result["protocol"] == "detectron2-detection"
    assert result["metrics"].keys() == {"APbb", "AP50bb", "AP75bb"}
    assert json.loads((folder / "run" / "seed_0" / "classes.json").read_text()) == ["cat"]
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor

    from clove_hub.export.detectron2.own_data import register

    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "run" / "seed_0" / "config.yaml"))
    assert register(cfg) == ["cat"]
    assert len(DefaultPredictor(cfg)(np.zeros((48, 64, 3), np.uint8))["instances"]) >= 0
