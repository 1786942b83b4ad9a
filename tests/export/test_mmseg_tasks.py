"""The papers' segmentation tasks for MMSegmentation: what is written is the protocol, and holds the backbone."""

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from synthetic import trained, write_run

from clove_hub.cli import main
from clove_hub.export.mmseg.command import TASKS, write_protocol
from clove_hub.weights import Weights

needs_mmseg = pytest.mark.skipif(
    find_spec("mmseg") is None, reason="MMSegmentation is not installed; its configs are only read as Python"
)


@pytest.fixture(scope="module")
def backbone() -> Weights:
    return Weights("made", "a made backbone", "file", "resnet50", dict(trained("resnet50").state_dict()))


@pytest.mark.parametrize("task", TASKS)
def test_a_segmentation_protocol_is_written_with_weights_that_are_the_backbones(
    backbone: Weights, tmp_path: Path, task: str
) -> None:
    config, weights = write_protocol(task, backbone, tmp_path)
    stored = torch.load(weights, weights_only=True)["state_dict"]
    assert stored.keys() == backbone.tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in backbone.tensors.items())
    top, protocol, shared = (
        runpy.run_path(str(path)) for path in (config, tmp_path / f"protocols/{task}.py", tmp_path / "protocols/fcn.py")
    )
    assert top["_base_"] == [f"./protocols/{task}.py"]
    assert top["model"]["backbone"]["init_cfg"] == {"type": "Pretrained", "checkpoint": str(weights)}
    assert top["model"]["backbone"]["frozen_stages"] == -1
    assert top["data_preprocessor"]["bgr_to_rgb"] is True
    assert top["custom_hooks"] == [{"type": "RequireBackbone", "file": str(weights)}]
    assert shared["model"]["backbone"]["dilations"] == (1, 1, 1, 2)
    size, classes, rate = {
        "voc12aug": (513, 21, 0.003),
        "cityscapes": (769, 19, 0.01),
        "ade20k": (512, 150, None),  # MMSegmentation's own schedule for 80k iterations
    }[task]
    assert protocol["model"]["data_preprocessor"]["size"] == (size, size)
    assert protocol["model"]["decode_head"]["num_classes"] == classes
    if rate is not None:
        assert protocol["optim_wrapper"]["optimizer"]["lr"] == rate


def test_a_config_that_somebody_wrote_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", "resnet18")
    (tmp_path / "voc12aug.py").write_text("mine")
    arguments = ["voc12aug", "--backbone", str(tmp_path / "run"), "--out", str(tmp_path)]
    assert main(["downstream", "mmseg", *arguments]) == 2
    assert "voc12aug.py exists and was not written here" in capsys.readouterr().err
    (tmp_path / "voc12aug.py").unlink()
    assert main(["downstream", "mmseg", *arguments]) == 0
    assert "mim train mmsegmentation" in capsys.readouterr().out


@needs_mmseg
@pytest.mark.parametrize("task", TASKS)
def test_the_real_mmsegmentation_holds_the_backbone_and_gives_timms_map(
    backbone: Weights, tmp_path: Path, task: str
) -> None:
    from types import SimpleNamespace

    import timm
    from mmengine.config import Config
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    from clove_hub.export.mmseg.strict import RequireBackbone

    register_all_modules()
    config, weights = write_protocol(task, backbone, tmp_path)
    cfg = Config.fromfile(str(config))
    for part in (cfg.model.backbone, cfg.model.decode_head):
        part.norm_cfg.type = "BN"
    model = MODELS.build(cfg.model)
    model.init_weights()
    RequireBackbone(str(weights)).before_train(SimpleNamespace(iter=0, model=model))
    reference = timm.create_model("resnet50", num_classes=0, output_stride=16).eval()
    reference.load_state_dict(backbone.tensors)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model.eval().backbone(image)[-1], reference.forward_features(image))
        model.backbone.bn1.weight[0] += 1
    with pytest.raises(ValueError, match=r"does not hold the backbone.*bn1\.weight"):
        RequireBackbone(str(weights)).before_train(SimpleNamespace(iter=0, model=model))
