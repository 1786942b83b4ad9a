"""The converted backbone in the real Detectron2: every tensor placed without a warning, equal feature maps.

Where Detectron2 is not installed, `test_convert.py` holds the names and shapes to the list recorded from it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from synthetic import write_run
from torch import Tensor

from clove_hub.export import convert, export_run
from clove_hub.weights import load
from clove_hub.zoo.resnets import rename

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed; its recorded names and shapes are checked in test_convert.py",
)

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
VOC = "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml"
STAGES = ("stem", "res2", "res3", "res4", "res5")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("resnet50") / "run"
    write_run(run, "resnet50")
    return export_run(run)


def load_detector(config: str, fragment: Path, norm: str, caplog: pytest.LogCaptureFixture) -> tuple[Any, list[str]]:
    """A detector of the model zoo on our backbone, as a user builds it, and what it warned about."""
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(config))
    cfg.merge_from_file(str(fragment))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = norm
    model = build_model(cfg).eval()
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model, [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def backbone_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The detector's ResNet, by the names within it; a C4 model keeps res5 in its head."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for prefix in ("backbone.bottom_up.", "backbone.", "roi_heads."):
            bare = name.removeprefix(prefix)
            if name.startswith(prefix) and bare.split(".")[0] in STAGES:
                tensors[bare] = tensor
                break
    return tensors


def feature_maps(model: Any, image: Tensor) -> list[Tensor]:
    """res2 to res5."""
    if hasattr(model.backbone, "bottom_up"):
        return [model.backbone.bottom_up(image)[f"res{stage}"] for stage in (2, 3, 4, 5)]
    x, maps = model.backbone.stem(image), []
    for stage in (model.backbone.res2, model.backbone.res3, model.backbone.res4, model.roi_heads.res5):
        maps.append(x := stage(x))
    return maps


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("config", [FPN, C4, VOC])
def test_every_tensor_is_placed_and_every_feature_map_equal(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: str, suffix: str
) -> None:
    converted = convert(str(bundle), "detectron2", tmp_path / f"backbone{suffix}")
    assert converted.fragment is not None
    model, warnings = load_detector(config, converted.fragment, "BN", caplog)

    expected = rename(load(str(bundle)).tensors, "timm", "detectron2")
    placed = backbone_of(model)
    assert placed.keys() == expected.keys()
    assert len(placed) == 318
    assert all(torch.equal(placed[name], tensor) for name, tensor in expected.items())
    assert any("not found in the checkpoint" in w for w in warnings), "the detector's heads are not in the file"
    assert not [w for w in warnings if "not used" in w or any(stage in w for stage in STAGES)]
    assert not [w for w in warnings if "VERSION" in w]

    image = torch.randn(1, 3, 64, 96)
    reference = timm.create_model(f"local-dir:{bundle}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        for ours, theirs in zip(feature_maps(model, image), reference(image)[1:], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [FPN, C4])
def test_a_frozen_norm_leaves_out_nothing_but_the_counters_that_it_lacks(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, config: str
) -> None:
    converted = convert(str(bundle), "detectron2", tmp_path / "backbone.pth")
    assert converted.fragment is not None
    model, warnings = load_detector(config, converted.fragment, "FrozenBN", caplog)
    expected = rename(load(str(bundle)).tensors, "timm", "detectron2")
    placed = backbone_of(model)
    assert {n for n in expected if n not in placed} == {n for n in expected if n.endswith("num_batches_tracked")}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in placed.items())
    assert not [w for w in warnings if "not found" in w and any(stage in w for stage in STAGES)]
    unused = {line.strip() for w in warnings if "not used" in w for line in w.splitlines()[1:]}
    assert unused
    assert all(name.endswith("num_batches_tracked") for name in unused)


def test_the_recorded_names_and_shapes_are_those_of_this_detectron2(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import json

    converted = convert(str(bundle), "detectron2", tmp_path / "backbone.pth")
    assert converted.fragment is not None
    model, _ = load_detector(FPN, converted.fragment, "BN", caplog)
    recorded = json.loads((Path(__file__).parent / "detectron2_resnet50.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in backbone_of(model).items()} == recorded
