"""A backbone inside a detector or segmenter of transformers: a folder that `from_pretrained` opens, with new heads.

    config.json               the model's own settings, with a `backbone_config` that has timm build the network
    model.safetensors         the backbone's tensors, under the names that the model gives them; none of the heads'
    preprocessor_config.json  the mean and deviation that the backbone was trained with

The folder holds the complete model and not a `TimmBackbone` because transformers 5 initializes every backbone of a
config randomly, whatever `use_pretrained_backbone` says, and `AutoBackbone.from_pretrained` does not load a folder with
a `TimmBackbone`. It loads weights into a detector only from a checkpoint of that detector; missing tensors are
initialized and listed, as new heads require.

Faults in this are silent. Hence a folder is valid only after `from_pretrained` has loaded it, and each tensor of the
backbone has been compared with the source's and the feature maps with timm's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from clove_hub.settings import nearest

from . import Weights
from .backbone import finite

OLDEST = 5
TOLERANCE = 1e-4
"""Largest difference of a feature map from timm's, relative to its largest value. Frozen norms differ by about 1e-6."""
IMAGE = (1, 3, 96, 160)
"""Not square, and not a network's training size: detectors process images of any size."""


@dataclass(frozen=True)
class Model:
    """A kind of model that takes a backbone."""

    opened_by: str
    """The class in transformers."""
    strides: tuple[int, ...]
    """Strides of its input feature maps; empty if it uses the last one, whatever its stride."""
    processor: str
    freezes: str | None = None
    """The setting that replaces batch norms by frozen ones, if there is one."""


MODELS = {
    "detr": Model("AutoModelForObjectDetection", (), "DetrImageProcessor"),
    "rt_detr_v2": Model(
        "AutoModelForObjectDetection", (8, 16, 32), "RTDetrImageProcessor", "freeze_backbone_batch_norms"
    ),
    "d_fine": Model("AutoModelForObjectDetection", (8, 16, 32), "RTDetrImageProcessor", "freeze_backbone_batch_norms"),
    "mask2former": Model("AutoModelForUniversalSegmentation", (4, 8, 16, 32), "Mask2FormerImageProcessor"),
    "upernet": Model("AutoModelForSemanticSegmentation", (4, 8, 16, 32), "SegformerImageProcessor"),
}
"""By transformers' `model_type`."""


@dataclass(frozen=True)
class Written:
    """What was written and checked."""

    tensors: int
    how_to_load: str
    notes: tuple[str, ...]
    prefix: str
    """The backbone's path inside the model."""


def require_transformers(what: str) -> None:
    """Raise ValueError unless a supported version of transformers is installed; the message says how to install it.

    Args:
        what: the feature that needs it, for the message.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{what} needs transformers ({error}): pip install 'clove-hub[transformers]'") from None
    if int(transformers.__version__.split(".")[0]) < OLDEST:
        raise ValueError(
            f"{what} needs transformers {OLDEST} or newer, and {transformers.__version__} is installed: "
            f"pip install -U 'transformers >= {OLDEST}'"
        )


def write_model(loaded: Weights, model: str, folder: Path, place: Path) -> Written:
    """Write the folder and load it as its user does.

    Args:
        model: one of MODELS.
        folder: an empty folder to write to.
        place: its later path, for the code that loads it.

    Raises:
        ValueError: timm has no such feature maps of the network, `TimmBackbone` cannot build it unchanged, or the
            model's outputs with it differ from timm's. The content of `folder` is then invalid.
    """
    import transformers

    kind = MODELS[model]
    if (bands := len(loaded.preprocessing.mean)) != 3:
        raise ValueError(
            f"{loaded.what} takes {bands} bands, and the image processors of transformers read photos of three: fine-tune it "
            "with `clove-hub downstream torchvision`"
        )
    features = _features(loaded, kind, model)
    exchanged = type(features).__name__
    with quiet(), torch.device("meta"):
        config = _config(loaded, kind, model, features)
        built = getattr(transformers, kind.opened_by).from_config(config)
    prefix, inside = _backbone(built, exchanged)
    placed, counters = _placed(
        features.state_dict(), inside.state_dict(), f"{loaded.what} ({loaded.architecture})", model
    )
    with quiet():
        built.save_pretrained(folder, state_dict={f"{prefix}.{name}": tensor for name, tensor in placed.items()})
    _write_processor(folder, kind, loaded)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    difference = _checked(loaded, kind, model, folder, features, placed)
    notes = tuple(_notes(loaded, features, model, counters, difference))
    return Written(len(placed), _how_to_load(kind, place), notes, prefix)


def open_model(
    folder: Path, model: str, prefix: str, seed: int, classes: Sequence[str], settings: Mapping[str, Any]
) -> nn.Module:
    """The model of a folder that `write_model` wrote, with new heads.

    Args:
        prefix: as in `Written`.
        seed: seed of the heads' weights.
        classes: class names, which are written to the config.
        settings: settings of the model's config that replace the folder's.

    Raises:
        ValueError: the config has no such setting, or the model with them cannot be built or has another backbone.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    names = {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}
    if own := settings.keys() & {"num_labels", *names}:
        raise ValueError(
            f"{min(own)}={settings[min(own)]!r:.100}: the classes and their names come from the data; leave it out"
        )
    known = transformers.AutoConfig.from_pretrained(folder).to_dict()
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(
            f"the config of {model} in transformers {transformers.__version__} has no {unknown[0]!r}"
            f"{nearest(unknown[0], list(known))}"
        )
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            opened, report = getattr(transformers, MODELS[model].opened_by).from_pretrained(
                folder, output_loading_info=True, **names, **settings
            )
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        # The settings come from the user, and transformers checks few of them before using them.
        raise ValueError(f"transformers cannot build {model} with {dict(settings)!r:.300}: {error!s:.300}") from error
    missing = [name for name in report["missing_keys"] if name.startswith(f"{prefix}.")]
    wrong = [name for name in missing if not name.endswith(".num_batches_tracked")]
    wrong += [str(name) for key in ("unexpected_keys", "mismatched_keys") for name in report[key]]
    if wrong:
        raise ValueError(
            f"{model} with {dict(settings)!r:.300} has no place for {len(wrong)} tensors of the backbone, such as {min(wrong)}: "
            "leave out the settings that change the backbone"
        )
    found: nn.Module = opened
    return found


