"""The zoo's models as tags of timm: `timm.create_model("resnet50.clove_in1k_400ep", pretrained=True)`.

Every model of the zoo is a tag, and loads the bundle that was adopted on this machine or from the chosen namespace on
the Hub. timm lists as pretrained those whose weights are known to exist: adopted, downloaded earlier, or found by
`clove-hub models --check`; importing timm makes no request. The error for a model without weights says how to get them.
timm has no public way to add a tag to one of its architectures. The internals used here have been the same from timm
0.9.16 to 1.0.31; if they change, a warning says so once, and `create_model` below works without them.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from clove_hub.global_state import kept_generators

from .models import PREPROCESSING, Model, find_model, models
from .places import NAMESPACE, confirmed, how_to_get, weights_of

log = logging.getLogger(__name__)


@kept_generators()
def create_model(name: str, **arguments: Any) -> Any:
    """`timm.create_model(name, pretrained=True, **arguments)` for a model of the zoo.

    Args:
        name: one of `list_models`.
        arguments: additional arguments of `timm.create_model`, such as `features_only=True`.

    Raises:
        ValueError: the zoo has no such model, its weights are not known here, or the Hub does not provide them; the
            message says how to get them.

    Examples:
        >>> import clove_hub
        >>> clove_hub.create_model("resnet50.clove_in1k_200ep")
        Traceback (most recent call last):
        ValueError: no weights of resnet50.clove_in1k_200ep are known here. They were released at ...
    """
    import timm

    model = find_model(name)
    place = weights_of(model)
    if place is None:
        raise ValueError(how_to_get(model))
    cfg = pretrained_cfg(model)
    try:
        return timm.create_model(model.architecture, pretrained=True, pretrained_cfg=cfg, **arguments)
    except OSError as error:  # of any kind from the Hub's client
        if isinstance(place, Path):
            raise
        from clove_hub.weights.hub import HUB, not_fetched

        raise ValueError(
            f"cannot load {name} from {HUB}{place}: {not_fetched(error, place.partition('@')[2])}. `clove-hub models "
            f"--check` shows which models are there; {NAMESPACE} sets where to look"
        ) from None


def register_when_timm_is_there() -> None:
    """Add the tags now if timm is imported, otherwise right after its import."""
    if "timm" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


def register() -> None:
    """Add a tag for each model of the zoo; the architectures keep their default tags."""
    try:
        places = [(model, weights_of(model)) for model in models().values()]
    except ValueError as error:  # a wrong setting must not prevent the import
        log.warning("%s", error)
        return
    try:
        from timm.models import _registry

        for model, place in places:
            default: Any = _registry._model_default_cfgs[model.architecture]
            if model.tag not in default.cfgs:
                default.tags.append(model.tag)  # at the end: the first is the architecture's default
                _registry._model_with_tags[model.architecture].append(model.name)
            default.cfgs[model.tag] = _registry._model_pretrained_cfgs[model.name] = pretrained_cfg(model)
            if isinstance(place, Path) or (place and _is_known(place)):
                _registry._model_has_pretrained.add(model.name)
    except Exception as error:  # another timm version may differ here
        log.warning(
            "the zoo's models cannot be registered with this version of timm (%r); "
            "clove_hub.zoo.registry.create_model(name) loads them instead",
            error,
        )


def pretrained_cfg(model: Model) -> Any:
    """timm's config of a model: facts of the architecture, and everything else from the model's card."""
    import timm

    default: Any = timm.models.get_pretrained_cfg(model.architecture)
    place = weights_of(model) or _Nowhere(how_to_get(model))
    kept = {key: getattr(default, key) for key in ("classifier", "first_conv", "architecture")}
    sides = [-(-side * model.input_size // default.input_size[-1]) for side in default.pool_size]
    return dataclasses.replace(
        type(default)(),
        **kept,
        **({"file": str(place)} if isinstance(place, Path) else {"hf_hub_id": place}),
        **PREPROCESSING,
        tag=model.tag,
        num_classes=0,
        input_size=(3, model.input_size, model.input_size),
        pool_size=tuple(sides),
        license=model.paper.license,
        origin_url=model.paper.code,
        paper_ids=f"arXiv:{model.paper.arxiv}",
    )


def _is_known(place: str) -> bool:
    """Whether weights are known to exist under a `hub_id`, without a request to the Hub."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = place.partition("@")
    return place in confirmed() or isinstance(
        try_to_load_from_cache(name, "model.safetensors", revision=revision or None), str
    )


class _Nowhere(str):
    """Placeholder for the id of a repository, which raises the error when timm checks whether there is one.

    timm does that just before loading, after a file or state given by the caller. Its own message for a tag without
    weights would not help.
    """

    def __bool__(self) -> bool:
        raise ValueError(str(self))


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Find timm as usual, and register the tags as soon as it is loaded.

    It stays until then: other finders may only look up timm's location.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
