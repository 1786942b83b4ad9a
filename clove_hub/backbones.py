"""A timm model as a feature-map extractor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from clove_hub.weights.architectures import architecture, checked_model_args, require_architecture

SIZE = 224
"""Side in pixels of the images that a backbone is tried with, where it takes them."""
ANY_SIZE: Sequence[Mapping[str, Any]] = ({"dynamic_img_size": True}, {"strict_img_size": False})
"""How timm is asked for a model that takes images of other sizes than it was made for; which it is depends on the model."""


def create_backbone(
    model: str,
    *,
    args: Mapping[str, Any] | None = None,
    level: int = -1,
    zero_init_last: bool = True,
    grad_checkpointing: bool = False,
) -> nn.Module:
    """A randomly initialized timm model without its classifier, whose state dict plain timm loads.

    It takes images of any size if timm supports it: position embeddings are resampled, windows recomputed.

    Args:
        model: a timm architecture, without a tag (`resnet50`).
        args: further arguments of `timm.create_model`, such as `drop_path_rate` and `img_size`.
        level: which of its feature maps is trained, as in `feature_map`.
        zero_init_last: start the scale of a residual branch's last norm at 0, as timm does; otherwise at 1, as in
            torchvision's ResNets.
        grad_checkpointing: recompute activations within blocks in the backward pass, to save memory.

    Raises:
        ValueError: timm does not know the name or the arguments, or the model yields no feature map.

    Examples:
        >>> backbone = create_backbone("vit_tiny_patch16_224")
        >>> tuple(feature_map(backbone, torch.zeros(1, 3, 96, 96)).shape)
        (1, 192, 6, 6)
    """
    if "." in model:
        raise ValueError(
            f"backbone.model={model!r} names pre-trained weights (the tag after the dot): to start from them, give "
            f"backbone.model={model.split('.')[0]} backbone.pretrained={model}"
        )
    require_architecture(model, "backbone.model=")
    architecture(model, checked_model_args(args, model, "backbone.args"), "backbone.args")
    backbone = build_model(model, args or {})
    tensors = backbone.state_dict(keep_vars=True)
    if len(set(map(id, tensors.values()))) < len(tensors):
        raise ValueError(
            f"backbone.model={model!r} shares tensors between layers, which checkpoints and bundles (safetensors) cannot "
            "store: choose another model"
        )
    if not zero_init_last:
        for norm in backbone.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine and not norm.weight.any():
                nn.init.ones_(norm.weight)
    if grad_checkpointing:
        checkpoint_blocks(backbone, model)
    return train_by(backbone, level, model)


def build_model(model: str, args: Mapping[str, Any]) -> nn.Module:
    """A timm model without classifier, for images of any size if timm can make it so."""
    built: nn.Module = timm.create_model(model, num_classes=0, **{**_any_size(model), **args})
    built.in_chans = args.get("in_chans", 3)  # few models of timm have it
    return built


@lru_cache
def _any_size(model: str) -> Mapping[str, Any]:
    cfg = timm.get_pretrained_cfg(model, allow_unregistered=True)
    if cfg is None or not cfg.fixed_input_size:
        return {}
    for option in ANY_SIZE:
        try:
            with torch.device("meta"):
                timm.create_model(model, num_classes=0, **option)
        except TypeError:  # it does not have the argument
            continue
        return option
    return {}


def train_by(backbone: nn.Module, level: int = -1, name: str = "") -> nn.Module:
    """Select the feature map that `feature_map` returns, and freeze parameters that do not reach it. In place.

    Args:
        level: as in `feature_map`.
        name: of the model, for messages.

    Raises:
        ValueError: there is no such map.
    """
    name, count = name or type(backbone).__name__, levels(backbone)
    if not -count <= level < 0:
        raise ValueError(
            f"backbone.level={level}: {name} has {count} feature map{'s' if count > 1 else ''}; choose -1 (the last) to {-count}"
        )
    size = SIZE if takes(backbone, SIZE) else own_size(backbone)
    with evaluating(backbone), torch.no_grad():
        features = backbone.forward_features(_image(backbone, size))  # type: ignore[operator]
    whole = level == -1 and isinstance(features, Tensor) and features.ndim == 4
    backbone.map_level = None if whole else level  # type: ignore[assignment]
    shape = tuple(features.shape[1:]) if whole else feature_shape(backbone, size)
    if len(shape) != 3:
        raise ValueError(
            f"backbone.model={name!r} gives features of shape {shape} instead of a feature map (C, H, W): choose a model "
            "with feature maps, such as resnet50, convnext_tiny, vit_small_patch16_224 or swin_tiny_patch4_window7_224"
        )
    freeze_unused(backbone, lambda: feature_map(backbone, _image(backbone, size)).sum())
    return backbone


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """The feature map on which a backbone is trained, channels first: (B, 3, H, W) -> (B, C, h, w).

    `train_by` selects it. Level -1 is the network's last: the last stage of a ResNet, the input of the pooling of an
    EfficientNet, the patch tokens after the last norm of a vision transformer, without class token and registers. -2,
    -3, ... are the maps before it by timm's count (`feature_info`): stages, or the blocks of a transformer.
    """
    level = getattr(backbone, "map_level", None)
    if level is not None:
        return intermediate_maps(backbone, images, [level])[0]
    features: Tensor = backbone.forward_features(images)  # type: ignore[operator]
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":  # timm's Swin family
        features = features.permute(0, 3, 1, 2)
    return features


def intermediate_maps(backbone: nn.Module, images: Tensor, chosen: Sequence[int]) -> list[Tensor]:
    """Feature maps as timm's `forward_intermediates` gives them: (B, 3, H, W) -> one (B, C, h, w) for each level.

    Those of a transformer have gone through its last norm, whichever block they come from.

    Args:
        chosen: levels from -1 (the last) on.
    """
    if not hasattr(backbone, "forward_intermediates"):  # a user's own model: it has one map
        return [feature_map(backbone, images) for _ in chosen]
    indices = sorted({levels(backbone) + level for level in chosen})
    asked = {"indices": indices, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
    try:
        maps = backbone.forward_intermediates(images, norm=True, **asked)  # type: ignore[operator]
    except AssertionError as error:
        if "norm" not in str(error):
            raise
        maps = backbone.forward_intermediates(images, norm=False, **asked)  # type: ignore[operator]  # Hiera has none
    return [maps[indices.index(levels(backbone) + level)] for level in chosen]


def levels(backbone: nn.Module) -> int:
    """The number of feature maps that timm extracts from a model."""
    has = hasattr(backbone, "forward_intermediates")
    return len(getattr(backbone, "feature_info", None) or [0]) if has else 1


def checkpoint_blocks(backbone: nn.Module, name: str) -> None:
    """Enable timm's gradient checkpointing.

    Raises:
        ValueError: the model has none, or has batch norm, whose running statistics would count images twice.
    """
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in backbone.modules()):
        raise ValueError(
            f"backbone.grad_checkpointing=true: {name} has batch norm, whose running statistics would count every image "
            "twice: lower batch.per_device instead, which changes only speed and memory"
        )
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise ValueError(
            f"backbone.grad_checkpointing=true: timm does not support it for {name}: lower batch.per_device instead"
        ) from None


# ---- sizes -----------------------------------------------------------------------------------------------------------


def own_size(backbone: nn.Module) -> int:
    """The side in pixels of the square images that a model was made for."""
    traits = getattr(backbone, "_traits", {})  # timm 1.0.31 and newer
    size = traits.get("img_size") or getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    size = size or (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size", (3, SIZE, SIZE))
    return int(size if isinstance(size, int) else size[-1])


def takes(backbone: nn.Module, size: int) -> bool:
    """Whether a model takes square images of `size` pixels."""
    try:
        with evaluating(backbone), torch.no_grad():
            intermediate_maps(backbone, _image(backbone, size), [-1])
    except (AssertionError, RuntimeError, AttributeError):
        return False
    return True


def feature_shape(backbone: nn.Module, size: int, setting: str = "") -> tuple[int, ...]:
    """Shape of the features of one square image of `size` pixels, without the batch: (C, h, w) for a feature map.

    Args:
        setting: the name of the size's setting, for the message: `method.local_size`.

    Raises:
        ValueError: the model cannot take an image of this size; the message names the nearest sizes that it takes.
    """
    try:
        with evaluating(backbone), torch.no_grad():
            return tuple(feature_map(backbone, _image(backbone, size)).shape[1:])
    except (AssertionError, RuntimeError) as error:
        found = nearest_sizes(backbone, size)
        way_out = f"choose {' or '.join(map(str, found))}" if found else "choose another size or another backbone"
        why = f" ({error!s:.200})" if str(error) else ""
        raise ValueError(
            f"{f'{setting}={size}: ' if setting else ''}the backbone cannot take images of {size}x{size} pixels{why}: {way_out}"
        ) from error


def nearest_sizes(backbone: nn.Module, size: int) -> list[int]:
    """The next smaller and larger sizes that a model takes, as far as they are multiples of a cell or its own."""
    info = getattr(backbone, "feature_info", None) or [{}]
    cell = int(dict(info[-1]).get("reduction") or 32)
    below = range(size // cell * cell, max(size // 4, cell) - 1, -cell)
    above = range(-(-size // cell) * cell, 4 * size + 1, cell)
    found = {next((one for one in sizes if one != size and takes(backbone, one)), 0) for sizes in (below, above)}
    return sorted((found - {0}) or {one for one in (own_size(backbone),) if one != size and takes(backbone, one)})


def _image(backbone: nn.Module, size: int) -> Tensor:
    """A black image in the type and on the device of the model: (1, C, size, size)."""
    parameter = next(backbone.parameters())
    channels = getattr(backbone, "in_chans", 3)
    return torch.zeros(1, channels, size, size, dtype=parameter.dtype, device=parameter.device)


# ---- modes -----------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the context; afterwards each module is in its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def freeze_unused(module: nn.Module, output: Callable[[], Tensor]) -> None:
    """Freezes parameters that do not reach the output, such as the norm before ConvNeXt's classifier.

    Distributed training waits for the gradient of every parameter that requires one.

    Args:
        output: computes a scalar with the module, which is in eval mode meanwhile.
    """
    with evaluating(module), torch.enable_grad():
        torch.autograd.backward(output())
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def freeze_first(backbone: nn.Module, count: int, name: str) -> None:
    """Freeze the first blocks, including the running statistics of their batch norm layers. In place.

    Args:
        count: as timm groups parameters, stages of a convolutional network and blocks of a transformer; the stem is the first.
        name: of the model, for messages.

    Raises:
        ValueError: there are not more blocks than that, or timm does not define them.
    """
    if not count:
        return
    if not hasattr(backbone, "group_matcher"):
        raise ValueError(f"backbone.freeze={count}: timm does not define the blocks of {name}: set backbone.freeze=0")
    layers = group_parameters(backbone, backbone.group_matcher(coarse=True), reverse=True)  # type: ignore[operator]
    if count >= (found := len(set(layers.values()))):
        raise ValueError(
            f"backbone.freeze={count}: {name} has {found} blocks, and at least one must be trained: choose at most {found - 1}"
        )
    order = sorted(set(layers.values()))[:count]
    for parameter_name, parameter in backbone.named_parameters():
        if layers[parameter_name] in order:
            parameter.requires_grad_(False)
    for module in backbone.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def freeze_statistics(backbone: nn.Module) -> None:
    """Make batch norm layers use and keep their running statistics; scale and shift are trained. In place."""
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
