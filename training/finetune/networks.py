"""torchvision's detectors and FCN on a given backbone.

A ResNet becomes torchvision's own; the feature maps of any other timm model are used directly. All layers are trained,
including batch norm, and images are normalized with the mean and standard deviation that the backbone was trained with.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from clove_hub.backbones import build_model, evaluating, freeze_unused
from clove_hub.data.masks import VOID
from clove_hub.evaluation.processes import world
from clove_hub.geometry import upsampled
from clove_hub.weights import Weights
from clove_hub.weights.backbone import padded, with_stride_one
from clove_hub.zoo.resnets import rename

from .settings import DetectionImages, DetectionNetwork, FinetuneSettings, SegmentationNetwork

log = logging.getLogger(__name__)

STAGES = ("layer1", "layer2", "layer3", "layer4")
PYRAMID_STRIDES = (4, 8, 16, 32)
PROBE = 256  # pixels


def build(source: Weights, settings: FinetuneSettings, classes: int, keypoints: int) -> nn.Module:
    """The network of a task, with heads initialized from torch's random state.

    Called with (images, targets) in training, it returns its losses; with (images) in evaluation, its predictions.

    Args:
        classes: number of classes, for detectors without the background, for segmentation all classes of pixels.
        keypoints: number per person; 0 if the task has none.

    Raises:
        ValueError: the backbone lacks the feature maps that the task needs.
    """
    network = settings.network
    if isinstance(network, SegmentationNetwork):
        made: nn.Module = Segmenter(source, classes, network)
    else:
        made = with_exact_boxes(detector(source, settings, classes, keypoints))
    if settings.task == "keypoints":  # torchvision's loss needs a view that the other layout does not allow
        return made
    return made.to(memory_format=torch.channels_last)  # convolutions are faster, also on CPUs


def misplaced(network: nn.Module, source: Weights) -> list[str]:
    """The source's tensors that differ in the network in any bit."""
    held = body_of(network).state_dict()
    expected = _tensors(source)

    def same(one: Tensor | None, other: Tensor | None) -> bool:
        return one is not None and other is not None and torch.equal(one.cpu(), other.to(one.dtype))

    return [name for name in sorted(held.keys() | expected.keys()) if not same(held.get(name), expected.get(name))]


def body_of(network: Any) -> nn.Module:
    """The backbone without pyramid and heads."""
    body: nn.Module = network.backbone.body
    return body


# ---- detectors -------------------------------------------------------------------------------------------------------


def detector(source: Weights, settings: FinetuneSettings, classes: int, keypoints: int) -> Any:
    """torchvision's detector of a task, for `build`."""
    network, images = settings.network, settings.images
    assert isinstance(network, DetectionNetwork)
    assert isinstance(images, DetectionImages)
    norm = nn.BatchNorm2d if network.head == "conv" else None
    arguments: dict[str, Any] = {
        "min_size": images.shortest_edge,
        "max_size": images.longest_edge,
        "image_mean": list(source.preprocessing.mean),
        "image_std": list(source.preprocessing.std),
        "rpn_pre_nms_top_n_train": 2 * network.proposals,
        "rpn_pre_nms_top_n_test": network.proposals,
        "rpn_post_nms_top_n_train": 2 * network.proposals,
        "rpn_post_nms_top_n_test": network.proposals,
        "box_batch_size_per_image": network.rois,
        "box_detections_per_img": network.detections,
        "_skip_resize": images.lsj is not None,  # in training; done in `dataset`
    }
    backbone = Pyramid(source, norm, network.trainable_layers, network.frozen_norm)
    channels = backbone.out_channels
    if settings.task == "keypoints":
        return KeypointRCNN(backbone, classes + 1, num_keypoints=keypoints, **arguments)
    if network.head == "conv":
        arguments["box_head"] = FastRCNNConvFCHead((channels, 7, 7), [256] * 4, [1024], norm_layer=norm)
    if settings.task == "instances":
        arguments["mask_head"] = MaskRCNNHeads(channels, [256] * 4, 1, norm_layer=norm)
    make = MaskRCNN if settings.task == "instances" else FasterRCNN
    return make(backbone, classes + 1, **arguments)


