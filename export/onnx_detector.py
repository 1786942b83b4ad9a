"""A fine-tuned model of torchvision as an ONNX file, checked against torch.

    image       (3, height, width)  RGB, float32, from 0 to 1: the file normalizes and resizes as the model does
    boxes       (N, 4)  x0, y0, x1, y1 in pixels of the image, the surest first; labels (N,) from 1, scores (N,)
    masks       (N, 1, height, width), probabilities; keypoints (N, K, 3), keypoints_scores (N, K)
    scores      for segmentation (classes, height, width): the class of a pixel is the largest

It is traced, which torchvision's detectors support: their control flow over boxes becomes operators, and images of any
size are accepted. Tracing errors are silent, so no file is written before onnxruntime and torch agree on two images of
different sizes, with boxes of every score.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bundle import without_folders
from .onnx import OPSET, OnnxFile, require_packages

if TYPE_CHECKING:
    from clove_hub import Detector

TOLERANCE = 1e-3
"""By how much an output may differ from torch's, as a part of its largest value; boxes and scores of float32 give 1e-6."""
CHECKED = ((240, 320), (331, 253))
"""Height and width of the images that it is traced and checked with: odd sides show padding that tracing took for fixed."""
MOST_DIFFERENT = 0.05
"""Of all boxes of a check, the share that may differ: rounding decides which of two boxes with nearly the same score is
suppressed, and a detector after a few steps has many such boxes."""


def to_onnx_detector(detector: Detector) -> OnnxFile:
    """Exports a fine-tuned model, and checks the file against torch.

    Raises:
        ValueError: onnx or onnxruntime is missing, torch does not export the network, or what onnxruntime makes of the file
            is not what torch makes of the model.
    """
    require_packages()
    stored = detector.stored
    network = detector.network.cpu().float()
    side = getattr(detector.settings.images, "side", None)
    sizes = CHECKED if side is None else ((side, side),)
    images = [_image(*size) for size in sizes]
    names = list(_names(network, images[0]))
    try:
        with every_score(network):
            content = _exported(network, images[0], names, free=side is None)
            compared = [_compare(content, network, image, names) for image in images]
        content = _exported(network, images[0], names, free=side is None)
    except (ValueError, RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        problem = str(error).partition("\n")[0][:300]
        raise ValueError(f"{stored.what} cannot be exported to ONNX: {problem}. Nothing was written") from error
    told = "any" if side is None else f"{side} x {side}, fixed"
    content = _with_metadata(content, detector, told)
    scored = "boxes" in names
    seen = " and ".join(f"{height}x{width}" for height, width in sizes)
    notes = (
        f"Opset {OPSET}; input image (3, height, width), RGB from 0 to 1, sides: {told}; outputs {', '.join(names)}.",
        f"onnxruntime's outputs match torch's on images of {seen}, with boxes of every score: {'; '.join(compared)}."
        if scored
        else f"onnxruntime's outputs match torch's on images of {seen}: {'; '.join(compared)}.",
    )
    return OnnxFile(content, side or max(CHECKED[0]), tuple(names), notes)


@contextlib.contextmanager
def every_score(network: Any) -> Iterator[None]:
    """Let a detector return boxes of any score within the context; otherwise a check might compare no boxes."""
    heads = getattr(network, "roi_heads", None)
    if heads is None:
        yield
        return
    before = heads.score_thresh
    heads.score_thresh = 0.0
    try:
        yield
    finally:
        heads.score_thresh = before


@contextlib.contextmanager
def exact_sizes(network: Any) -> Iterator[None]:
    """Let a detector compute the resized size in float64 within the context, as torch does outside tracing.

    torchvision traces it in float32: because of rounding, an image whose shorter side should become 800 pixels may get
    799, and its boxes move.
    """
    transform = getattr(network, "transform", None)
    if transform is None:
        yield
        return
    # As vectors: what is a single number becomes float32 in the exporter, of whatever type it is.
    shorter, longer = (
        torch.tensor([side], dtype=torch.float64) for side in (transform.min_size[-1], transform.max_size)
    )

    def resize(image: Tensor, target: None = None) -> tuple[Tensor, None]:
        sides = torch._shape_as_tensor(image)[-2:].double()
        scale = torch.minimum(shorter / sides.amin(0, keepdim=True), longer / sides.amax(0, keepdim=True))
        height, width = torch.floor(sides * scale).long().unbind()
        size: Any = (height, width)  # tensors, so that they stay open
        return nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], target

    transform.resize = resize
    try:
        yield
    finally:
        del transform.resize


