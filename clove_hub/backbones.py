"""A timm model as a feature-map extractor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import timm
import torch
from torch import Tensor, nn

from clove_hub.weights.architectures import require_architecture


def create_backbone(model: str, *, zero_init_last: bool = True) -> nn.Module:
    """A randomly initialized timm model without its classifier, whose state dict plain timm loads.

    Args:
        model: an architecture of timm, without a tag (`resnet50`).
        zero_init_last: leave the scale of a residual branch's last norm at 0, where timm lets it start; otherwise it
            starts at 1, as torchvision's ResNets do.

    Raises:
        ValueError: timm does not know the name, or the model yields no feature map.
    """
    if "." in model:
        raise ValueError(
            f"backbone.model={model!r} names pre-trained weights (the tag after the dot); pre-training starts from "
            f"random weights: write {model.split('.')[0]!r}"
        )
    require_architecture(model, "backbone.model=")
    backbone: nn.Module = timm.create_model(model, pretrained=False, num_classes=0)
    if not zero_init_last:
        for norm in backbone.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine and not norm.weight.any():
                nn.init.ones_(norm.weight)
    shape = feature_shape(backbone, 224)
    if len(shape) != 3:
        raise ValueError(
            f"backbone.model={model!r} yields no feature map (C, H, W) but features of shape {shape}: dense methods need a convolutional or hierarchical model, "
            "such as resnet50, convnext_tiny, regnety_016 or swin_tiny_patch4_window7_224"
        )
    freeze_unused(backbone, lambda: feature_map(backbone, torch.zeros(1, 3, 224, 224)).sum())
    return backbone


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The last feature map, channels first: (B, 3, H, W) -> (B, C, h, w)."""
    features: Tensor = backbone.forward_features(images)  # type: ignore[operator]
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":  # timm's Swin family
        features = features.permute(0, 3, 1, 2)
    return features


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, after which each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def feature_shape(backbone: nn.Module, size: int) -> tuple[int, ...]:
    """Shape of the features of one square image of `size` pixels, without the batch: (C, h, w) for a feature map.

    Raises:
        ValueError: the model cannot take an image of this size.
    """
    parameter = next(backbone.parameters())
    image = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
    try:
        with evaluating(backbone), torch.no_grad():
            return tuple(feature_map(backbone, image).shape[1:])
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"the backbone cannot take images of {size}x{size} pixels: {error}") from error


def freeze_unused(module: nn.Module, output: Callable[[], Tensor]) -> None:
    """Freezes parameters that do not reach the output, such as the norm before ConvNeXt's classifier.

    Distributed training waits for the gradient of every parameter that asks for one.

    Args:
        output: computes a scalar with the module, which is in eval mode meanwhile.
    """
    with evaluating(module), torch.enable_grad():
        torch.autograd.backward(output())
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
