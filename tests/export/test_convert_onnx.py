"""A backbone as an ONNX file: what it holds, who else runs it alike, and that a wrong one is never handed out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from synthetic import trained, write_run
from torch import Tensor

from clove_hub.cli import main
from clove_hub.export import convert, export_run
from clove_hub.export import onnx as exporter
from clove_hub.export.convert import write_converted
from clove_hub.weights import load, load_backbone

HOW = "is not installed: pip install 'clove-hub[onnx]'"
onnx = pytest.importorskip("onnx", reason=f"onnx {HOW}")
onnxruntime = pytest.importorskip("onnxruntime", reason=f"onnxruntime {HOW}")
OUTPUTS = ["stride_2", "stride_4", "stride_8", "stride_16", "stride_32", "embedding"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_run(tmp_path_factory.mktemp("onnx") / "run", "test_resnet", finished=True)
    run = next(tmp_path_factory.getbasetemp().glob("onnx*")) / "run"
    return export_run(run, license="mit")


@pytest.fixture(scope="module")
def file(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(bundle, "onnx", tmp_path_factory.mktemp("file") / "backbone.onnx").path


def by_torch(bundle: Path, images: Tensor) -> list[np.ndarray[Any, Any]]:
    backbone = load_backbone(bundle)
    with torch.no_grad():
        return [t.numpy() for t in (*backbone.maps(images, (-5, -4, -3, -2, -1)), backbone.pooled(images))]


def assert_alike(found: Any, expected: Any) -> None:
    for name, one, other in zip(OUTPUTS, found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 97, 50), (2, 3, 33, 160)])
def test_it_gives_what_torch_gives_for_any_batch_and_sides(bundle: Path, file: Path, shape: tuple[int, ...]) -> None:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == OUTPUTS
    images = torch.randn(shape)
    found = session.run(None, {"pixels": images.numpy()})
    assert_alike(found, by_torch(bundle, images))
    for name, output in zip(OUTPUTS[:-1], found, strict=False):
        stride = int(name.removeprefix("stride_"))
        assert output.shape[2:] == (-(-shape[2] // stride), -(-shape[3] // stride))


def test_somebody_elses_runner_gives_the_same(bundle: Path, file: Path) -> None:
    """onnx's own reference, which shares no code with onnxruntime."""
    from onnx.reference import ReferenceEvaluator

    images = torch.randn(2, 3, 39, 45)
    assert_alike(ReferenceEvaluator(onnx.load(file)).run(None, {"pixels": images.numpy()}), by_torch(bundle, images))


def test_it_says_what_it_is_and_what_it_wants(bundle: Path, file: Path) -> None:
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", exporter.OPSET)]
    (pixels,) = model.graph.input

    def shape(value: Any) -> list[Any]:
        return [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]

    assert shape(pixels) == ["batch", 3, "height", "width"]
    assert shape(model.graph.output[1]) == ["batch", 32, "height_4", "width_4"]
    assert shape(model.graph.output[-1]) == ["batch", 96]
    told = {one.key: one.value for one in model.metadata_props}
    weights = load(bundle)
    assert told["architecture"] == "test_resnet"
    assert told["fingerprint"] == weights.fingerprint
    assert told["license"] == "mit"
    assert told["sides"] == "any"
    assert told["source"] == bundle.name, "and no folder of this machine"
    assert str(bundle.parent).encode() not in file.read_bytes()
    outputs = json.loads(told["outputs"])
    assert list(outputs) == OUTPUTS
    assert outputs["stride_16"] == {"stride": 16, "channels": 192}
    assert json.loads(told["preprocessing"]) == {
        "colors": "RGB",
        "white": 1,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "size": 64,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }


