"""timm's facts about an architecture, without making its weights."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch.nn.modules import module as hooks

LOOKALIKES: Mapping[str, tuple[str, ...]] = {
    "resnet18": ("resnetblur18",),
    "resnet50": ("resnetaa50", "resnetblur50"),
}
"""Other architectures of timm whose tensors have the same names and shapes: their pooling has no weights."""
NOT_SAVED = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable"),
        *("exportable", "no_jit", "features_only", "out_indices", "device", "dtype"),
    )
)
"""Arguments of `timm.create_model` that say where weights come from or what else is made of a model, not what it is."""
MOST_BANDS = 1024
"""Of an image; hyperspectral sensors have some hundred."""
WITHOUT_EFFECT = frozenset(
    (
        *(
            "num_classes",
            "drop_rate",
            "drop_path_rate",
            "drop_block_rate",
            "proj_drop_rate",
            "attn_drop_rate",
        ),
        *("pos_drop_rate", "patch_drop_rate", "dynamic_img_size", "strict_img_size"),
    )
)
"""Those that leave a headless model for color images as it is: what training drops has no weights, and models take images of
any size here where timm lets them."""
LARGEST_NUMBER, MOST_VALUES, LONGEST_WORD = 100_000, 100, 100
"""Of `model_args`: how large a number may be, how many values there may be in all, and how long a word may be."""
MOST_PIECES = 10_000
"""Modules, parameters and buffers of a model; of timm's own `resnetrs420` has most, 5,646."""
LARGEST_TABLES = 1 << 26
"""Values of the tables that a model computes for itself; of timm's own the largest have 14 million."""


@dataclass(frozen=True)
class Architecture:
    """A headless timm model and the facts that timm needs to give it a head or another first layer."""

    name: str
    """Without a tag: `resnet50`."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor of the model without classifier."""
    dtypes: dict[str, torch.dtype]
    parameters: int
    """The number of trainable values, without running statistics."""
    num_features: int
    global_pool: str
    cfg: Mapping[str, Any]
    """The `pretrained_cfg` of timm's own weights: `input_size`, `pool_size`, `first_conv`, `classifier` and so on."""

    def pool_size_at(self, size: int) -> list[int] | None:
        """Height and width of the last feature map of an image with this side in pixels."""
        sides = self.cfg.get("pool_size")
        return sides and [math.ceil(side * size / self.cfg["input_size"][-1]) for side in sides]

    def classifier_names(self, tensors: Mapping[str, object]) -> list[str]:
        """Which of the tensors are the classifier's."""
        heads = self.cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        return sorted(name for name in tensors if any(name.startswith(f"{head}.") for head in heads))


def architecture(name: str, model_args: Mapping[str, Any] | None = None, where: str = "") -> Architecture:
    """Asks timm about one of its architectures.

    Args:
        model_args: other arguments of `timm.create_model`, as `model_args` in a `config.json` gives them.
        where: what has these, for messages.

    Raises:
        ValueError: timm does not know it, the message names those with similar names; it does not take the arguments; or
            they ask for a model that is far larger than any of timm's.
    """
    name = name.partition(".")[0]  # a tag names weights, and these are others
    require_architecture(name)
    try:
        with torch.device("meta"), _few_pieces():  # names and shapes, no memory
            model: Any = timm.create_model(name, num_classes=0, **(model_args or {}))
    except Exception as error:  # architectures raise arbitrary types
        if not model_args:
            raise
        raise ValueError(
            f"{where}: timm cannot build {name} with the model_args {dict(model_args)!r:.200}: {error!s:.200}"
        ) from error
    state = model.state_dict()
    if (
        model_args
        and (tables := sum(b.numel() for key, b in model.named_buffers() if key not in state)) > LARGEST_TABLES
    ):
        raise ValueError(
            f"{where}: {name} with the model_args {dict(model_args)!r:.200} computes tables of {tables:,} values, expected "
            f"at most {LARGEST_TABLES:,}"
        )
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return Architecture(
        name=name,
        shapes={key: tuple(tensor.shape) for key, tensor in state.items()},
        dtypes={key: tensor.dtype for key, tensor in state.items()},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_features=model.num_features,
        global_pool=pool if isinstance(pool, str) and pool else "avg",
        cfg=model.pretrained_cfg,
    )


@contextmanager
def _few_pieces() -> Iterator[None]:
    """Stops the building of a model before it has more modules, parameters and buffers than any model needs."""
    pieces = 0

    def count(*_: object) -> None:
        nonlocal pieces
        pieces += 1
        if pieces > MOST_PIECES:
            raise ValueError(f"it has more than {MOST_PIECES:,} modules and tensors")

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_architecture(name: str, setting: str = "") -> None:
    """Raises ValueError unless timm has this architecture; the message names those with similar names."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f", did you mean {' or '.join(near)}?" if near else "; `timm.list_models()` lists all"
        raise ValueError(
            f"{setting}{name!r:.80} is not an architecture of timm {timm.__version__}{hint} (a newer timm may know it)"
        )


def checked_model_args(value: object, name: str, where: str) -> dict[str, Any]:
    """`model_args` of a file, as far as they change the headless model.

    Args:
        value: as read from the file.
        name: of the architecture.
        where: what has them, for messages.

    Raises:
        ValueError: they are no plain data by name, ask for no number of bands, or have more or
            larger values than any model needs.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and _is_plain(v) for key, v in value.items()):
        raise ValueError(f"{where} has model_args {value!r:.100}; expected names with numbers, words or lists of them")
    if refused := sorted(NOT_SAVED & value.keys()):
        raise ValueError(f"{where} has {refused[0]!r} among its model_args, which is not part of an architecture")
    values = list(_flat(value))
    if len(values) > MOST_VALUES:
        raise ValueError(f"{where} has {len(values)} values in its model_args; expected at most {MOST_VALUES}")
    for one in values:
        if isinstance(one, str) and len(one) > LONGEST_WORD:
            raise ValueError(
                f"{where} has {one!r:.80}... among its model_args; expected at most {LONGEST_WORD} characters"
            )
        if isinstance(one, int | float) and not -LARGEST_NUMBER <= one <= LARGEST_NUMBER:
            raise ValueError(
                f"{where} has {one!r:.80} among its model_args; expected numbers up to {LARGEST_NUMBER:,}, for a model to fit "
                "into memory"
            )
    bands = value.get("in_chans")
    if bands is not None and not (type(bands) is int and 1 <= bands <= MOST_BANDS):
        raise ValueError(f"{where} has in_chans {bands!r:.80} among its model_args; expected 1 to {MOST_BANDS} bands")
    found = {key: v for key, v in value.items() if key not in WITHOUT_EFFECT and v is not None}
    if bands == 3:
        del found["in_chans"]
    if not found.keys() & {"global_pool", "img_size"}:
        return found
    known = architecture(name)  # timm's save_for_hf writes these two where they are what they are anyway
    height, width = known.cfg["input_size"][1:]
    same = {"global_pool": (known.global_pool,), "img_size": ([height, width], (height, width), height)}
    return {key: v for key, v in found.items() if v not in same.get(key, ())}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _flat(inner)
    else:
        yield value