def _features(loaded: Weights, kind: Model, model: str) -> nn.Module:
    """timm's feature extractor of the backbone, with the source's tensors, as inside `TimmBackbone`.

    Raises:
        ValueError: there is none, or the source lacks tensors of it.
    """
    what = f"{loaded.what} ({loaded.architecture})"
    options = {"pretrained": False, "features_only": True, **loaded.model_args}
    try:
        with torch.device("meta"):
            meta: Any = timm.create_model(loaded.architecture, **options)
        info: list[dict[str, Any]] = meta.feature_info.info
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"timm gives no feature maps by stages for {what}: {error}") from None
    at = {level["reduction"]: index for index, level in enumerate(info)}
    strides = kind.strides or (info[-1]["reduction"],)
    if missing := [stride for stride in strides if stride not in at]:
        raise ValueError(
            f"{what} has feature maps of the strides {sorted(at)}, but {model} needs {list(strides)}: stride {missing[0]} is "
            "missing. Use a network that has it, such as a ResNet or ConvNeXt"
        )
    with torch.random.fork_rng(devices=[]):
        features: nn.Module = timm.create_model(
            loaded.architecture, **options, out_indices=tuple(at[stride] for stride in strides)
        )
    # timm's wrappers flatten the path (stages.0 becomes stages_0) or nest the model one level deeper.
    source = {name.replace(".", "_"): tensor for name, tensor in loaded.tensors.items()}
    flat = {name: name.removeprefix("model.").replace(".", "_") for name in features.state_dict()}
    if len(source) < len(loaded.tensors) or (lost := [name for name, key in flat.items() if key not in source]):
        raise ValueError(f"{what}: timm's feature maps have {lost[0]}, which the backbone lacks; no model was written")
    features.load_state_dict({name: source[key] for name, key in flat.items()})
    return features.eval()


def _config(loaded: Weights, kind: Model, model: str, features: nn.Module) -> Any:
    from transformers import AutoConfig, TimmBackboneConfig

    out: Any = features.feature_info
    of_timm: Any = TimmBackboneConfig
    settings: dict[str, Any] = {
        "backbone_config": of_timm(backbone=loaded.architecture, out_indices=list(out.out_indices))
    }
    if kind.freezes:
        settings |= {kind.freezes: not _has_fused_norms(features), "encoder_in_channels": list(out.channels())}
    return AutoConfig.for_model(model, **settings)


def _has_fused_norms(features: nn.Module) -> bool:
    """Whether batch norms include the activation: transformers replaces them by frozen ones without it."""
    return any(
        isinstance(module, nn.BatchNorm2d) and type(module) is not nn.BatchNorm2d for module in features.modules()
    )


def _backbone(built: nn.Module, wrapper: str) -> tuple[str, nn.Module]:
    """timm's network inside a model, and its path. Some models have a `TimmBackbone` around it, some do not."""
    return next((path, module) for path, module in built.named_modules() if type(module).__name__ == wrapper)


