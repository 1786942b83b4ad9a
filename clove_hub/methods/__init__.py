"""The registry of pre-training methods: the built-in ones and those of other installed packages.

A package adds one with an entry point in its pyproject.toml, whose name is the method's and whose object an `Entry`:

    [project.entry-points."clove_hub.methods"]
    my_method = "my_package.method:ENTRY"
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from clove_hub.backbones import create_backbone, freeze_first, freeze_statistics, train_by
from clove_hub.global_state import kept_generators
from clove_hub.settings import build as build_settings
from clove_hub.settings import nearest

from .base import Method
from .byol import Byol, ByolSettings
from .clove import Clove, CloveSettings
from .densecl import DenseCl, DenseClSettings
from .moco import Moco, MocoKnnSettings, MocoSettings
from .pixpro import Pixpro, PixproSettings
from .slotcon import SlotCon, SlotConSettings

log = logging.getLogger(__name__)
GROUP = "clove_hub.methods"
"""Of the entry points."""


class Entry(NamedTuple):
    """How to build a method, the dataclass of its settings and the module made of a backbone and those; what it is."""

    settings: type[Any]
    build: Callable[[nn.Module, Any], nn.Module]
    summary: str
    """In one line, for lists."""
    recipes: Path | None = None
    """A folder with recipes of the method, where they are not among those here."""


METHODS: dict[str, Entry] = {
    "clove": Entry(
        CloveSettings,
        Clove,
        "cells that attend to their context agree with the same place in other crops, hard negatives",
    ),
    "moco": Entry(MocoSettings, Moco, "two crops of a photo agree, a queue of other photos as negatives"),
    "moco_knn": Entry(
        MocoKnnSettings, Moco, "MoCo with small overlapping crops, AutoAugment and similar photos as positives"
    ),
    "slotcon": Entry(
        SlotConSettings,
        SlotCon,
        "cells are grouped by prototypes, and the groups of two crops are contrasted with others",
    ),
    "pixpro": Entry(
        PixproSettings, Pixpro, "cells averaged with those they resemble agree with the same place, no negatives"
    ),
    "densecl": Entry(
        DenseClSettings, DenseCl, "MoCo whose cells also agree with those that resemble them most in another crop"
    ),
    "byol": Entry(ByolSettings, Byol, "two crops of a photo agree, no negatives"),
}


@kept_generators()
def create_method(
    name: str,
    backbone: str | nn.Module = "resnet50",
    *,
    seed: int = 0,
    level: int = -1,
    zero_init_last: bool = True,
    **settings: Any,
) -> Any:
    """Builds a pre-training method, an `nn.Module` that is called with views (see `Method`).

    Args:
        name: a method's name, as in a recipe's `method.name`.
        backbone: a timm architecture, or a timm model without a classifier, whose weights are kept.
        seed: seed of the initial weights, which equal those of a recipe with the same `run.seed`.
        level: the feature map that is trained, a recipe's `backbone.level`.
        zero_init_last: a recipe's `backbone.zero_init_last`, for a backbone that is given by its name.
        settings: settings that differ from the method's defaults, by name.

    Raises:
        ValueError: there is no such method, setting or architecture, or a value is refused.

    Examples:
        >>> import clove_hub
        >>> method = clove_hub.create_method("clove", "test_resnet", global_size=64, local_views=0, hard_negatives=3)
        >>> [view.size for view in method.view_spec.views]
        [64, 64]
    """
    if name not in METHODS:
        raise ValueError(
            f"no method is called {name!r}{nearest(name, list(METHODS))}: choose one of {', '.join(METHODS)}"
        )
    chosen = build_settings(METHODS[name].settings, settings, "method")
    torch.manual_seed(seed)
    if isinstance(backbone, str):
        backbone = create_backbone(backbone, level=level, zero_init_last=zero_init_last)
    else:
        train_by(backbone, level)
    return METHODS[name].build(backbone, chosen)


def build_method(name: str, settings: Any, backbone: Any) -> Any:
    """Build a method as in a recipe, with random weights from torch's generator.

    Args:
        settings: the method's.
        backbone: a recipe's `BackboneSettings`.

    Raises:
        ValueError: timm does not build the backbone, or the method cannot use it.
    """
    network = create_backbone(
        backbone.model,
        args=backbone.args,
        level=backbone.level,
        zero_init_last=backbone.zero_init_last,
        grad_checkpointing=backbone.grad_checkpointing,
    )
    freeze_first(network, backbone.freeze, backbone.model)
    if backbone.freeze_norm:
        freeze_statistics(network)
    return METHODS[name].build(network, settings)


def register_method(
    name: str,
    build: Callable[[nn.Module, Any], nn.Module],
    settings: type[Any],
    summary: str = "",
    recipes: Path | None = None,
) -> None:
    """Add a method, which recipes name in `method.name`, to this process.

    Data-loading workers and other processes that import clove_hub again have it only if they also register it; an entry
    point (see this module) adds it everywhere.

    Args:
        name: its name in recipes.
        build: makes the method, which implements `Method`, from a backbone and settings.
        settings: a frozen dataclass with a default and a note for each field.
        summary: what it does, in one line.
        recipes: a folder with its recipes, which can then be named without a path.

    Raises:
        ValueError: the name is taken, or the settings are no dataclass.

    Examples:
        >>> import clove_hub
        >>> from clove_hub.methods import Pixpro, PixproSettings
        >>> clove_hub.register_method("my_pixpro", Pixpro, PixproSettings, "as PixPro")
        >>> clove_hub.create_method("my_pixpro", "test_resnet", global_size=64).exported
        'student'
    """
    if name in METHODS:
        raise ValueError(f"a method is called {name!r} already ({METHODS[name].summary}): choose another name")
    if not dataclasses.is_dataclass(settings):
        raise ValueError(f"the settings of {name!r} are {settings!r}: give a frozen dataclass")
    METHODS[name] = Entry(settings, build, summary, recipes)


def register_installed(points: Iterable[EntryPoint]) -> None:
    """Add the methods of other packages; warn about those that cannot be added."""
    for point in points:
        try:
            entry = point.load()
            if not isinstance(entry, Entry):
                raise TypeError(f"{point.value} is a {type(entry).__name__}, expected a clove_hub.methods.Entry")
            register_method(point.name, entry.build, entry.settings, entry.summary, entry.recipes)
        except Exception as error:  # importing another package may raise anything
            of = f" of {point.dist.name}" if point.dist else ""
            log.warning("the method %r%s cannot be used (%s: %s)", point.name, of, type(error).__name__, error)


register_installed(entry_points(group=GROUP))

__all__ = [
    "METHODS",
    "Byol",
    "ByolSettings",
    "Clove",
    "CloveSettings",
    "DenseCl",
    "DenseClSettings",
    "Entry",
    "Method",
    "Moco",
    "MocoKnnSettings",
    "MocoSettings",
    "Pixpro",
    "PixproSettings",
    "SlotCon",
    "SlotConSettings",
    "create_method",
    "register_method",
]
