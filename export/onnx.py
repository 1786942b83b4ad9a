"""A backbone as an ONNX file: feature maps and embedding, for any batch and, where the network allows it, any sides.

    pixels      (batch, 3, height, width)  RGB or the bands that the backbone takes, float32, white is 1, with the mean and std of the metadata
    stride_4    (batch, C, height / 4, width / 4), one for each stride that the network has
    embedding   (batch, C): what a classifier would get

torch has two exporters. Both leave the sides of ResNets and ConvNeXts open, but the newer one (dynamo=True) takes ten
to thirty times as long, and with open sides did not end within minutes on a network that pads as TensorFlow does
(tf_efficientnet_b0), which tracing gets right in a second. Tracing errors are silent, so no file is written before the
outputs of onnxruntime agree with torch's.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clove_hub.weights import Weights
from clove_hub.weights.backbone import Backbone

from .bundle import without_folders

OPSET = 17
"""The oldest with layer normalization as one operator: onnxruntime has it since 1.13, TensorRT since 8.6."""
TOLERANCE = 1e-4
"""Maximum difference of an output from torch's, relative to its largest value; float32 gives about 1e-6."""
LARGEST = (1 << 31) - (1 << 20)
"""Bytes of a protobuf message, with room for the graph."""
MULTIPLE = 32


@dataclass(frozen=True)
class OnnxFile:
    """A checked ONNX file, not written yet."""

    content: bytes
    side: int
    """In pixels, of the images that it is meant for."""
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    """What it takes and gives and how it was checked, in sentences."""


@dataclass(frozen=True)
class Sides:
    """Which images a file takes."""

    told: str
    checked: tuple[int, int]
    """Height and width of the second images that it is checked with."""
    free: bool = True


def to_onnx(loaded: Weights) -> OnnxFile:
    """Exports a backbone and checks the file against torch, on two batches of different sizes.

    Sides that the network or its export does not leave open are fixed at those of the backbone's training images.

    Raises:
        ValueError: onnx or onnxruntime is missing, the network has no feature maps or is too large for one file, or what
            onnxruntime makes of the file is not what torch makes of the backbone.
    """
    require_packages()
    if (size := sum(t.numel() * t.element_size() for t in loaded.tensors.values())) > LARGEST:
        raise ValueError(
            f"{loaded.what} has {size:,} bytes, but an ONNX file holds at most {LARGEST:,}: choose a smaller backbone"
        )
    backbone = Backbone(loaded.build().requires_grad_(False), loaded.preprocessing, loaded.name, loaded)
    levels = _levels(backbone.model, loaded)
    side = _side(backbone)
    bands = len(loaded.preprocessing.mean)
    images = _images(2, bands, side, side)
    problem = ""
    for sides in _choices(side):
        others = _images(1, bands, *sides.checked)
        try:
            expected = [_by_torch(backbone, list(levels.values()), one) for one in (images, others)]
        except ValueError:  # torch does not take them either
            continue
        try:
            content = _exported(backbone, levels, images, expected[0], sides, loaded)
            difference = max(map(_difference, _by_onnxruntime(content, (images, others)), expected))
        except Exception as error:  # both have kinds of errors of their own; torch's show the whole graph
            problem = str(error).partition("\n")[0][:300]
            continue
        if difference <= TOLERANCE:
            outputs = (*levels, "embedding")
            return OnnxFile(content, side, outputs, _notes(outputs, sides, difference, (images, others)))
        problem = f"on {tuple(others.shape)} onnxruntime's outputs differ from torch's by {difference:.1e} of the largest value, expected at most {TOLERANCE:.0e}"
    raise ValueError(
        f"{loaded.what} ({loaded.architecture}) cannot be exported to ONNX: {problem}. Nothing was written; "
        "`clove-hub convert` with --to timm writes it for PyTorch"
    )


def require_packages() -> None:
    """Raises ValueError unless what is needed is installed; the message says how to install it."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--to onnx needs onnx and onnxruntime ({error}): pip install 'clove-hub[onnx]'") from None


def _levels(model: nn.Module, loaded: Weights) -> dict[str, int]:
    """The last feature level of each stride, by the name of its output; levels count from the end, as in `Backbone.maps`."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{loaded.what} is a {loaded.architecture}, for which timm has no feature maps: choose another backbone"
        )
    info: Any = model.feature_info
    return {f"stride_{level['reduction']}": index - len(info) for index, level in enumerate(info)}


def _side(backbone: Backbone) -> int:
    """That of the training images, or of those that the network is built for where it takes no others."""
    own, built = backbone.preprocessing.size, backbone.model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    try:
        backbone.maps(torch.zeros(1, len(backbone.preprocessing.mean), own, own))
    except ValueError:
        return int(built)
    return own


