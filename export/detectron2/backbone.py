"""Any timm network as a backbone of Detectron2. Importing this registers its builders and their keys.

| MODEL.BACKBONE.NAME                      | output                                                                       |
|------------------------------------------|------------------------------------------------------------------------------|
| `build_clove_hub_backbone`               | timm's feature maps, by their strides: `res2` (4), `res3` (8), `res4`, `res5` |
| `build_clove_hub_fpn_backbone`           | a feature pyramid of them: `p2` to `p6`                                      |
| `build_retinanet_clove_hub_fpn_backbone` | RetinaNet's, `p3` to `p7`                                                    |

A vision transformer has maps of only one stride; its pyramid is ViTDet's (Li et al. 2022), built from the last map. All
blocks attend to the whole image, as in pre-training; ViTDet's windows would be a different network.

It adds the keys MODEL.CLOVE_HUB.ARCHITECTURE and ARGS to Detectron2's defaults: import it before `get_cfg()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, LazyCall
from detectron2.config.defaults import _C
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor

from clove_hub.backbones import build_model, evaluating, freeze_unused
from clove_hub.weights.architectures import architecture as facts_of

if "CLOVE_HUB" not in _C.MODEL:
    _C.MODEL.CLOVE_HUB = CfgNode({"ARCHITECTURE": "", "ARGS": CfgNode(new_allowed=True)})

STAGES = ("res2", "res3", "res4", "res5")
SCALES = {"res2": 4.0, "res3": 2.0, "res4": 1.0, "res5": 0.5}
"""Scale from a vision transformer's map, whose cells are 16 pixels wide, to the map of each stride."""


class TimmBackbone(Backbone):  # type: ignore[misc]
    """timm's network without classifier, returning its feature maps: (B, C, H, W) -> by name (B, C', H / s, W / s).

    They equal those of timm's `features_only`: without the norm after the last block. Unused parameters are frozen.

    Args:
        architecture: its name in timm, without a tag.
        args: additional arguments of `timm.create_model`, such as `drop_path_rate`.
        in_channels: channels of the images.

    Raises:
        ValueError: timm provides no feature maps of it, or none of these strides, or it has a fixed image size.
    """

    def __init__(
        self,
        architecture: str,
        args: Mapping[str, Any] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        args = dict(args or {})
        facts_of(architecture, args, "MODEL.CLOVE_HUB")
        self.timm = build_model(architecture, args)  # the prefix of the tensors in the converted file
        if self.timm.in_chans != in_channels:
            raise ValueError(
                f"{architecture} takes {self.timm.in_chans} bands, but MODEL.PIXEL_MEAN has {in_channels} numbers"
            )
        levels = _levels(self.timm, architecture)
        self.levels = {name: level for name, (level, _) in levels.items()}
        self._out_features = list(levels)
        self._out_feature_strides = {name: 2 ** int(name[-1]) for name in levels}
        self._out_feature_channels = {name: channels for name, (_, channels) in levels.items()}
        image = torch.zeros(1, in_channels, 64, 96)
        try:
            with evaluating(self), torch.no_grad():
                self(image)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{architecture} does not take images of any size ({error!s:.200}), as a detector needs: choose another "
                "network"
            ) from error
        freeze_unused(self, lambda: torch.stack([one.sum() for one in self(image).values()]).sum())

    @property
    def transformer(self) -> bool:
        """Whether all maps have a vision transformer's stride."""
        return self._out_features == ["res4"]

    @property
    def size_divisibility(self) -> int:
        return 32

    def require(self, names: Sequence[str]) -> list[str]:
        """The names of a pyramid's input maps, after checking that each exists."""
        if absent := [name for name in names if name not in self.levels]:
            raise ValueError(
                f"{self.architecture} has no feature map {', '.join(absent)} (res2 to res5 have strides of 4 to 32), only "
                f"{', '.join(self.levels)}: name those in MODEL.FPN.IN_FEATURES, or choose another network"
            )
        return list(names)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        indices = sorted(self.levels.values())
        maps = self.timm.forward_intermediates(  # type: ignore[operator]
            image, indices=indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return {name: maps[indices.index(level)] for name, level in self.levels.items()}


def _levels(model: Any, architecture: str) -> dict[str, tuple[int, int]]:
    """For each existing stage of STAGES, timm's index of the last map of its stride, and its channels."""
    info = [dict(one) for one in getattr(model, "feature_info", None) or ()]
    if not info or not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm has no feature maps for {architecture}: choose another network")
    found: dict[str, tuple[int, int]] = {}
    for number, one in enumerate(info):
        stage = f"res{math.log2(one['reduction']):g}"
        if stage in STAGES:
            found[stage] = (number, one["num_chs"])
    if not found:
        strides = sorted({one["reduction"] for one in info})
        raise ValueError(
            f"{architecture} has only feature maps of stride {', '.join(map(str, strides))}, and Detectron2's pyramids have 4, "
            "8, 16 and 32: choose another network; for vision transformers, one with patches of 16 pixels"
        )
    return found


class TransformerPyramid(SimpleFeaturePyramid):  # type: ignore[misc]
    """ViTDet's pyramid, with images padded to whole cells (Detectron2's own misspells the key for it)."""

    @property
    def size_divisibility(self) -> int:
        return int(self._size_divisibility)


# ---- YAML ------------------------------------------------------------------------------------------------------------


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_clove_hub_backbone(cfg: Any, input_shape: ShapeSpec) -> TimmBackbone:
    """timm's network, as named in the config."""
    if (frozen := cfg.MODEL.BACKBONE.FREEZE_AT) > 0:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {frozen}, which counts a ResNet's stages; {cfg.MODEL.CLOVE_HUB.ARCHITECTURE} is "
            "always trained completely: set 0"
        )
    named = cfg.MODEL.CLOVE_HUB
    if not named.ARCHITECTURE:
        raise ValueError("MODEL.CLOVE_HUB.ARCHITECTURE is empty: merge the settings that `clove-hub convert` wrote")
    return TimmBackbone(named.ARCHITECTURE, named.ARGS, input_shape.channels)


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_clove_hub_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> Backbone:
    """As Detectron2's `build_resnet_fpn_backbone`."""
    return _pyramid(cfg, input_shape, retinanet=False)


