"""Faults with the package versions in use today, patched in memory before the code runs.

Each entry names the versions and the reason; without the fault, it changes nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

OF_META = "deeplearning.projects.cityscapesApi"


def mend(evaluator: str | None, densepose: bool) -> None:
    """Apply the patches that a task needs, in this process.

    Args:
        evaluator: the type of evaluator in Detectron2's metadata of the test set; DensePose's have none.
    """
    if densepose:
        # Its evaluator passes options that not every file handler accepts.
        from detectron2.utils.file_io import PathManager

        PathManager.set_strict_kwargs_checking(False)
        _register_densepose()
    if evaluator == "lvis":
        # lvis 0.5.3 uses np.float, which numpy 1.24 removed: the training would end with an AttributeError.
        evaluation: Any = importlib.import_module("lvis.eval")
        evaluation.np = _numpy_with(float=float)
    if evaluator == "cityscapes_instance":
        # cityscapesscripts 2.3.0 uses np.in1d, which numpy 2.4 removed. It also writes an unused matches.json to the
        # working folder, which cannot store numpy 2.4's integers. And it indexes the last predicted object of a class
        # even if all of them are in ignored regions, as after a short training.
        scores: Any = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
        scores.np = _numpy_with(in1d=np.isin, cumsum=cumulated)
        scores.writeDict2JSON = lambda content, path: None
        # Detectron2's main branch imports the package by a path that exists only at Meta (2026; release 0.6 does not).
        if find_spec("deeplearning") is None:
            importlib.import_module("cityscapesscripts.helpers.labels")
            _alias(OF_META, "cityscapesscripts")


def _register_densepose() -> None:
    """Register DensePose's data again: it uses `datasets` and ignores DETECTRON2_DATASETS, unlike Detectron2 itself."""
    from densepose.data.datasets.coco import DATASETS, register_dataset
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for dataset in DATASETS:
        if dataset.name.startswith("densepose_coco_2014"):
            DatasetCatalog.pop(dataset.name)
            MetadataCatalog.pop(dataset.name)
            register_dataset(dataset, os.environ.get("DETECTRON2_DATASETS", "datasets"))


def cumulated(values: Any) -> Any:
    """`np.cumsum` whose last number is the sum even for empty input."""
    return np.cumsum(values) if len(values) else np.zeros(1)


def _numpy_with(**names: Any) -> ModuleType:
    """NumPy for one module, with names that it no longer has; all others are NumPy's."""
    module = ModuleType("numpy")
    vars(module).update(names, __getattr__=partial(getattr, np))
    return module


def _alias(path: str, package: str) -> None:
    """Make an installed package, with its loaded modules, importable under a path that is not installed."""
    parent: ModuleType | None = None
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        if parent is not None:
            setattr(parent, parts[end - 1], module)
        parent = module
    setattr(parent, package, sys.modules[package])
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
        sys.modules[f"{path}.{name}"] = sys.modules[name]