def _choices(side: int) -> Iterator[Sides]:
    """From what is most useful to what is least; odd sides show padding that was computed for the traced size."""
    yield Sides("any", (side + 37, side + 19))
    whole = -(-side // MULTIPLE) * MULTIPLE
    yield Sides(f"multiples of {MULTIPLE}", (whole + 2 * MULTIPLE, whole + MULTIPLE))
    yield Sides(f"{side}, fixed", (side, side), free=False)


def _images(count: int, bands: int, height: int, width: int) -> Tensor:
    return torch.randn(count, bands, height, width, generator=torch.Generator().manual_seed(height))


def _by_torch(backbone: Backbone, levels: Sequence[int], images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [*backbone.maps(images, levels), backbone.pooled(images)]


def _by_onnxruntime(content: bytes, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: its errors are raised, and expected of sizes that are only tried
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for images in batches:
        yield [torch.from_numpy(output) for output in session.run(None, {"pixels": images.numpy()})]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any output, as a part of the largest value that it should have; infinite for another shape."""
    differences = [
        float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)) if one.shape == other.shape else torch.inf
        for one, other in zip(found, expected, strict=True)
    ]
    return max(torch.inf if difference != difference else difference for difference in differences)


class _Outputs(nn.Module):
    """What the file computes, in one pass."""

    def __init__(self, model: nn.Module, levels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        count = len(model.feature_info)  # type: ignore[arg-type]
        self.indices = [count + level for level in levels]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        last, maps = model.forward_intermediates(pixels, indices=self.indices, norm=True, output_fmt="NCHW")
        pooled: Tensor = model.forward_head(last)
        return (*maps, pooled.mean((2, 3)) if pooled.ndim == 4 else pooled)


def _exported(
    backbone: Backbone,
    levels: dict[str, int],
    images: Tensor,
    expected: Sequence[Tensor],
    sides: Sides,
    loaded: Weights,
) -> bytes:
    """The content of the file; `onnx.checker` has seen it."""
    import onnx

    buffer, outputs = io.BytesIO(), [*levels, "embedding"]
    free = {0: "batch"} | ({2: "height", 3: "width"} if sides.free else {})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # on each number that tracing takes for a constant: the check decides
        torch.onnx.export(
            _Outputs(backbone.model, list(levels.values())).eval(),
            (images,),
            buffer,  # type: ignore[arg-type]  # what traces takes a file in memory as well
            input_names=["pixels"],
            output_names=outputs,
            dynamic_axes={"pixels": free},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    # The shapes in words: tracing does not know all channels, and numbers the sides.
    for value, name, tensor in zip(model.graph.output, outputs, expected, strict=True):
        shape: list[str | int] = ["batch", *tensor.shape[1:]]
        if sides.free and name in levels:
            shape[2:] = [f"height_{name.removeprefix('stride_')}", f"width_{name.removeprefix('stride_')}"]
        value.CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    onnx.helper.set_model_props(model, _metadata(levels, expected, sides, images.shape[-1], loaded))
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _metadata(
    levels: dict[str, int], expected: Sequence[Tensor], sides: Sides, side: int, loaded: Weights
) -> dict[str, str]:
    """Everything that whoever deploys the file has to know, as text; what has structure is JSON."""
    seen = loaded.preprocessing
    maps = {
        name: {"stride": int(name.removeprefix("stride_")), "channels": t.shape[1]}
        for name, t in zip(levels, expected, strict=False)
    }
    return {
        "architecture": loaded.architecture,
        "source": str(without_folders(loaded.name.removeprefix("local-dir:"))),
        "fingerprint": loaded.fingerprint,
        "license": loaded.license or "not known",
        "sides": sides.told,
        "outputs": json.dumps(maps | {"embedding": {"channels": expected[-1].shape[1]}}),
        "preprocessing": json.dumps(
            {
                "colors": "RGB" if len(seen.mean) == 3 else f"{len(seen.mean)} bands",
                "white": 1,
                "mean": seen.mean,
                "std": seen.std,
                "size": side,
                "crop_pct": seen.crop_pct,
                "interpolation": seen.interpolation,
            }
        ),
    }


def _notes(outputs: Sequence[str], sides: Sides, difference: float, checked: Sequence[Tensor]) -> tuple[str, ...]:
    one, other = ("x".join(map(str, images.shape)) for images in checked)
    note = f"Opset {OPSET}; input pixels (batch, {checked[0].shape[1]}, height, width), any batch size, sides: {sides.told}; outputs {', '.join(outputs)}."
    if not sides.free:
        note += " The network or its export accepts no other sides."
    return (
        note,
        f"onnxruntime's outputs match torch's on inputs of {one} and {other}: they differ by at most {difference:.1e} of an "
        f"output's largest value (allowed: {TOLERANCE:.0e}).",
    )
