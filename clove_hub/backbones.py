"""A timm model as a feature-map extractor."""

from __future__ import annotations

import difflib

import timm
import torch
from torch import Tensor, nn


def create_backbone(model: str) -> nn.Module:
    """A randomly initialized timm model without its classifier, whose state dict plain timm loads.

    Args:
        model: an architecture of timm, without a tag (`resnet50`).

    Raises:
        ValueError: timm does not know the name, or the model yields no feature map.
    """
    if "." in model:
        raise ValueError(
            f"backbone.model={model!r} names pre-trained weights (the tag after the dot); pre-training starts from "
            f"random weights: write {model.split('.')[0]!r}"
        )
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`timm.list_models()` lists all."
        raise ValueError(f"backbone.model={model!r} is not an architecture of timm {timm.__version__}: {hint}")
    backbone: nn.Module = timm.create_model(model, pretrained=False, num_classes=0)
    if len(feature_shape(backbone, 224)) != 3:
        raise ValueError(
            f"backbone.model={model!r} yields no feature map (C, H, W) but features of shape "
            f"{feature_shape(backbone, 224)}: dense methods need a convolutional or hierarchical model, "
            "such as resnet50, convnext_tiny, regnety_016 or swin_tiny_patch4_window7_224"
        )
    freeze_unused(backbone)
    return backbone


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The last feature map, channels first: (B, 3, H, W) -> (B, C, h, w)."""
    features: Tensor = backbone.forward_features(images)  # type: ignore[operator]
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":  # timm's Swin family
        features = features.permute(0, 3, 1, 2)
    return features


def feature_shape(backbone: nn.Module, size: int) -> tuple[int, ...]:
    """Shape of the features of one square image of `size` pixels, without the batch: (C, h, w) for a feature map.

    Raises:
        ValueError: the model cannot take an image of this size.
    """
    training = backbone.training
    parameter = next(backbone.parameters())
    try:
        with torch.no_grad():
            image = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
            return tuple(feature_map(backbone.eval(), image).shape[1:])
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"the backbone cannot take images of {size}x{size} pixels: {error}") from error
    finally:
        backbone.train(training)


def freeze_unused(backbone: nn.Module) -> None:
    """Freezes parameters that do not reach the feature map, such as the norm before ConvNeXt's classifier.

    Distributed training waits for the gradient of every parameter that asks for one.
    """
    training = backbone.training
    torch.autograd.backward(feature_map(backbone.eval(), torch.zeros(1, 3, 224, 224)).sum())
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    backbone.train(training)
