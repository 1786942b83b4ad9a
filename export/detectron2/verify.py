"""Verify that a detector holds the backbone: every tensor in its place, and the feature maps of timm."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clove_hub.weights import Weights
from clove_hub.zoo.resnets import rename

from .config import replace_sync_bn

TOLERANCE = 1e-5
"""Largest difference of feature maps, relative to the map's largest value."""
PREFIXES = ("backbone.bottom_up.", "backbone.net.", "backbone.", "roi_heads.")
"""Prefixes of the network in a detector: with a pyramid, with ViTDet's, without any, and res5 of a C4 model."""


def require_held(cfg: Any, backbone: Weights) -> float:
    """Build the detector as in training, load the converted file, and compare it with the backbone, on the CPU.

    Returns:
        As `require_same`.

    Raises:
        ValueError: as `require_same`.
    """
    from detectron2.modeling import build_model

    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    replace_sync_bn(cfg)
    model: Any = build_model(cfg).eval()
    load_into(model, cfg.MODEL.WEIGHTS)
    return require_same(model, backbone)


def load_into(model: nn.Module, weights: str) -> None:
    """Load a file as Detectron2 does, without its list of new or unused tensors: here each tensor is compared."""
    from detectron2.checkpoint import DetectionCheckpointer

    said = logging.getLogger("fvcore.common.checkpoint")
    before = said.level
    said.setLevel(logging.ERROR)
    try:
        DetectionCheckpointer(model).load(weights)
    finally:
        said.setLevel(before)


def require_same(model: Any, backbone: Weights) -> float:
    """Compare a detector in eval mode on the CPU with the backbone.

    Every tensor must be in its place, an image of 0 to 255 normalized as the backbone expects, and the feature maps of
    the normalized image equal to timm's.

    Returns:
        The largest difference of any feature map from timm's, relative to the map's largest value.

    Raises:
        ValueError: a tensor is not in its place, or a feature map differs by more than TOLERANCE.
    """
    from detectron2.structures import ImageList

    require_placed(model, placed_names(backbone))
    generator = torch.Generator().manual_seed(0)
    seen = backbone.preprocessing
    image = torch.randint(0, 256, (len(seen.mean), 96, 128), generator=generator).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (seen.mean, seen.std))
    backbone_of, own = model.backbone, (image - model.pixel_mean) / model.pixel_std
    pixels = ImageList.from_tensors(
        [own], backbone_of.size_divisibility, padding_constraints=backbone_of.padding_constraints
    ).tensor
    normalized = torch.zeros_like(pixels)  # if a config pads images, the padding is compared, too
    normalized[:, :, :96, :128] = (image / 255 - mean) / std
    if not torch.allclose(pixels, normalized, rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(
            "the detector does not normalize images as the backbone was trained: check MODEL.PIXEL_MEAN and PIXEL_STD"
        )
    compare = _resnet_maps if backbone.plain_resnet else _timm_maps
    largest = 0.0
    with torch.no_grad():
        for name, ours, theirs in compare(model, backbone, pixels):
            if ours.shape != theirs.shape:
                raise ValueError(f"{name} is {tuple(ours.shape)} in the detector, {tuple(theirs.shape)} in timm")
            largest = max(largest, ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item())
            if not largest <= TOLERANCE:
                raise ValueError(
                    f"{name} of the detector differs from timm's by {largest:.1e} of its largest value, expected at most "
                    f"{TOLERANCE:g}"
                )
    return largest


def placed_names(backbone: Weights) -> dict[str, Tensor]:
    """The tensors by their names in the converted file: Detectron2's ResNet names, or timm's prefixed by `timm.`."""
    if backbone.plain_resnet is None:
        return {f"timm.{name}": tensor for name, tensor in backbone.tensors.items()}
    return rename(backbone.tensors, "timm", "detectron2", f"{backbone.what} ({backbone.architecture})")


Maps = Iterator[tuple[str, Tensor, Tensor]]
"""Name, the detector's map and timm's map."""


def _resnet_maps(model: Any, backbone: Weights, pixels: Tensor) -> Maps:
    reference: Any = backbone.build()
    resnet = getattr(model.backbone, "bottom_up", model.backbone)
    if hasattr(resnet, "res5"):
        res5 = resnet.res5
    else:  # a C4 model has it in its head; the norm after it does not belong to the backbone
        res5 = nn.Sequential(*[block for name, block in model.roi_heads.res5.named_children() if name != "norm"])
    x = resnet.stem(pixels)
    theirs = reference.maxpool(reference.act1(reference.bn1(reference.conv1(pixels))))
    for number, stage in enumerate((resnet.res2, resnet.res3, resnet.res4, res5), start=1):
        x, theirs = stage(x), getattr(reference, f"layer{number}")(theirs)
        yield f"res{number + 1}", x, theirs


def _timm_maps(model: Any, backbone: Weights, pixels: Tensor) -> Maps:
    reference: Any = backbone.build()
    inside = next(module for module in model.modules() if hasattr(module, "timm"))
    theirs = reference.forward_intermediates(pixels, norm=False, output_fmt="NCHW", intermediates_only=True)
    for name, ours in inside(pixels).items():
        yield name, ours, theirs[inside.levels[name]]


def require_placed(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that every tensor is in its place, with its value.

    Args:
        tensors: the tensors by Detectron2's names.

    Raises:
        ValueError: some are not; Detectron2 only logs that.
    """
    state, modules = model.state_dict(), dict(model.named_modules())
    wrong = []
    for name, tensor in tensors.items():
        at = place(name, state)
        if at is None:
            # Detectron2's frozen norm has all tensors of a batch norm but the counter, which has no effect.
            norm = place(name.rpartition(".")[0], modules)
            frozen = norm is not None and type(modules[norm]).__name__ == "FrozenBatchNorm2d"
            if not (frozen and name.endswith("num_batches_tracked")):
                wrong.append(f"{name} is missing")
        elif not torch.equal(state[at].cpu(), tensor.to(state[at].dtype)):
            wrong.append(f"{at} has another value")
    if wrong:
        raise ValueError(
            f"the detector does not hold the backbone: {len(wrong)} of {len(tensors)} tensors are wrong "
            f"({'; '.join(wrong[:4])})"
        )


def place(name: str, names: Container[str]) -> str | None:
    """The name in a detector, given its tensor (or module) names, of one of the backbone's; None if it has none."""
    return next((prefix + name for prefix in PREFIXES if prefix + name in names), None)