def with_exact_boxes(detector: Any) -> nn.Module:
    """The detector with float32 boxes, even in mixed precision.

    torchvision computes anchors and boxes in the type of its layers' outputs. bfloat16 has no number between 256 and
    258: proposals and true boxes would be rounded to whole pixels and more, a small object's box would be empty and its
    loss NaN.
    """
    for layer in (detector.rpn.head, detector.roi_heads.box_predictor):
        layer.register_forward_hook(_in_float32)
    detector.rpn.anchor_generator.register_forward_pre_hook(_anchors_in_float32)
    network: nn.Module = detector
    return network


def _anchors_in_float32(_: nn.Module, given: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Anchors get the type of the maps, of which only the size is used otherwise."""
    images, maps = given
    return images, [one.new_empty((), dtype=torch.float32).expand(one.shape[-2:]) for one in maps]


def _in_float32(_: nn.Module, __: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([one.float() for one in part] if isinstance(part, list) else part.float() for part in given)


class Pyramid(nn.Module):
    """Backbone and feature pyramid: the maps of strides 4, 8, 16, 32 and a pooled one, 256 channels each.

    Args:
        norm: norm of the pyramid's convolutions.
        trainable_layers: number of the stem and stages, from the top, that are trained.
        frozen_norm: whether the backbone's batch norm is frozen.
    """

    out_channels = 256

    def __init__(
        self, source: Weights, norm: type[nn.Module] | None, trainable_layers: int = 5, frozen_norm: bool = False
    ) -> None:
        super().__init__()
        self.body = make_body(source)
        freeze(self.body, trainable_layers, source)
        self.frozen_norm = frozen_norm
        for frozen in self.frozen():
            frozen.requires_grad_(False)
        maps = _maps(self.body, source.what)
        strides = tuple(PROBE // side.shape[-1] for side in maps)
        if strides != PYRAMID_STRIDES:
            raise ValueError(
                f"{source.what} is a {source.architecture}, whose last feature maps have the strides {strides}, but a "
                f"feature pyramid needs {PYRAMID_STRIDES}: use a convolutional or hierarchical model"
            )
        self.fpn = FeaturePyramidNetwork(
            [side.shape[1] for side in maps], self.out_channels, LastLevelMaxPool(), norm_layer=norm
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pyramid: dict[str, Tensor] = self.fpn(self.body(images))
        return pyramid

    def train(self, mode: bool = True) -> Pyramid:
        """Set the mode; even in training, frozen batch norm uses its running statistics and does not update them."""
        super().train(mode)
        for frozen in self.frozen():
            frozen.eval()
        return self

    def frozen(self) -> list[nn.Module]:
        """The frozen norms."""
        norms = (module for module in self.body.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        return list(norms) if self.frozen_norm else []


def freeze(body: nn.Module, trainable: int, source: Weights) -> None:
    """Freeze the stem and the first stages of a ResNet.

    Args:
        trainable: number of the stem and four stages, from the top, that stay trainable.

    Raises:
        ValueError: the network is not a ResNet and some layers are to be frozen.
    """
    network = body if source.plain_resnet else body.get_submodule("model")
    parts = ("conv1", "bn1"), *((stage,) for stage in STAGES)
    kept = [name for names in parts[: len(parts) - trainable] for name in names]
    if absent := [name for name in kept if not hasattr(network, name)]:
        raise ValueError(
            f"network.trainable_layers={trainable} is for ResNets, and {source.architecture} has no {absent[0]}: "
            "choose 5 (all)"
        )
    for name in kept:
        network.get_submodule(name).requires_grad_(False)


# ---- segmentation ----------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """FCN (He et al., MoCo, CVPR 2020): two dilated 3x3 convolutions and a 1x1 one on the last feature map.

    The last stage of a ResNet of plain blocks has stride 1 and dilation 2 (stride 16 in all); other models keep theirs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: Weights, classes: int, network: SegmentationNetwork) -> None:
        super().__init__()
        body = finer(make_body(source), source, network.dilate_first)
        self.backbone = nn.ModuleDict({"body": body})
        self.align_corners = network.align_corners
        channels, dilation = network.channels, network.dilation
        self.head = nn.Sequential(
            *_dilated(_maps(body, source.what)[-1].shape[1], channels, dilation),
            *_dilated(channels, channels, dilation),
            nn.Conv2d(channels, classes, 1, bias=network.bias),
        )
        self.register_buffer("mean", torch.tensor(source.preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(source.preprocessing.std).view(3, 1, 1))

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None) -> Any:
        """Images (3, H, W), values from 0 to 1, in training of equal size -> the loss, or scores (classes, H, W)."""
        if not self.training:
            if self.align_corners:
                return [self.scores(image[None])[0] for image in images]
            # Padded, so that each cell of the map covers a whole number of pixels.
            return [self.scores(padded(image[None]))[0, :, : image.shape[1], : image.shape[2]] for image in images]
        assert targets is not None
        truth = torch.stack([target["classes"] for target in targets]).long()
        # The mean over the pixels of all processes, whose gradients are averaged later; 0 if no pixel counts.
        counted = (truth != VOID).sum().float()
        if world()[1] > 1:
            dist.all_reduce(counted)
        # Flattened pixels: on an accelerator, the loss over maps is summed in arbitrary order.
        scores = self.scores(torch.stack(list(images))).movedim(1, 3).flatten(0, 2)
        total = F.cross_entropy(scores, truth.flatten(), ignore_index=VOID, reduction="sum")
        return {"loss_pixels": total * world()[1] / counted.clamp(min=1)}

    def scores(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) with values from 0 to 1 -> (B, classes, H, W)."""
        maps = self.backbone["body"]((images - self.mean) / self.std)
        scores = self.head(list(maps.values())[-1])
        with torch.autocast(images.device.type, enabled=False):
            return upsampled(scores.float(), (images.shape[2], images.shape[3]), align_corners=self.align_corners)


def finer(body: nn.Module, source: Weights, dilate_first: bool) -> nn.Module:
    """The body, with stride 1 and dilation 2 in the last stage of a ResNet of plain blocks.

    Args:
        dilate_first: whether the 3x3 convolution that had the stride is also dilated.
    """
    try:
        if source.plain_resnet:
            network = body = with_stride_one(body, "layer4")
        else:
            assert isinstance(body, TimmMaps)
            network = body.model = with_stride_one(body.model, "layer4")
    except ValueError as error:
        log.warning("the head uses the last feature map as it is: %s", error)
        return body
    for layer in network.get_submodule("layer4").modules():
        if dilate_first and isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.dilation = layer.padding = (2, 2)
    return body


def _dilated(into: int, out: int, dilation: int) -> list[nn.Module]:
    conv = nn.Conv2d(into, out, 3, padding=dilation, dilation=dilation, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


# ---- backbones -------------------------------------------------------------------------------------------------------


def make_body(source: Weights) -> nn.Module:
    """The backbone with the source's weights, all trainable; images -> four maps, the finest first."""
    if source.plain_resnet:
        body: nn.Module = IntermediateLayerGetter(
            get_model(source.architecture, weights=None), {stage: str(n) for n, stage in enumerate(STAGES)}
        )
    else:
        body = TimmMaps(source.architecture, source.model_args)
    body.load_state_dict(_tensors(source))
    if not source.plain_resnet:
        _maps(body, source.what)
        freeze_unused(
            body, lambda: torch.stack([one.sum() for one in body(torch.zeros(1, 3, PROBE, PROBE)).values()]).sum()
        )
    return body


class TimmMaps(nn.Module):
    """The last four feature maps of a timm model, with the model's own tensor names."""

    def __init__(self, architecture: str, model_args: Mapping[str, Any]) -> None:
        super().__init__()
        self.model: Any = build_model(architecture, model_args)
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"timm gives no feature maps of {architecture}: use a convolutional or hierarchical model")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.model.forward_intermediates(images, indices=4, intermediates_only=True)
        return OrderedDict((str(number), side) for number, side in enumerate(maps))


def _tensors(source: Weights) -> dict[str, Tensor]:
    """The source's tensors under the names of `make_body`."""
    if source.plain_resnet:
        return rename(source.tensors, "timm", "torchvision", source.what)
    return {f"model.{name}": tensor for name, tensor in source.tensors.items()}


def _maps(body: nn.Module, what: str) -> list[Tensor]:
    """The maps of one empty image of PROBE x PROBE pixels; statistics are unchanged."""
    try:
        with evaluating(body), torch.no_grad():
            return list(body(torch.zeros(1, 3, PROBE, PROBE)).values())
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{what} does not give four feature maps of an image of {PROBE} x {PROBE} pixels: {error}"
        ) from error