@BACKBONE_REGISTRY.register()  # type: ignore[untyped-decorator]
def build_retinanet_clove_hub_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> Backbone:
    """As Detectron2's `build_retinanet_resnet_fpn_backbone`."""
    return _pyramid(cfg, input_shape, retinanet=True)


def _pyramid(cfg: Any, input_shape: ShapeSpec, retinanet: bool) -> Backbone:
    fpn, net = cfg.MODEL.FPN, build_clove_hub_backbone(cfg, input_shape)
    width, last = fpn.OUT_CHANNELS, fpn.IN_FEATURES[-1]
    if net.transformer:
        top = LastLevelP6P7(width, width, "p5") if retinanet else LastLevelMaxPool()
        scales = [SCALES[name] for name in fpn.IN_FEATURES]
        return TransformerPyramid(net, "res4", width, scales, top, norm=fpn.NORM or "LN")
    features = net.require(fpn.IN_FEATURES)
    top = LastLevelP6P7(net.output_shape()[last].channels, width, last) if retinanet else LastLevelMaxPool()
    return FPN(net, features, width, fpn.NORM, top, fpn.FUSE_TYPE)


# ---- LazyConfig ------------------------------------------------------------------------------------------------------


def use_timm(model: Any, architecture: str, args: Mapping[str, Any], norm: str) -> None:
    """Replace the backbone in the model of a LazyConfig by timm's network and a pyramid, in place.

    Args:
        model: an omegaconf node with `backbone`: an FPN or ViTDet's pyramid, from which width and levels are taken.
        norm: norm of the pyramid; '' for none.

    Raises:
        ValueError: the config has no pyramid, or as `TimmBackbone`.
    """
    old = model.backbone
    if "out_channels" not in old or "top_block" not in old:
        raise ValueError(
            "this config has no feature pyramid, which every backbone but a plain ResNet needs: choose one with an FPN"
        )
    features = _levels_of(old)
    net = TimmBackbone(architecture, args)
    call = LazyCall(TimmBackbone)(architecture=architecture, args=dict(args))
    top = old.top_block
    in_front = top is not None and "in_channels" in top and top.get("in_feature", "res5") in STAGES
    if net.transformer:
        if in_front:  # RetinaNet's, on the backbone's last map
            top.in_channels, top.in_feature = old.out_channels, "p5"
        scales = [SCALES[name] for name in features]
        model.backbone = LazyCall(TransformerPyramid)(
            net=call,
            in_feature="res4",
            out_channels=old.out_channels,
            scale_factors=scales,
            top_block=top,
            norm=norm or "LN",
        )
        return
    net.require(features)
    if in_front:
        top.in_channels = net.output_shape()[features[-1]].channels
    model.backbone = LazyCall(FPN)(
        bottom_up=call, in_features=features, out_channels=old.out_channels, norm=norm, top_block=top
    )


def _levels_of(pyramid: Any) -> list[str]:
    """The input maps of a config's pyramid, by the names in STAGES."""
    if "scale_factors" in pyramid:  # ViTDet's
        return [name for scale in pyramid.scale_factors for name, one in SCALES.items() if one == scale]
    found = [str(name) for name in pyramid.in_features]
    return found if set(found) <= set(STAGES) else list(STAGES[-len(found) :])
