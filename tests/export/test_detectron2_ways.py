"""Every way in which Detectron2 is used, with the real one: YAML with a _BASE_, LazyConfig, any network of timm.

The reference is timm's `features_only`, and Detectron2's own loader puts the weights in their place.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from synthetic import write_run
from torch import Tensor

from clove_hub.cli import main
from clove_hub.export import convert, export_run
from clove_hub.weights import load

pytest.importorskip(
    "detectron2", reason="Detectron2 is not installed; what the files say is checked in test_convert.py"
)

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x"
NEW = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.1)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the working directory, and none in which anything was written."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def bundle_of(architecture: str, folder: Path) -> Path:
    """A bundle with its own mean and deviation, and weights that are not timm's initial ones."""
    folder.mkdir()
    model = timm.create_model(architecture, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = 0.01 * torch.randn(tensor.shape, generator=generator)
            tensor += noise.abs() if name.endswith("running_var") else noise
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "pretrained_cfg": {"mean": MEAN, "std": STD, "num_classes": 0, "input_size": [3, 224, 224]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def opened(config: Any, weights: str) -> Any:
    """A LazyConfig's model with its weights, as `lazyconfig_train_net.py` opens it."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import instantiate

    model = instantiate(config.model).eval()
    DetectionCheckpointer(model).load(weights)
    return model


def built(cfg: Any) -> Any:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def expected_maps(source: Path, pixels: Tensor) -> list[Tensor]:
    """timm's, of a normalized image."""
    model = timm.create_model(f"local-dir:{source}", pretrained=True, features_only=True, **_any_size(source)).eval()
    with torch.no_grad():
        found = list(model(pixels))
    last = "swin_" in (source / "config.json").read_text()  # timm's Swin has the channels last
    return [one.permute(0, 3, 1, 2) for one in found] if last else found


def _any_size(source: Path) -> dict[str, Any]:
    kind = (source / "config.json").read_text()
    return {"dynamic_img_size": True} if "vit_" in kind else {"strict_img_size": False} if "swin_" in kind else {}


def require_timms_maps(model: Any, source: Path) -> None:
    """Each feature map of the detector's network is timm's, and the pyramid takes them."""
    image = torch.randint(0, 256, (3, 96, 128)).float()
    pixels = model.preprocess_image([{"image": image}]).tensor
    inside = model.backbone.bottom_up if hasattr(model.backbone, "bottom_up") else model.backbone.net
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.allclose(pixels[0], (image / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    found = expected_maps(source, pixels)
    by_stride = {96 // one.shape[2]: one for one in found}
    with torch.no_grad():
        ours = inside(pixels)
        pyramid = model.backbone(pixels)
    assert ours
    for name, one in ours.items():
        expected = by_stride[2 ** int(name[-1])]
        assert (one - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert [96 // level.shape[2] for level in list(pyramid.values())[:2]] in ([4, 8], [8, 16])


# ---- a ResNet --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("resnet50") / "run"
    write_run(run, "resnet50")
    return export_run(run)


def test_the_yaml_alone_is_a_whole_config_from_any_folder(resnet50: Path, tmp_path: Path, elsewhere: Path) -> None:
    from detectron2.config import get_cfg

    converted = convert(str(resnet50), "detectron2", tmp_path / "backbone.pth", base=FPN)
    assert any(f"The detector of {Path(FPN).name} was built: it holds every tensor" in note for note in converted.notes)
    cfg = get_cfg()
    cfg.merge_from_file(os.path.relpath(tmp_path / "backbone.yaml", elsewhere))
    assert (cfg.MODEL.BACKBONE.NAME, cfg.MODEL.MASK_ON) == ("build_resnet_fpn_backbone", True)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)
    model = built(cfg)
    tensors = torch.load(tmp_path / "backbone.pth", weights_only=True)["model"]
    state = model.state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(state[f"backbone.bottom_up.{name}"], tensor) for name, tensor in kept.items())


def test_the_yaml_is_a_base_of_ones_own(resnet50: Path, tmp_path: Path, elsewhere: Path) -> None:
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    convert(str(resnet50), "detectron2", tmp_path / "backbone.pth")
    bases = [model_zoo.get_config_file(FPN), str(tmp_path / "backbone.yaml")]
    Path("mine.yaml").write_text(yaml.safe_dump({"_BASE_": bases, "MODEL": {"ROI_HEADS": {"NUM_CLASSES": 3}}}))
    cfg = get_cfg()
    cfg.merge_from_file("mine.yaml")
    assert (str(tmp_path / "backbone.pth"), 3) == (cfg.MODEL.WEIGHTS, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


@pytest.mark.parametrize("base", [NEW, f"{C4}.py", "COCO-Detection/retinanet_R_50_FPN_1x.py"])
def test_a_lazy_config_sees_what_the_backbone_saw_and_may_be_moved(
    resnet50: Path, tmp_path: Path, elsewhere: Path, base: str
) -> None:
    from detectron2.config import LazyConfig

    convert(str(resnet50), "detectron2", tmp_path / "there" / "backbone.pth", base=base)
    shutil.move(tmp_path / "there", tmp_path / "moved")
    config = LazyConfig.load("../moved/backbone.py")
    model = opened(config, config.train.init_checkpoint)
    assert (model.input_format, config.dataloader.train.mapper.image_format) == ("RGB", "RGB")
    assert config.dataloader.test.mapper.image_format == "RGB"
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    resnet = getattr(model.backbone, "bottom_up", model.backbone)
    assert (resnet.res3[0].conv1.stride, resnet.res3[0].conv2.stride) == ((1, 1), (2, 2))
    assert all(parameter.requires_grad for parameter in resnet.parameters())
    res5 = resnet.res5 if hasattr(resnet, "res5") else model.roi_heads.res5
    expected = load(str(resnet50)).tensors["layer4.2.conv3.weight"]
    assert torch.equal(res5[2].conv3.weight, expected)


def test_a_config_beside_the_lazy_one_takes_the_backbone_from_it(
    resnet50: Path, tmp_path: Path, elsewhere: Path
) -> None:
    from detectron2.config import LazyConfig

    convert(str(resnet50), "detectron2", tmp_path / "backbone.pth")
    (tmp_path / "mine.py").write_text(
        "from detectron2 import model_zoo\n"
        "from .backbone import use_backbone\n"
        f"config = model_zoo.get_config({NEW!r})\n"
        "model, dataloader, train = config.model, config.dataloader, config.train\n"
        "use_backbone(model, dataloader, train)\n"
    )
    config = LazyConfig.load(str(tmp_path / "mine.py"))
    assert config.model.backbone.bottom_up.stages.stride_in_1x1 is False
    assert config.train.init_checkpoint == str(tmp_path / "backbone.pth")


@pytest.mark.parametrize("suffix", [".yaml", ".py"])
def test_basic_blocks_in_a_c4_head_are_refused_and_nothing_is_left_behind(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match=r"resnet18 has basic blocks"):
        convert("random:resnet18", "detectron2", tmp_path / "backbone.pth", base=f"{C4}{suffix}")
    assert not any(tmp_path.iterdir())


def test_detectron2_itself_would_leave_the_c4_heads_last_stage_random(tmp_path: Path) -> None:
    """Why it is refused, and what the settings say who merge them by hand."""
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    convert("random:resnet18", "detectron2", tmp_path / "backbone.pth")
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(f"{C4}.yaml"))
    cfg.merge_from_file(str(tmp_path / "backbone.yaml"))
    head, tensors = built(cfg).roi_heads, torch.load(tmp_path / "backbone.pth", weights_only=True)["model"]
    assert head.res5[0].conv1.weight.shape != tensors["res5.0.conv1.weight"].shape
    assert "res5.0.conv3.weight" not in tensors
    assert head.res5[0].conv3 is not None
    assert "Not for C4" in (tmp_path / "backbone.yaml").read_text()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("COCO-Detection/nothing.yaml", "neither a file nor a config of Detectron2's model zoo"),
        ("COCO-Detection/nothing", r"ends in \.yaml, or in \.py"),
        ("new_baselines/mask_rcnn_regnetx_4gf_dds_FPN_100ep_LSJ.py", "has no ResNet of Detectron2 that"),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path: Path, base: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert("random:resnet18", "detectron2", tmp_path / "backbone.pth", base=base)
    assert not any(tmp_path.iterdir())


def test_a_detector_that_differs_is_refused_before_anything_is_put_in_place(tmp_path: Path) -> None:
    """Dilation in the last stage: the weights fit, the feature maps are others."""
    with pytest.raises(ValueError, match=r"res5 is \(1, 2048, 6, 8\) in the detector, \(1, 2048, 3, 4\) in timm"):
        convert(
            "random:resnet50",
            "detectron2",
            tmp_path / "backbone.pth",
            base="COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x.yaml",
        )
    assert not any(tmp_path.iterdir())


def test_a_config_that_detectron2_does_not_build_is_refused(tmp_path: Path) -> None:
    from detectron2 import model_zoo

    mine = {"_BASE_": model_zoo.get_config_file(FPN), "MODEL": {"RESNETS": {"RES5_DILATION": 2}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    with pytest.raises(ValueError, match=r"mine\.yaml: Detectron2 cannot build this detector .*log2 contiguous"):
        convert("random:resnet50", "detectron2", tmp_path / "backbone.pth", base=str(tmp_path / "mine.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


# ---- any network of timm ---------------------------------------------------------------------------------------------

NETWORKS = ["convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnetblur18"]


@pytest.mark.parametrize("base", [FPN, RETINANET])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_any_network_is_a_backbone_of_a_yaml_config(
    tmp_path: Path, elsewhere: Path, caplog: pytest.LogCaptureFixture, architecture: str, base: str
) -> None:
    from detectron2.config import get_cfg

    source = bundle_of(architecture, tmp_path / "bundle")
    convert(str(source), "detectron2", tmp_path / "backbone.pth", base=base)
    import clove_hub.export.detectron2.backbone  # noqa: F401

    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "backbone.yaml"))
    with caplog.at_level(logging.WARNING):
        model = built(cfg)
    assert not [record for record in caplog.records if "not used" in record.getMessage()]
    placed = {name.partition(".timm.")[2]: t for name, t in model.state_dict().items() if ".timm." in name}
    expected = load_file(source / "model.safetensors")
    assert placed.keys() == expected.keys()
    assert all(torch.equal(placed[name], tensor) for name, tensor in expected.items())
    assert model.pixel_mean.flatten().tolist() == pytest.approx([255 * value for value in MEAN])
    assert cfg.INPUT.FORMAT == "RGB"
    require_timms_maps(model, source)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_any_network_is_a_backbone_of_a_lazy_config(tmp_path: Path, elsewhere: Path, architecture: str) -> None:
    from detectron2.config import LazyConfig

    source = bundle_of(architecture, tmp_path / "bundle")
    convert(str(source), "detectron2", tmp_path / "backbone.pth", base=NEW)
    config = LazyConfig.load(str(tmp_path / "backbone.py"))
    model = opened(config, config.train.init_checkpoint)
    assert config.dataloader.train.mapper.image_format == model.input_format == "RGB"
    require_timms_maps(model, source)


@pytest.mark.parametrize("architecture", ["convnext_atto", "vit_tiny_patch16_224"])
def test_such_a_detector_trains_every_parameter_that_it_does_not_freeze(tmp_path: Path, architecture: str) -> None:
    """Distributed training would wait for the gradients of the others; images have odd sizes."""
    from detectron2.config import get_cfg
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    convert(f"random:{architecture}", "detectron2", tmp_path / "backbone.pth", base=RETINANET)
    import clove_hub.export.detectron2.backbone  # noqa: F401

    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "backbone.yaml"))
    model = built(cfg).train()
    found = Instances((70, 101), gt_boxes=Boxes(torch.tensor([[5.0, 5, 60, 60]])), gt_classes=torch.tensor([1]))
    with EventStorage():
        losses = model([{"image": torch.randint(0, 256, (3, 70, 101)).float(), "instances": found}])
    sum(losses.values()).backward()
    inside = [(name, parameter) for name, parameter in model.named_parameters() if ".timm." in name]
    assert [name for name, one in inside if one.requires_grad and one.grad is None] == []
    assert sum(one.requires_grad for _, one in inside) > 0.9 * len(inside)


@pytest.mark.parametrize(
    ("architecture", "base", "message"),
    [
        ("convnext_atto", f"{C4}.yaml", r"choose a config with a pyramid \(FPN\)"),
        ("convnext_atto", f"{C4}.py", "this config has no feature pyramid"),
        ("maxvit_pico_rw_256", FPN, "does not take images of any size"),
        ("vit_tiny_r_s16_p8_224", FPN, "only feature maps of stride 32,|no feature map"),
    ],
)
def test_what_has_no_place_in_a_detector_is_refused(
    tmp_path: Path, architecture: str, base: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", f"random:{architecture}", "--to", "detectron2", "--out", str(tmp_path / "b.pth")]
    assert main([*words, "--base", base]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not any(tmp_path.iterdir())


def test_a_frozen_stage_is_refused_where_stages_are_not_a_resnets(tmp_path: Path) -> None:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    import clove_hub.export.detectron2.backbone  # noqa: F401

    convert("random:convnext_atto", "detectron2", tmp_path / "backbone.pth", base=FPN)
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "backbone.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", 2
    with pytest.raises(ValueError, match=r"FREEZE_AT is 2, .* convnext_atto is always trained completely: set 0"):
        build_model(cfg)
