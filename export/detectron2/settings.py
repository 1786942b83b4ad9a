"""The settings of a converted backbone for Detectron2: a YAML file, and a Python file for its LazyConfig.

A ResNet that Detectron2 builds itself needs nothing else. Any other timm network is built by `backbone.py` beside this
file, which the user of the config imports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clove_hub.weights import Weights

MARK = "# Written by clove-hub"
"""The first line of a settings file that may be overwritten."""
MODULE = "clove_hub.export.detectron2.backbone"
BUILDERS = {
    "build_resnet_fpn_backbone": "build_clove_hub_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_retinanet_clove_hub_fpn_backbone",
}
"""Detectron2's builders, and clove-hub's replacement of each for a network that is not a plain ResNet."""


@dataclass(frozen=True)
class Base:
    """A Detectron2 config that the settings extend."""

    path: Path
    """Ends in .yaml, or in .py for a LazyConfig."""
    builder: str = "build_resnet_fpn_backbone"
    """Its MODEL.BACKBONE.NAME."""

    @property
    def lazy(self) -> bool:
        return self.path.suffix == ".py"


def settings(backbone: Weights, weights: str, builder: str = "build_resnet_fpn_backbone") -> dict[str, Any]:
    """The settings that give the backbone the same input as during training, by Detectron2's keys.

    Args:
        weights: where the converted file will be.
        builder: the config's MODEL.BACKBONE.NAME, which is replaced for a network that is not a plain ResNet.
    """
    network, seen = backbone.plain_resnet, backbone.preprocessing
    model: dict[str, Any] = {
        "WEIGHTS": weights,
        "PIXEL_MEAN": of_255(seen.mean),
        "PIXEL_STD": of_255(seen.std),
        "BACKBONE": {"FREEZE_AT": 0},
    }
    if network is not None:
        model["RESNETS"] = {
            "DEPTH": network.depth,
            "NUM_GROUPS": network.groups,
            "WIDTH_PER_GROUP": network.width,
            "RES2_OUT_CHANNELS": network.channels // 8,
            "STRIDE_IN_1X1": False,
        }
    else:
        model["BACKBONE"]["NAME"] = BUILDERS[builder]
        model["CLOVE_HUB"] = {"ARCHITECTURE": backbone.architecture, "ARGS": dict(backbone.model_args)}
        if norm := pyramid_norm(backbone):
            model["FPN"] = {"NORM": norm}
    return {"VERSION": 2, "MODEL": model, "INPUT": {"FORMAT": "RGB"}}


def pyramid_norm(backbone: Weights) -> str:
    """The pyramid's norm: LN, as in ViTDet, for a network without batch norm, whose maps differ in scale; else ''."""
    return "" if any(name.endswith("running_mean") for name in backbone.tensors) else "LN"


def as_yaml(backbone: Weights, weights: str, out: Path, base: Base | None = None) -> str:
    """`settings` as a YAML config of Detectron2.

    Args:
        weights: the path of the weights in the file.
        out: the converted file; the settings are written beside it.
        base: a YAML config.
    """
    file = out.with_suffix(".yaml").resolve()
    values = settings(backbone, weights, *([base.builder] if base else []))
    zoo = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    if base:
        ways = [
            f"{'train_net.py' if backbone.plain_resnet else 'your train_net.py'} --config-file {_quoted(str(file))}"
        ]
        values = {"_BASE_": str(base.path)} | values
    else:
        ways = [
            "These settings extend the config of a detector; alone they give Detectron2's default, which has no pyramid:",
            f"    cfg.merge_from_file(model_zoo.get_config_file({_quoted(zoo)}))",
            f"    cfg.merge_from_file({_quoted(str(file))})",
            f'or, in a config file of your own:  _BASE_: ["FOLDER/{Path(zoo).name}", {_quoted(str(file))}]',
            "or `clove-hub convert ... --base CONFIG`, which writes _BASE_ here and compares the detector with timm.",
        ]
    said = [*ways, f"For a LazyConfig, use {file.with_suffix('.py').name} beside this file.", *_of_yaml(backbone)]
    comments = "\n".join([f"{MARK}: {backbone.architecture} for Detectron2.", *(f"# {line}" for line in said)])
    return f"{comments}\n{yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)}"


def _of_yaml(backbone: Weights) -> list[str]:
    said = [
        "MODEL.WEIGHTS: Detectron2 resolves a relative path from its working directory. Set it again after moving the file."
    ]
    if backbone.plain_resnet is None:
        return [
            f"Before get_cfg(): import {MODULE}",
            "(it registers the builder, and adds the keys MODEL.CLOVE_HUB to Detectron2's defaults).",
            *said,
        ]
    said += [
        "FREEZE_AT 0: every convolution is trained. The norm is MODEL.RESNETS.NORM, which this file does not set: the",
        "zoo's FrozenBN keeps the statistics, scales and shifts of pre-training; SyncBN (BN on a single device) trains",
        "them. The papers train them on COCO and VOC, and freeze them on LVIS and Cityscapes.",
        "With FrozenBN, Detectron2 logs that num_batches_tracked is not used: that norm has no such counter.",
    ]
    if not backbone.plain_resnet.bottleneck:
        said.append("Not for C4 configs: their head has a ResNet-50's last stage, most of which would stay random.")
    return said


# ---- LazyConfig ------------------------------------------------------------------------------------------------------