def test_the_command_writes_it_and_says_how_to_run_it(
    bundle: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.onnx"
    assert main(["convert", str(bundle), "--to", "onnx", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: test_resnet for onnx, 90 tensors\n" in said
    assert "Opset 17; input pixels (batch, 3, height, width), any batch size, sides: any; outputs stride_2, " in said
    assert "on inputs of 2x3x64x64 and 1x3x101x83: they differ by at most" in said
    names: dict[str, Any] = {}
    exec(said[said.index("import numpy") :], names)
    assert names["embedding"].shape == (1, 96)
    assert names["stride_8"].shape == (1, 48, 8, 8)
    assert out.read_bytes() == file.read_bytes(), "the same backbone gives the same bytes"


def test_a_network_of_one_size_keeps_it_and_says_so(tmp_path: Path) -> None:
    save_file(trained("test_vit").state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    converted = convert(tmp_path, "onnx", tmp_path / "vit.onnx")
    note = next(note for note in converted.notes if note.startswith("Opset"))
    assert note.endswith(
        "sides: 160, fixed; outputs stride_16, embedding. The network or its export accepts no other sides."
    )
    pixels = onnx.load(converted.path).graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_value for side in pixels][1:] == [3, 160, 160]


def test_random_weights_of_a_network_of_one_size_take_images_of_it(tmp_path: Path) -> None:
    """They were trained with none, and 224 is not what this one is built for."""
    fixed = dataclasses.replace(load("random:test_vit"), model_args={"dynamic_img_size": False})
    converted = write_converted(fixed, "onnx", tmp_path / "out.onnx")
    names: dict[str, Any] = {}
    exec(converted.how_to_load, names)
    assert names["image"].shape == (160, 160, 3)
    assert names["embedding"].shape == (1, 64)
    (told,) = (one.value for one in onnx.load(converted.path).metadata_props if one.key == "preprocessing")
    assert json.loads(told)["size"] == 160


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["a weight", "an output"])
def test_a_file_that_is_not_the_backbone_is_not_handed_out(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    exported = exporter._exported

    def damaged(*arguments: Any) -> bytes:
        model = onnx.load_model_from_string(exported(*arguments))
        if change == "an output":
            nodes = [node for node in model.graph.node if "stride_8" in node.output]
            nodes[0].op_type = "Sigmoid"
        else:
            tensor = next(one for one in model.graph.initializer if len(one.dims) == 4)
            values = onnx.numpy_helper.to_array(tensor).copy()
            values.flat[0] += 0.1
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        return bytes(model.SerializeToString())

    monkeypatch.setattr(exporter, "_exported", damaged)
    out = tmp_path / "out.onnx"
    out.write_bytes(b"what was there before")
    with pytest.raises(
        ValueError, match=r"onnxruntime's outputs differ from torch's by .*Nothing was written"
    ) as error:
        convert(bundle, "onnx", out)
    assert "expected at most 1e-04" in str(error.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there before"]


def test_sides_that_the_export_does_not_leave_open_are_found_and_fixed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding computed for the traced size, as a number in the graph: right there, and nowhere else."""

    class Cropped(exporter._Outputs):
        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            last: list[Tensor] = list(super().forward(pixels))
            height, width = map(int, last[0].shape[2:])  # tracing keeps the numbers
            return (last[0][:, :, :height, :width], *last[1:])

    monkeypatch.setattr(exporter, "_Outputs", Cropped)
    converted = convert(bundle, "onnx", tmp_path / "out.onnx")
    assert "sides: 64, fixed" in converted.notes[0]


def test_what_the_exporter_cannot_do_is_said_in_a_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Eigenvalues(exporter._Outputs):
        def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
            *maps, pooled = super().forward(pixels)
            return (*maps, torch.linalg.eigvals(maps[0]).abs().mean() + pooled)

    monkeypatch.setattr(exporter, "_Outputs", Eigenvalues)
    with pytest.raises(ValueError, match=r"cannot be exported to ONNX: .*eigvals.*--to timm") as error:
        convert(bundle, "onnx", tmp_path / "out.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_the_command_says_what_to_install(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["convert", str(bundle), "--to", "onnx", "--out", str(tmp_path / "out.onnx")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --to onnx needs onnx and onnxruntime (")
    assert package in error.partition("(")[2]
    assert error.endswith("): pip install 'clove-hub[onnx]'\n")
    assert not list(tmp_path.iterdir())


def test_a_network_larger_than_one_file_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"bytes, but an ONNX file holds at most 1,000: choose a smaller backbone"):
        convert(bundle, "onnx", tmp_path / "out.onnx")


def test_another_ending_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a file for onnx ends in \.onnx"):
        convert("no/such/run", "onnx", tmp_path / "out.pth")
