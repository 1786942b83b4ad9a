"""What docs/elsewhere.md says of other libraries, by the lines that stand there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from synthetic import write_run

from clove_hub.export import convert, export_run

PAGE = (Path(__file__).parents[1] / "docs/elsewhere.md").read_text()
SEEN = {"size": 64, "mean": [0.3, 0.5, 0.6], "std": [0.2, 0.3, 0.1]}


def blocks(section: str) -> list[str]:
    """The Python of a section."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("elsewhere") / "run"
    write_run(run, "resnet18", preprocessing=SEEN)
    return export_run(run)


@pytest.mark.parametrize("opened", ["fasterrcnn", "fcn"])
def test_torchvisions_references_start_from_it(
    bundle: Path, opened: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision: Any = pytest.importorskip("torchvision", reason="torchvision is not installed")
    convert(bundle, "torchvision", tmp_path / "my_photos.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.models, "get_model", built_on_resnet18)
    (start,) = blocks("torchvision's references")
    exec(start, {"__name__": "start"})
    model = torchvision.models.get_model(opened, image_mean=SEEN["mean"])
    held = getattr(model.backbone, "body", model.backbone).state_dict()
    expected = load_file(bundle / "model.safetensors")
    assert held.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(held[name], tensor)] == []


def built_on_resnet18(name: str, **options: Any) -> Any:
    """As `torchvision.models.get_model` builds, on its smallest ResNet: all names there are of ResNet-50."""
    from torchvision.models import resnet18
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    if name == "fasterrcnn":
        body = resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=torch.nn.BatchNorm2d
        )
        return FasterRCNN(body, 3, **options)
    return FCN(IntermediateLayerGetter(resnet18(), {"layer4": "out"}), FCNHead(512, 3), None)


def test_torchvision_takes_no_path_for_a_backbone() -> None:
    """If this fails, the page should have the option."""
    detection: Any = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
    with pytest.raises(KeyError):
        detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone="my_photos.pth")


def test_timms_train_starts_from_it(bundle: Path) -> None:
    """By the calls that train.py of timm makes for these options."""
    expected = load_file(bundle / "model.safetensors")

    def begins(name: str, **options: Any) -> Any:
        model = timm.create_model(name, num_classes=2, **options)
        held = model.state_dict()
        assert [key for key, tensor in expected.items() if not torch.equal(held[key], tensor)] == []
        assert held.keys() - expected.keys() == {"fc.weight", "fc.bias"}
        return timm.data.resolve_data_config({}, model=model)

    assert list(begins(f"local-dir:{bundle}", pretrained=True)["mean"]) == SEEN["mean"]
    overlay = {"file": str(bundle / "model.safetensors"), "num_classes": -1}
    assert list(begins("resnet18", pretrained=True, pretrained_cfg_overlay=overlay)["mean"]) != SEEN["mean"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*fc\.weight"):
        timm.create_model("resnet18", num_classes=2, checkpoint_path=bundle / "model.safetensors")


def mmdetections_backbone(checkpoint: Path) -> dict[str, Any]:
    """The page's, for a ResNet-18 on one process."""
    (lines,) = blocks("MMDetection")
    backbone: dict[str, Any] = ast.literal_eval(lines.partition("=")[2].strip())["backbone"]
    assert backbone["init_cfg"] == {"type": "Pretrained", "checkpoint": "my_photos.pth"}
    changes = {
        "depth": 18,
        "norm_cfg": {"type": "BN"},
        "init_cfg": backbone["init_cfg"] | {"checkpoint": str(checkpoint)},
    }
    return backbone | changes


def test_mmdetection_starts_from_it(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from mmdet.registry import MODELS

    converted = convert(bundle, "mmseg", tmp_path / "my_photos.pth")
    model = MODELS.build(mmdetections_backbone(converted.path))
    model.init_weights()
    held, expected = model.state_dict(), load_file(bundle / "model.safetensors")
    features = timm.create_model(f"local-dir:{bundle}", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4))
    assert converted.tensors == len(held) == len(expected)
    assert [name for name, tensor in held.items() if not torch.equal(expected[name], tensor)] == []
    model.eval()
    image = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for ours, wanted in zip(model(image), features.eval()(image), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_what_mmdetection_is_given_is_what_the_conversion_prints(bundle: Path, tmp_path: Path) -> None:
    """Where MMDetection itself is absent: the dict, against the conversion's own."""
    converted = convert(bundle, "mmseg", tmp_path / "my_photos.pth")
    said: dict[str, Any] = {}
    exec(converted.how_to_load, said)
    backbone, page = said["model"]["backbone"], mmdetections_backbone(converted.path)
    for key in ("type", "depth", "style", "frozen_stages", "init_cfg"):
        assert page[key] == backbone[key], key
    assert said["model"]["data_preprocessor"]["mean"] == [76.5, 127.5, 153.0]
    names = torch.load(converted.path, weights_only=True)["state_dict"].keys()
    assert names == load_file(bundle / "model.safetensors").keys()
