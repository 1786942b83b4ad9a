"""The initial state of a new run: another run's complete state, or a trained backbone."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from clove_hub.backbones import own_size
from clove_hub.weights import Preprocessing, Weights, load, load_method
from clove_hub.weights.architectures import checked_model_args
from clove_hub.weights.weights import restriction, told
from clove_hub.zoo.checks import require_names_and_shapes

from .bands import normalization, with_bands
from .recipe import Recipe
from .run.peers import Peers
from .settings import BackboneSettings

log = logging.getLogger(__name__)


def begin(
    recipe: Recipe, method: Any, optimizer: Optimizer, peers: Peers, state: Mapping[str, Any] | None
) -> tuple[dict[str, Any] | None, Preprocessing]:
    """Load the initial state of a new run into a method, on all processes. A resumed run's origin is in its state.

    Args:
        state: state of the checkpoint that the run resumes from; None for a new run.

    Returns:
        Facts about the initial weights of the backbone, None for random ones; and the normalization of images.

    Raises:
        ValueError: the recipe's initial weights are not available, or do not fit.
    """
    spec, pretrained = method.view_spec, None
    images = Preprocessing(image_size(method), spec.mean, spec.std)
    if state is not None:
        said, depth = state["preprocessing"], recipe.data.reading.depth
        return state.get("pretrained"), replace(images, mean=tuple(said["mean"]), std=tuple(said["std"]), depth=depth)
    seen: Preprocessing | None = None
    with peers.together():
        if recipe.run.init_from and recipe.backbone.pretrained:
            raise ValueError(
                f"run.init_from={recipe.run.init_from} and backbone.pretrained={recipe.backbone.pretrained} both set the weights that "
                "the backbone starts with: give one of them"
            )
        if peers.main and recipe.run.init_from:
            seen = begin_from(recipe.run.init_from, method, recipe.method_name)
        elif peers.main and recipe.backbone.pretrained:
            weights = starting_weights(recipe.backbone)
            begin_backbone(weights, method)
            seen, pretrained = weights.preprocessing, told(weights)
            if words := restriction(weights.license):
                log.warning("%s is under the license %s, which %s", weights.what, weights.license, words)
        if peers.main:
            images = normalization(recipe.data, images, seen)
    if recipe.run.init_from or recipe.backbone.pretrained:
        peers.share(method, optimizer)
    return peers.from_main((pretrained, images))


def begin_from(source: str, method: nn.Module, name: str) -> Preprocessing:
    """Load the complete state of a method strictly; optimizer, schedule and step are those of a new run.

    Args:
        source: another run's folder or a released checkpoint, as in `load_method`.
        method: the method to load into; unchanged after an error.
        name: its name in the registry.

    Returns:
        The preprocessing that it was trained with.

    Raises:
        ValueError: there is no such state, it cannot be fetched or is damaged, it is another method's, or a tensor is
            missing, unexpected or mis-shaped.
    """
    try:
        found = load_method(source)
    except ValueError as error:
        raise ValueError(f"run.init_from={source}: {error}") from error
    if found.name != name:
        raise ValueError(
            f"run.init_from={source} is the state of {found.name!r}, but this recipe trains {name!r}: "
            "use a state of the same method"
        )
    expected = {key: tensor.shape for key, tensor in method.state_dict().items()}
    require_names_and_shapes(found.tensors, expected, f"run.init_from={source} for this recipe's method and backbone")
    method.load_state_dict(found.tensors)
    log.info("starting with the weights of %s", found.what)
    return found.preprocessing


def starting_weights(backbone: BackboneSettings) -> Weights:
    """The trained weights that a recipe starts from.

    Raises:
        ValueError: there are none, or their architecture differs from the recipe's.
    """
    source = str(backbone.pretrained)
    if "/" not in source and ":" not in source and "." not in source:  # a bare tag
        source = f"{backbone.model}.{source}"
    try:
        found = load(source)
    except ValueError as error:
        raise ValueError(f"backbone.pretrained={backbone.pretrained}: {error}") from error
    if found.architecture != backbone.model:
        raise ValueError(
            f"backbone.pretrained={backbone.pretrained} is a {found.architecture}, but this recipe trains {backbone.model}: set "
            f"backbone.model={found.architecture}"
        )
    asked = checked_model_args(backbone.args, backbone.model, "backbone.args")
    if asked.get("in_chans", 3) != found.model_args.get("in_chans", 3):
        found = with_bands(found, asked.get("in_chans", 3))
    if dict(found.model_args) != asked:
        raise ValueError(
            f"backbone.pretrained={backbone.pretrained} was made with the arguments {dict(found.model_args)}, but this recipe has "
            f"{asked}: set {shlex.quote(f'backbone.args={_flow(found.model_args)}')}"
        )
    return found


def begin_backbone(weights: Weights, method: Any) -> None:
    """Load these weights into student and teacher strictly; the heads are unchanged.

    Raises:
        ValueError: a tensor is missing, unexpected or mis-shaped.
    """
    for encoder in ("student", "teacher"):
        if hasattr(method, encoder):
            backbone = getattr(method, encoder)["backbone"]
            expected = {key: tensor.shape for key, tensor in backbone.state_dict().items()}
            require_names_and_shapes(weights.tensors, expected, f"backbone.pretrained={weights.name} for this backbone")
            backbone.load_state_dict(weights.tensors)
    log.info("starting with the backbone of %s; the heads are new", weights.what)
    for note in weights.notes:
        log.warning("%s: %s", weights.what, note)


def image_size(method: Any) -> int:
    """Side in pixels of a bundle's images: that of the large views, or the model's own if it has a fixed size."""
    backbone = method.student["backbone"]
    fixed = (getattr(backbone, "pretrained_cfg", None) or {}).get("fixed_input_size")
    return own_size(backbone) if fixed else int(method.view_spec.views[0].size)


def _flow(args: Any) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in args.items()) + "}"
