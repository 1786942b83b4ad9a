"""Faults under the package versions that people install today, patched in memory before the code runs.

Each entry names the versions and the reason; without the reason, it changes nothing.
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
        evaluator: the kind, as Detectron2's metadata of the test set have it; DensePose's have none.
    """
    if densepose:
        # Its evaluator passes options that not every handler of files knows.
        from detectron2.utils.file_io import PathManager

        PathManager.set_strict_kwargs_checking(False)
        _register_densepose()
    if evaluator == "lvis":
        # lvis 0.5.3 adds up in np.float, which numpy 1.24 removed: the training would end in an AttributeError.
        evaluation: Any = importlib.import_module("lvis.eval")
        evaluation.np = _numpy_with(float=float)
    if evaluator == "cityscapes_instance":
        # cityscapesscripts 2.3.0 asks np.in1d, which numpy 2.4 removed. It also leaves a matches.json in the working
        # folder, which nothing reads, and which cannot hold the integers that numpy 2.4 counts with. And it asks for the
        # last of the found objects of a class where all lie in what is not scored, as after a short training.
        scores: Any = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
        scores.np = _numpy_with(in1d=np.isin, cumsum=cumulated)
        scores.writeDict2JSON = lambda content, path: None
        # Detectron2's main imports the package by a path that exists at Meta alone (2026; release 0.6 does not).
        if find_spec("deeplearning") is None:
            importlib.import_module("cityscapesscripts.helpers.labels")
            _alias(OF_META, "cityscapesscripts")


def _register_densepose() -> None:
    """DensePose looks for its data in `datasets`, whatever DETECTRON2_DATASETS says, which the rest of Detectron2 obeys."""
    from densepose.data.datasets.coco import DATASETS, register_dataset
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for dataset in DATASETS:
        if dataset.name.startswith("densepose_coco_2014"):
            DatasetCatalog.pop(dataset.name)
            MetadataCatalog.pop(dataset.name)
            register_dataset(dataset, os.environ.get("DETECTRON2_DATASETS", "datasets"))


def cumulated(values: Any) -> Any:
    """`np.cumsum`, whose last number is the sum also where there is nothing to add."""
    return np.cumsum(values) if len(values) else np.zeros(1)


def _numpy_with(**names: Any) -> ModuleType:
    """NumPy for one module, with names that it has no longer; all others are NumPy's own."""
    module = ModuleType("numpy")
    vars(module).update(names, __getattr__=partial(getattr, np))
    return module


def _alias(path: str, package: str) -> None:
    """Lets an installed package be imported below a path that no installed one has, with all of it that is loaded."""
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