def _image(height: int, width: int) -> Tensor:
    """Smooth colors with an edge here and there."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, 7, 9, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


class _OneImage(nn.Module):
    """The outputs of one image as a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.network([image])[0]
        return tuple(found.values()) if isinstance(found, dict) else (found,)


@torch.no_grad()
def _names(network: nn.Module, image: Tensor) -> Mapping[str, Tensor]:
    found = network([image])[0]
    return found if isinstance(found, dict) else {"scores": found}


def _exported(network: nn.Module, image: Tensor, names: list[str], free: bool) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), exact_sizes(network):
        warnings.simplefilter("ignore")  # on each number that tracing takes for a constant: the check decides
        torch.onnx.export(
            _OneImage(network).eval(),
            (image,),
            buffer,  # type: ignore[arg-type]  # what traces takes a file in memory as well
            input_names=["image"],
            output_names=names,
            dynamic_axes={"image": {1: "height", 2: "width"}} if free else None,
            opset_version=OPSET,
            dynamo=False,
        )
    return buffer.getvalue()


def _compare(content: bytes, network: nn.Module, image: Tensor, names: list[str]) -> str:
    """How far the file is from torch on an image, in words.

    Raises:
        ValueError: too far.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = {
        name: torch.from_numpy(value)
        for name, value in zip(names, session.run(None, {"image": image.numpy()}), strict=True)
    }
    expected = _names(network, image)
    size = "x".join(map(str, image.shape[1:]))
    if "boxes" not in expected:
        off = _off(found["scores"], expected["scores"])
        if not off <= TOLERANCE:
            raise ValueError(f"on {size} onnxruntime's scores differ from torch's by {off:.1e} of the largest value")
        return f"{size}: scores differ by at most {off:.1e} of the largest value"
    count = len(expected["boxes"])
    same, ious = matched(expected, found)
    if max(abs(len(found["boxes"]) - count), count - same) > MOST_DIFFERENT * count:
        raise ValueError(
            f"on {size} torch finds {count} boxes and onnxruntime {len(found['boxes'])}, of which {same} agree"
        )
    if same == count == len(found["boxes"]):  # then in one order, or in that of equal scores
        for name in ("masks", "keypoints"):
            if name in expected and count and not (off := _off(found[name], expected[name])) <= 10 * TOLERANCE:
                raise ValueError(
                    f"on {size} onnxruntime's {name} differ from torch's by {off:.1e} of the largest value"
                )
    return f"{size}: {same} of {count} boxes, lowest IoU {ious:.5f}"


def matched(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], least: float = 0.99) -> tuple[int, float]:
    """How many boxes have one of the same label and nearly the same score at the same place, and the lowest IoU of those.

    Args:
        least: IoU at which two boxes are the same.
    """
    from torchvision.ops import box_iou

    iou = box_iou(expected["boxes"], found["boxes"])
    iou[expected["labels"][:, None] != found["labels"]] = 0
    iou[(expected["scores"][:, None] - found["scores"]).abs() > TOLERANCE] = 0
    if not iou.numel():
        return 0, 1.0
    best = iou.max(1).values
    return int((best > least).sum()), float(best[best > least].min()) if (best > least).any() else 0.0


def _off(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _with_metadata(content: bytes, detector: Detector, sides: str) -> bytes:
    """The file with everything that whoever deploys it has to know, as text; what has structure is JSON."""
    import onnx

    stored = detector.stored
    model = onnx.load_model_from_string(content)
    classes = {number: category.name for number, category in enumerate(stored.categories)}
    first = 0 if stored.task == "segmentation" else 1
    onnx.helper.set_model_props(
        model,
        {
            "task": stored.task,
            "architecture": stored.architecture,
            "source": str(without_folders(stored.name.removeprefix("local-dir:"))),
            "sha256": stored.sha256,
            "classes": json.dumps({number + first: name for number, name in classes.items()}, ensure_ascii=False),
            "category_ids": json.dumps({number + first: c.id for number, c in enumerate(stored.categories)}),
            "images": json.dumps({"colors": "RGB", "white": 1} | dataclasses.asdict(detector.settings.images)),
            "sides": sides,
        },
    )
    onnx.checker.check_model(model, full_check=True)
    whole: bytes = model.SerializeToString(deterministic=True)
    return whole
