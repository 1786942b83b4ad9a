"""A backbone under the names of other frameworks: the same tensors, the same feature maps, or a refusal."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file, save_file
from synthetic import released_tensors, save_released, trained, write_run
from torch import Tensor, nn

from clove_hub.cli import main
from clove_hub.export import Converted, convert, export_run
from clove_hub.weights import load
from clove_hub.zoo.resnets import FORMATS, RESNETS, rename
from clove_hub.zoo.tensors import read_tensors


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run, and the backbone that it holds."""
    run = tmp_path_factory.mktemp("resnet18") / "run"
    return run, write_run(run, "resnet18")


@pytest.fixture(scope="module")
def bundle(resnet18: tuple[Path, nn.Module]) -> Path:
    return export_run(resnet18[0])


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a backbone that is no ResNet."""
    run = tmp_path_factory.mktemp("convnext") / "run"
    write_run(run, "convnext_atto")
    return run


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# ---- the names ---------------------------------------------------------------------------------------------


def test_the_names_for_detectron2_are_those_of_its_own_resnet50() -> None:
    """Recorded from the real one: backbone.bottom_up of mask_rcnn_R_50_FPN_1x with NORM BN."""
    recorded = json.loads((Path(__file__).parent / "detectron2_resnet50.json").read_text())
    with torch.device("meta"):
        tensors = timm.create_model("resnet50", num_classes=0).state_dict()
    converted = rename(tensors, "timm", "detectron2")
    assert {name: list(tensor.shape) for name, tensor in converted.items()} == recorded


@pytest.mark.parametrize("architecture", RESNETS)
@pytest.mark.parametrize("target", FORMATS)
def test_renaming_there_and_back_is_the_identity(architecture: str, target: str) -> None:
    with torch.device("meta"):
        tensors = timm.create_model(architecture, num_classes=0).state_dict()
    there = rename(tensors, "timm", target)
    back = rename(there, target, "timm")
    assert list(back) == list(tensors)
    assert all(back[name] is tensor for name, tensor in tensors.items())


def test_a_detector_is_not_a_backbone() -> None:
    with pytest.raises(ValueError, match=r"it: backbone\.fpn_lateral2\.weight is not a tensor of .* whole detector"):
        rename({"backbone.fpn_lateral2.weight": torch.ones(1)}, "detectron2", "timm", "it")


# ---- the same network elsewhere ----------------------------------------------------------------------------


def torchvision_maps(model: Any, image: Tensor) -> list[Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
    maps = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        maps.append(x := layer(x))
    return maps


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_gives_the_same_feature_maps(bundle: Path, tmp_path: Path, suffix: str) -> None:
    converted = convert(str(bundle), "torchvision", tmp_path / f"backbone{suffix}")
    names: dict[str, Any] = {}
    exec(converted.how_to_load, names)  # the lines that were printed
    model = names["model"].eval()
    load = load_file if suffix == ".safetensors" else lambda path: torch.load(path, weights_only=True)
    missing = torchvision.models.resnet18().load_state_dict(load(converted.path), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["fc.weight", "fc.bias"], [])

    image = torch.randn(2, 3, 64, 64)
    reference = timm.create_model(f"local-dir:{bundle}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        for ours, theirs in zip(torchvision_maps(model, image), reference(image)[1:], strict=True):
            assert torch.equal(ours, theirs)


def test_timm_loads_the_file_for_timm(bundle: Path, tmp_path: Path, resnet18: tuple[Path, nn.Module]) -> None:
    names: dict[str, Any] = {}
    exec(convert(str(bundle), "timm", tmp_path / "backbone.safetensors").how_to_load, names)
    assert_same(names["model"].state_dict(), resnet18[1].state_dict())


def test_what_is_no_resnet_still_converts_to_timm(convnext: Path, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    converted = convert(str(convnext), "timm", tmp_path / "backbone.safetensors")
    exec(converted.how_to_load, names)
    assert_same(names["model"].state_dict(), load(str(convnext)).tensors)


def test_mmsegmentation_gets_its_names_and_a_config(bundle: Path, tmp_path: Path) -> None:
    converted = convert(str(bundle), "mmseg", tmp_path / "backbone.pth")
    content = torch.load(converted.path, weights_only=True)
    assert content.keys() == {"state_dict", "meta"}
    theirs = {n: t for n, t in torchvision.models.resnet18().state_dict().items() if not n.startswith("fc.")}
    assert {n: t.shape for n, t in content["state_dict"].items()} == {n: t.shape for n, t in theirs.items()}

    config: dict[str, Any] = {}
    exec((tmp_path / "backbone.py").read_text(), config)
    backbone = config["model"]["backbone"]
    assert (backbone["type"], backbone["depth"], backbone["style"]) == ("ResNet", 18, "pytorch")
    assert backbone["init_cfg"] == {"type": "Pretrained", "checkpoint": str(converted.path.resolve())}
    assert config["data_preprocessor"]["bgr_to_rgb"] is True
    assert config["data_preprocessor"]["mean"] == [123.675, 116.28, 103.53]


def test_mmsegmentation_has_no_wide_resnet(tmp_path: Path) -> None:
    save_file(trained("wide_resnet50_2").state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="MMSegmentation has no wide ResNet such as wide_resnet50_2"):
        convert(str(tmp_path / "wide.safetensors"), "mmseg", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_the_file_for_detectron2_holds_tensors_and_plain_data_only(
    bundle: Path, tmp_path: Path, resnet18: tuple[Path, nn.Module]
) -> None:
    converted = convert(str(bundle), "detectron2", tmp_path / "backbone.pth")
    content = torch.load(converted.path, weights_only=True)
    assert (content.pop("__author__"), content.pop("matching_heuristics")) == ("clove-hub", True)
    assert_same(rename(content.pop("model"), "detectron2", "timm"), dict(resnet18[1].state_dict()))
    assert not content


def test_detectron2s_own_container_is_written_on_request(bundle: Path, tmp_path: Path) -> None:
    pth = torch.load(convert(str(bundle), "detectron2", tmp_path / "a.pth").path, weights_only=True)["model"]
    # As Detectron2 opens it, and of our own making.
    content = pickle.loads(convert(str(bundle), "detectron2", tmp_path / "b.pkl").path.read_bytes())
    assert content["matching_heuristics"] is True
    assert_same({name: torch.from_numpy(array) for name, array in content["model"].items()}, pth)


def test_detectron2_is_told_what_the_backbone_saw_during_training(bundle: Path, tmp_path: Path) -> None:
    converted = convert(str(bundle), "detectron2", tmp_path / "backbone.pth")
    assert converted.fragment == tmp_path / "backbone.yaml"
    assert yaml.safe_load(converted.fragment.read_text()) == {
        "VERSION": 2,
        "MODEL": {
            "WEIGHTS": str(converted.path.resolve()),
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {
                "DEPTH": 18,
                "NUM_GROUPS": 1,
                "WIDTH_PER_GROUP": 64,
                "RES2_OUT_CHANNELS": 64,
                "STRIDE_IN_1X1": False,
            },
        },
        "INPUT": {"FORMAT": "RGB"},
    }


@pytest.mark.parametrize("architecture", ["resnetblur50", "resnetaa50", "resnetblur18", "convnext_atto"])
def test_what_only_looks_like_a_resnet_is_built_by_timm_inside_detectron2(tmp_path: Path, architecture: str) -> None:
    """Their tensors have a ResNet's names and shapes, and Detectron2's ResNet would give other feature maps."""
    converted = convert(f"random:{architecture}", "detectron2", tmp_path / "out.pth")
    assert any(f"Detectron2 has no {architecture} of its own" in note for note in converted.notes)
    model = yaml.safe_load((tmp_path / "out.yaml").read_text())["MODEL"]
    assert model["CLOVE_HUB"] == {"ARCHITECTURE": architecture, "ARGS": {}}
    assert "RESNETS" not in model
    tensors = torch.load(converted.path, weights_only=True)["model"]
    assert set(tensors) == {f"timm.{name}" for name in load(f"random:{architecture}").tensors}
    assert f"use_timm(model, '{architecture}', {{}}" in (tmp_path / "out.py").read_text()


def test_the_settings_call_the_weights_as_they_are_told_to(bundle: Path, tmp_path: Path) -> None:
    convert(str(bundle), "detectron2", tmp_path / "out.pth", weights="weights/there.pth")
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["MODEL"]["WEIGHTS"] == "weights/there.pth"
    assert 'WEIGHTS = "weights/there.pth"' in (tmp_path / "out.py").read_text()
    with pytest.raises(ValueError, match="need --to detectron2: leave them out for timm"):
        convert(str(bundle), "timm", tmp_path / "out.safetensors", weights="there")


def test_a_backbone_for_other_than_color_images_is_refused_for_detectron2(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = timm.create_model("resnet18", num_classes=0, in_chans=5)
    cfg = {"mean": [0.5] * 5, "std": [0.2] * 5, "input_size": [5, 224, 224], "num_classes": 0}
    config = {"architecture": "resnet18", "model_args": {"in_chans": 5}, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="takes images of 5 bands, but Detectron2 reads only color images"):
        convert(str(tmp_path), "detectron2", tmp_path / "out.pth")


def test_what_was_written_is_also_said(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "backbone.pth"
    for to in ("detectron2", "torchvision"):
        how_to_load = convert(str(bundle), to, out).how_to_load
        assert main(["convert", str(bundle), "--to", to, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert how_to_load in said
        assert f"backbone.pth: resnet18 for {to}, 120 tensors" in said


@pytest.mark.parametrize(
    ("to", "name"),
    [("detectron2", "a.pth"), ("detectron2", "a.pkl"), ("torchvision", "a.pth"), ("timm", "a.safetensors")],
)
def test_the_same_backbone_gives_the_same_bytes(bundle: Path, tmp_path: Path, to: str, name: str) -> None:
    one, two = (convert(str(bundle), to, tmp_path / folder / name).path for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert two.read_bytes() == convert(str(bundle), to, two.with_stem("other")).path.read_bytes()


# ---- where it comes from -----------------------------------------------------------------------------------


def converted_tensors(source: object, out: Path) -> tuple[dict[str, Tensor], Converted]:
    converted = convert(str(source), "timm", out / "converted.safetensors")
    return load_file(converted.path), converted


def test_a_run_a_bundle_and_its_address_give_the_same(
    resnet18: tuple[Path, nn.Module], bundle: Path, tmp_path: Path
) -> None:
    run, model = resnet18
    for source in (run, bundle, f"local-dir:{bundle}"):
        tensors, converted = converted_tensors(source, tmp_path)
        assert_same(tensors, dict(model.state_dict()))
        assert converted.architecture == "resnet18"
        assert not converted.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_released_checkpoint_gives_its_student_in_its_own_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = released_tensors("clove", dtype=dtype)
    save_released(tmp_path / "ckpt.pth", "clove", theirs)
    tensors, converted = converted_tensors(tmp_path / "ckpt.pth", tmp_path)
    prefix = "module.encoder."
    assert_same(tensors, {name[len(prefix) :]: t for name, t in theirs.items() if name.startswith(prefix)})
    assert converted.architecture == "resnet18"


def test_weights_in_the_memory_order_of_training_convert_to_the_plain_one(tmp_path: Path) -> None:
    model = trained("resnet18").to(memory_format=torch.channels_last)
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    tensors, _ = converted_tensors(tmp_path / "resnet18.pth", tmp_path)
    assert_same(tensors, dict(model.state_dict()))


def test_a_view_into_a_larger_tensor_takes_nothing_else_along(tmp_path: Path) -> None:
    tensors = dict(trained("resnet18").state_dict())
    secret = torch.full((10_000_000,), 7.0)
    secret[:64] = tensors["bn1.bias"]
    torch.save(tensors | {"bn1.bias": secret[:64]}, tmp_path / "in.pth")
    assert (tmp_path / "in.pth").stat().st_size > 80e6
    assert convert(str(tmp_path / "in.pth"), "torchvision", tmp_path / "out.pth").path.stat().st_size < 50e6


@pytest.mark.parametrize("to", ["torchvision", "detectron2", "mmseg"])
def test_a_converted_file_converts_back(
    bundle: Path, tmp_path: Path, resnet18: tuple[Path, nn.Module], to: str
) -> None:
    there = convert(str(bundle), to, tmp_path / "there.pth").path
    tensors, converted = converted_tensors(there, tmp_path)
    assert_same(tensors, dict(resnet18[1].state_dict()))
    lookalike, images = converted.notes  # which other architectures have these names, and that no mean is in the file
    assert "and resnetblur18: if it is one of these" in lookalike
    assert images == "The file does not say how images were normalized; ImageNet's mean and std are taken."


def test_a_classifier_is_left_out_and_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    tensors, converted = converted_tensors(tmp_path / "resnet18.pth", tmp_path)
    assert len(tensors) == 120
    assert "The classifier was left out (fc.bias, fc.weight)." in converted.notes
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "resnet18.pth"), "--to", "timm", "--out", str(out)]) == 0
    assert "The classifier was left out (fc.bias, fc.weight)." in capsys.readouterr().out


def test_a_bundle_of_timms_own_with_a_classifier_loses_it_and_keeps_its_normalization(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=7)
    cfg = {"num_classes": 7, "classifier": "fc", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load(str(tmp_path))
    assert loaded.notes == ("The classifier was left out (fc.bias, fc.weight).",)
    assert len(loaded.tensors) == 120
    converted = convert(str(tmp_path), "detectron2", tmp_path / "out.pth")
    assert "PIXEL_MEAN: [127.5, 127.5, 127.5]\n  PIXEL_STD: [63.75, 63.75, 63.75]" in converted.how_to_load


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["torchvision", "mmseg"])
def test_what_is_no_resnet_has_no_other_names(convnext: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(ValueError, match=rf"is a convnext_atto, which {to} does not build: expected one of resnet18, "):
        convert(str(convnext), to, tmp_path / "out.pth")
    assert not any(tmp_path.iterdir()), "something was left behind"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer4.1.bn2.bias"), r"1 missing tensor \(layer4\.1\.bn2\.bias\)"),
        (lambda t: t.update({"junk": torch.ones(1)}), r"1 unexpected tensor \(junk\)"),
        (
            lambda t: t.update({"conv1.weight": torch.ones(64, 1, 7, 7)}),
            r"mis-shaped tensor \(conv1\.weight \(64, 1,",
        ),
        (
            lambda t: t["bn1.running_var"].fill_(torch.inf),
            r"1 tensor \(bn1\.running_var\) with non-finite values",
        ),
    ],
)
@pytest.mark.parametrize("to", ["detectron2", "timm"])
def test_a_file_that_is_not_whole_is_refused_by_the_tensors_name(tmp_path: Path, change, message: str, to: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in trained("resnet18").state_dict().items()}
    change(tensors)
    save_file(tensors, tmp_path / "in.safetensors")
    out = tmp_path / ("out.pth" if to == "detectron2" else "out.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "in.safetensors"), to, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors"], "something was left behind"


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        (
            "tensorflow",
            "out.pth",
            "cannot convert to 'tensorflow': choose one of timm, torchvision, mmseg, detectron2, onnx",
        ),
        ("detectron2", "out.safetensors", r"a file for detectron2 ends in \.pth or \.pkl"),
        ("timm", "out", r"a file for timm ends in \.safetensors"),
        ("timm", "folder.safetensors", r"folder\.safetensors is a folder; give a file with --out"),
        ("timm", "in.safetensors", r"in\.safetensors is the source itself"),
        ("detectron2", "mine.pth", r"mine\.yaml exists and was not written by clove-hub"),
        ("detectron2", "code.pth", r"code\.py exists and was not written by clove-hub"),
        ("timm", "file/out.safetensors", r"cannot write .*out\.safetensors: .*; give another --out"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(
    bundle: Path, tmp_path: Path, to: str, name: str, message: str
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "mine.yaml").write_text("MODEL: {}  # by hand")
    (tmp_path / "code.py").write_text("model = {}  # by hand")
    (tmp_path / "in.safetensors").write_bytes((bundle / "model.safetensors").read_bytes())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "in.safetensors"), to, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before, "something was left behind"
    assert (tmp_path / "mine.yaml").read_text() == "MODEL: {}  # by hand"


def test_what_was_written_before_is_replaced(bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        converted = convert(str(bundle), "detectron2", tmp_path / "out.pth")
        assert len(read_tensors(converted.path)[0]) == 120
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth", "out.py", "out.yaml"]


def test_the_command_converts_and_refuses(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.pth"
    assert main(["convert", str(bundle), "--to", "detectron2", "--out", str(out)]) == 0
    assert len(read_tensors(out)[0]) == 120
    capsys.readouterr()
    assert main(["convert", str(bundle), "--to", "timm", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: --out {out}: a file for timm ends in .safetensors\n"
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(bundle), "--to", "tensorflow", "--out", str(out)])