def as_lazy(backbone: Weights, weights: str | None, out: Path, base: Base | None = None) -> str:
    """The same for a LazyConfig: a Python file with `use_backbone`, which changes a config in place.

    Args:
        weights: the path of the weights in the file; None for the file beside it.
        base: a Python config; the file is then a complete config.
    """
    seen, here = backbone.preprocessing, out.with_suffix(".py").name
    where = (
        _quoted(weights)
        if weights is not None
        else f"os.path.join(os.path.dirname(os.path.abspath(__file__)), {_quoted(out.name)})"
    )
    use = (
        f"lazyconfig_train_net.py --config-file {here}"
        if base
        else f"At the end of a config beside it:  from .{out.stem} import use_backbone; use_backbone(model, dataloader, train)"
    )
    if not base and not out.stem.isidentifier():
        use += f"\n# (Python cannot import {out.stem}: rename this file first)"
    network = _LAZY_RESNET if backbone.plain_resnet else _LAZY_OTHER
    for name, value in _facts(backbone).items():
        network = network.replace(f"@{name}@", value)
    text = f'''{MARK}: {backbone.architecture} for a LazyConfig of Detectron2.
# {use}
import os

{network}


WEIGHTS = {where}


def use_backbone(model, dataloader=None, train=None):
    """Set a config's backbone, image format and weights, in place. The config's norms are kept."""
    put_network(model)
    model.pixel_mean, model.pixel_std = {of_255(seen.mean)}, {of_255(seen.std)}
    if "input_format" in model:
        model.input_format = "RGB"
    for part in ("train", "test"):
        if dataloader is not None and "mapper" in dataloader.get(part, {{}}):
            dataloader[part].mapper.image_format = "RGB"
    if train is not None:
        train.init_checkpoint = WEIGHTS
'''
    if base:
        text += (
            f"\n\nfrom detectron2.config import LazyConfig  # noqa: E402\n\n"
            f"globals().update(LazyConfig.load({_quoted(str(base.path))}))\n"
            "use_backbone(model, dataloader, train)  # noqa: F821\n"
        )
    return text


def _facts(backbone: Weights) -> dict[str, str]:
    if (network := backbone.plain_resnet) is None:
        return {
            "module": MODULE,
            "architecture": repr(backbone.architecture),
            "args": repr(dict(backbone.model_args)),
            "norm": repr(pyramid_norm(backbone)),
        }
    wide = network.groups * network.width
    straight = ", stride_in_1x1=False" if network.bottleneck else ""
    stages = f"L(ResNet.make_default_stages)(depth={network.depth}, norm=norm{straight})"
    if wide != 64:
        stages = _LAZY_STAGES.replace("@depth@", str(network.depth)).replace("@wide@", str(wide))
    return {
        "blocks": "BottleneckBlock, " if wide != 64 else "",
        "stages": stages.replace("@groups@", str(network.groups)),
        "architecture": network.name,
        "channels": str(network.channels),
        "res5": _LAZY_RES5.replace("@wide@", str(8 * wide)).replace("@groups@", str(network.groups))
        if network.bottleneck
        else _LAZY_NO_RES5.replace("@architecture@", network.name),
    }


_LAZY_RESNET = '''from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.resnet import @blocks@ResNet


def put_network(model):
    """Replace the config's ResNet by a @architecture@ with its strides in the 3x3 convolutions; everything but frozen norms is trained."""
    resnet = model.backbone.bottom_up if "bottom_up" in model.backbone else model.backbone
    if "stages" not in resnet or "stem" not in resnet:
        raise ValueError("this config has no ResNet of Detectron2 that @architecture@ could replace: choose one that has")
    norm = resnet.stages.norm if "norm" in resnet.stages else resnet.stem.norm
    resnet.stages = @stages@
    resnet.freeze_at = 0
    if "res5" in model.get("roi_heads", {}):
        @res5@
    top = model.backbone.get("top_block") or {}
    if "in_channels" in top and top.get("in_feature", "res5") == "res5":  # RetinaNet's
        top.in_channels = @channels@'''
"""Part of the file, so that it needs only Detectron2."""
_LAZY_STAGES = """[
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=count,
            stride_per_block=[2 if place else 1] + [1] * (count - 1),
            in_channels=128 << place if place else 64,
            out_channels=256 << place,
            bottleneck_channels=@wide@ << place,
            num_groups=@groups@,
            norm=norm,
            stride_in_1x1=False,
        )
        for place, count in enumerate({50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[@depth@])
    ]"""
_LAZY_RES5 = """model.roi_heads.res5.stride_in_1x1 = False
        model.roi_heads.res5.bottleneck_channels, model.roi_heads.res5.num_groups = @wide@, @groups@"""
_LAZY_NO_RES5 = """raise ValueError(
            "@architecture@ has basic blocks, but this config has a ResNet-50's last stage in its head (C4), most of "
            "which would stay random. Choose a config with a pyramid (FPN)"
        )"""
_LAZY_OTHER = '''from @module@ import use_timm


def put_network(model):
    """Replace the config's backbone by timm's network, with a pyramid as wide as the config's."""
    use_timm(model, @architecture@, @args@, norm=@norm@)'''


# ---- pieces ----------------------------------------------------------------------------------------------------------


def of_255(values: Iterable[float]) -> list[float]:
    """Convert values with white at 1 to Detectron2's scale, with white at 255."""
    return [float(f"{value * 255:.6g}") for value in values]


def _quoted(text: str) -> str:
    """Quote a string so that it is valid in Python, JSON and YAML."""
    return json.dumps(text, ensure_ascii=False)
