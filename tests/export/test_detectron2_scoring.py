"""Every task of Detectron2 is scored by its own evaluator, in the versions that are installed, before anything is trained."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_datasets import densepose_files, small_dataset

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from clove_hub.export.detectron2.config import base_config
from clove_hub.export.detectron2.miniature import write_miniature
from clove_hub.export.detectron2.rehearsal import require_found
from clove_hub.export.detectron2.surface import FILES, require_surface
from clove_hub.export.detectron2.tasks import TASKS


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_what_is_there_is_found_by_the_tasks_own_evaluator(tmp_path: Path, task: str) -> None:
    if absent := [name for name in TASKS[task].packages if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(absent)}")
    write_miniature(TASKS[task].layout, small_dataset(TASKS[task].layout, tmp_path / "all"), tmp_path / "few")
    densepose_files(tmp_path / "cache")
    cfg = base_config(TASKS[task])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    (tmp_path / "task.yaml").write_text(cfg.dump())
    where = {"DETECTRON2_DATASETS": str(tmp_path / "few"), "FVCORE_CACHE": str(tmp_path / "cache")}
    words = ["-m", "clove_hub.export.detectron2.made", str(tmp_path / "task.yaml"), str(tmp_path / "made.json")]
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | where, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    require_found(TASKS[task], tmp_path / "made.json")
    if task == "voc_c4":
        return
    exact = {name for group in TASKS[task].metrics for name in [group] if group in ("bbox", "segm", "keypoints")}
    scores = json.loads((tmp_path / "made.json").read_text())
    assert exact
    assert all(scores[group]["AP"] == pytest.approx(100) for group in exact)
    assert not (tmp_path / "matches.json").exists(), "which Cityscapes' scripts leave in the working folder"


PERSON = "0"
"""Its number among Cityscapes' classes."""
STRAY = """
import sys
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.structures import Instances
from clove_hub.export.detectron2.repairs import mend

mend("cityscapes_instance", densepose=False)
name = "cityscapes_fine_instance_seg_val"
evaluator = CityscapesInstanceEvaluator(name)
evaluator.reset()
for record in DatasetCatalog.get(name):
    found = Instances((record["height"], record["width"]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([int(sys.argv[1])])
    free = torch.ones(1, record["height"], record["width"], dtype=torch.bool)
    for row in record["annotations"]:
        x, y, right, bottom = (int(value) for value in row["bbox"])
        free[0, y : bottom + 1, x : right + 1] = False
    found.pred_masks = free
    evaluator.process([record], [{"instances": found}])
print("SCORED", evaluator.evaluate()["segm"]["AP"])
"""


@pytest.mark.slow
def test_a_class_of_which_only_the_unscored_was_found_has_0(tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts", reason="cityscapesscripts is not installed")
    pytest.importorskip("shapely", reason="shapely is not installed")
    small_dataset("cityscapes", tmp_path / "all")
    where = {"DETECTRON2_DATASETS": str(tmp_path / "all")}
    done = subprocess.run(
        [sys.executable, "-c", STRAY, PERSON], env=os.environ | where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["SCORED", "0.0"]


def test_the_files_of_densepose_are_missed_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    folder = tmp_path / "densepose" / "data"
    with pytest.raises(ValueError, match=r"DensePose needs UV_symmetry.*Pdist_matrix\.pkl, which are not in") as caught:
        require_surface(fetch=False)
    assert f"{folder}. Download from https://dl.fbaipublicfiles.com/densepose/data/" in str(caught.value)
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).touch()
    require_surface(fetch=False)
    require_surface(fetch=True)  # nothing is fetched that is there