def _placed(
    source: Mapping[str, Tensor], inside: Mapping[str, Tensor], what: str, model: str
) -> tuple[dict[str, Tensor], int]:
    """The tensors that exist in the model, and the number of frozen batch norms' counters that do not."""
    counters = {name for name in source.keys() - inside.keys() if name.endswith(".num_batches_tracked")}
    placed = {name: tensor for name, tensor in source.items() if name not in counters}
    wrong = list(placed.keys() ^ inside.keys())
    wrong += [name for name in placed.keys() & inside.keys() if placed[name].shape != inside[name].shape]
    if wrong:
        raise ValueError(
            f"{what} does not fit the network that transformers builds for {model}: {len(wrong)} tensors, such as "
            f"{min(wrong)}. `TimmBackbone` ignores model_args; nothing was written"
        )
    return placed, len(counters)


def _write_processor(folder: Path, kind: Model, loaded: Weights) -> None:
    seen = loaded.preprocessing
    settings = {
        "image_processor_type": kind.processor,
        "do_normalize": True,  # RT-DETR's own backbones were trained without
        "image_mean": list(seen.mean),
        "image_std": list(seen.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _checked(
    loaded: Weights, kind: Model, model: str, folder: Path, features: nn.Module, placed: Mapping[str, Tensor]
) -> float:
    """Load the folder and return the largest difference of a feature map, relative to its largest value.

    Raises:
        ValueError: a tensor differs from the source's, or the difference is too large.
    """
    import transformers

    what = f"{loaded.what} ({loaded.architecture})"
    with quiet(), torch.random.fork_rng(devices=[]):
        opened, report = getattr(transformers, kind.opened_by).from_pretrained(folder, output_loading_info=True)
    prefix, inside = _backbone(opened.eval(), type(features).__name__)
    found = inside.state_dict()
    wrong = [name for name, tensor in placed.items() if not torch.equal(found[name], tensor)]
    wrong += [name for name in report["missing_keys"] if name.startswith(f"{prefix}.")]
    wrong += [str(name) for key in ("unexpected_keys", "mismatched_keys") for name in report[key]]
    if wrong:
        raise ValueError(
            f"{model} of transformers {transformers.__version__} has no place for {len(wrong)} tensors of {what}, such as "
            f"{min(wrong)}: nothing was written. `clove-hub downstream torchvision` trains detectors on it"
        )
    image = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            pairs = list(zip(inside(image), features(image), strict=True))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{what} cannot take images of any size ({error}), as {model} needs: nothing was written. Use a network that can, "
            "such as a ResNet or ConvNeXt"
        ) from None
    difference = max(float((one - other).abs().max() / other.abs().max().clamp(min=1e-12)) for one, other in pairs)
    for _, other in pairs:
        finite(other, loaded.name)
    if not difference <= TOLERANCE:
        reason, way_out = "", "use another network, such as a ResNet or ConvNeXt"
        if len(placed) < len(features.state_dict()):
            reason = ", for it freezes the batch norms, without the activation or the epsilon that they have here"
            way_out = "--model mask2former and --model upernet leave them as they are"
        raise ValueError(
            f"{model} of transformers {transformers.__version__} does not compute what timm does with {what}{reason}: a "
            f"feature map differs by {difference:.1e} of its largest value, and at most {TOLERANCE:.0e} is allowed. "
            f"Nothing was written; {way_out}"
        )
    return difference


def _how_to_load(kind: Model, place: Path) -> str:
    folder = json.dumps(str(place), ensure_ascii=False)
    return (
        f"from transformers import AutoImageProcessor, {kind.opened_by}\n\n"
        f"processor = AutoImageProcessor.from_pretrained({folder})\n"
        f"model = {kind.opened_by}.from_pretrained({folder}, num_labels=10)  # lists the heads: they are new\n"
    )


def _notes(loaded: Weights, features: nn.Module, model: str, counters: int, difference: float) -> Iterator[str]:
    import transformers

    yield from loaded.notes
    if left := len(loaded.tensors) - len(features.state_dict()):
        yield f"{left} tensors behind the last feature map, such as the norm before a classifier, are not part of it."
    if counters:
        yield f"{model} freezes batch norms: their {counters} num_batches_tracked counters have no place in it, all else does."
    elif MODELS[model].freezes and _has_fused_norms(features):
        yield (
            f"{MODELS[model].freezes} is off: the network's norms compute the activation as well, which frozen ones do not."
        )
    if loaded.model_args:
        yield f"transformers builds the backbone without model_args {dict(loaded.model_args)!r:.200}, which changes no feature map."
    yield (
        f"transformers {transformers.__version__} opened the folder: every tensor is the source's, and the largest difference of a "
        f"feature map from timm's is {difference:.1e} of its largest value (at most {TOLERANCE:.0e} is allowed)."
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the list of the heads' tensors, which are new on purpose, and progress bars."""
    from transformers import utils

    logging: Any = utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
