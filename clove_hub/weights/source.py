"""Resolving and reading a SOURCE, for all commands (the package's docstring has the table)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from clove_hub.backbones import create_backbone
from clove_hub.methods import METHODS
from clove_hub.runs import STATE_FILE
from clove_hub.settings import build
from clove_hub.zoo.checks import require_finite, require_names_and_shapes
from clove_hub.zoo.models import find_model, models
from clove_hub.zoo.places import adopted, how_to_get, hub_id, weights_of
from clove_hub.zoo.released import read_released
from clove_hub.zoo.tensors import read_tensors

from . import SOURCE
from .architectures import require_architecture
from .bundle import CONFIG, PROVENANCE, WEIGHTS, read_bundle, read_config
from .files import read_file
from .hub import HUB, explain, fetch
from .run import find_checkpoint, is_run, read_checkpoint, read_run
from .weights import LARGEST_SIDE, Preprocessing, Weights, read_preprocessing

LOCAL, RANDOM = "local-dir:", "random:"
MOST = {"_views": 100, "_size": LARGEST_SIDE}
"""Maximum of a method's settings by the endings of their names; the method is built with them before other checks."""


class Place(NamedTuple):
    """The location of the weights of a source."""

    kind: Literal["run", "checkpoint", "bundle", "file", "timm", "random"]
    at: str
    """A path, or the name of a model."""

    @property
    def path(self) -> Path:
        return Path(self.at)


def load(source: str | Path, *, seed: int = 0) -> Weights:
    """Load a backbone of any origin.

    Args:
        source: one of the kinds that `clove_hub.weights` lists.
        seed: seed of the weights of `random:`.

    Returns:
        Every tensor of the headless backbone by timm's names, with finite values.

    Raises:
        ValueError: it is none of these, it cannot be read without running code, a checksum does not match, a tensor is
            missing, unexpected, mis-shaped or non-finite. The message says what was found and what to do.

    Examples:
        >>> weights = load("random:resnet18", seed=1)
        >>> weights.architecture, len(weights.tensors)
        ('resnet18', 120)
    """
    kind, at = place = find_source(source)
    name = str(source)
    if kind == "run":
        weights = read_run(find_checkpoint(place.path), f"the run {at}", name)
    elif kind == "checkpoint":
        weights = read_run(read_checkpoint(place.path), f"the state {name}", name)
    elif kind == "bundle":
        weights = read_bundle(place.path, name, name if name.startswith(HUB) else f"the bundle {at}")
    elif kind == "file":
        weights = read_file(place.path, name)
    elif kind == "timm":
        weights = _of_timm(at, name)
    else:
        weights = _random(at, name, seed)
    require_finite(weights.tensors, weights.what)
    if name.startswith(HUB):
        return replace(weights, hub_id=name.removeprefix(HUB).partition("@")[0])
    return weights


@dataclass(frozen=True)
class MethodState:
    """Every tensor of a method."""

    name: str
    """The method's name in the registry."""
    what: str
    """For messages: `the run runs/photos, step 150`."""
    tensors: dict[str, Tensor]
    """By the names of the method's state dict."""
    preprocessing: Preprocessing
    backbone: str | None = None
    """The architecture; None if only the tensors are known, as in a released file."""
    settings: Mapping[str, Any] | None = None
    """Settings of the method in the run's recipe; None as above."""
    network: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the backbone: `args`, `level`."""

    @cached_property
    def method(self) -> Any:
        """The method with these weights, in eval mode.

        Raises:
            ValueError: the settings are not known, or the tensors do not match them.
        """
        if self.backbone is None or self.settings is None:
            raise ValueError(
                f"{self.what} does not say with which settings it was trained: give a run, such as that of `clove-hub pretrain "
                "RECIPE run.init_from=FILE data.path=PHOTOS run.output=RUN schedule.steps=1 schedule.warmup_epochs=0 "
                "optimizer.learning_rate=0`"
            )
        if self.name not in METHODS:
            raise ValueError(
                f"{self.what} is of the unknown method {self.name!r}; the methods are {', '.join(METHODS)}"
            )
        kind, settings = METHODS[self.name], build(METHODS[self.name].settings, self.settings, "method")
        for key, value in self.settings.items():
            most = next((most for ending, most in MOST.items() if key.endswith(ending)), None)
            if most is not None and isinstance(value, int) and value > most:
                raise ValueError(
                    f"{self.what} has method.{key}={value}, expected at most {most}: use another checkpoint"
                )
        try:
            with torch.device("meta"):  # names and shapes first: the configured method may exceed the memory
                asked = kind.build(create_backbone(self.backbone, **self.network), settings).state_dict()
        except (RuntimeError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{self.what}: no {self.name} can be built with its recipe's settings ({error!s:.200})"
            ) from error
        require_names_and_shapes(
            self.tensors, {name: t.shape for name, t in asked.items()}, f"{self.what}, by its recipe"
        )
        method = kind.build(create_backbone(self.backbone, **self.network), settings)
        method.load_state_dict(self.tensors)
        return method.eval().requires_grad_(False)


def load_method(source: str | Path) -> MethodState:
    """Load the complete state of a method.

    Args:
        source: a run's folder, one of its checkpoints, `hf-hub:organization/name[@revision]` of a published state, or a
            complete checkpoint that a paper's authors released.

    Raises:
        ValueError: it is none of these, or it holds only a backbone; it is damaged, or has non-finite values.
    """
    kind, at = place = find_source(source)
    alone = {"bundle": "a bundle", "timm": "a model of timm", "random": "a random backbone"}
    if kind in alone:
        raise ValueError(
            f"{source} is {alone[kind]}: it holds only a backbone, not the teacher and the heads. Give a run's folder, "
            "hf-hub:organization/name of a published state, or a whole checkpoint released by a paper's authors"
        )
    if kind == "file":
        released = read_released(at)
        found = MethodState(
            released.format, f"{at}, a released {released.title} checkpoint", released.tensors, Preprocessing()
        )
    else:
        state = find_checkpoint(place.path) if kind == "run" else read_checkpoint(place.path)
        tensors, _ = read_tensors(state.folder / "model.safetensors")
        settings = {key: value for key, value in state.recipe["method"].items() if key != "name"}
        what = f"{state.folder if kind == 'run' else source}, step {state.step}"
        network = {"args": state.args, "level": state.recipe.get("backbone", {}).get("level", -1)}
        found = MethodState(state.method, what, tensors, state.preprocessing, state.backbone, settings, network)
    require_finite(found.tensors, found.what)
    return found


def find_source(source: str | Path) -> Place:
    """The kind and location of a source. Sources on the Hub are downloaded.

    Raises:
        ValueError: it is not a source.
    """
    name = str(source)
    if name.startswith(RANDOM):
        return Place("random", name.removeprefix(RANDOM))
    if name.startswith(HUB):
        names = (CONFIG, PROVENANCE, STATE_FILE, WEIGHTS[0], "optimizer.safetensors")
        folder = fetch(name, *names)
        if (folder / CONFIG).is_file() and not (folder / WEIGHTS[0]).is_file():
            folder = fetch(name, *names, WEIGHTS[1])
        return _folder(folder, name, f"{name} is not a repository with weights")
    try:
        path = Path(name.removeprefix(LOCAL)).expanduser()
        is_folder = path.is_dir()
        marks = is_folder and (is_run(path) or (path / CONFIG).is_file() or (path / STATE_FILE).is_file())
        there = marks or path.is_file()
    except (OSError, RuntimeError) as error:  # too long, no permission, unknown user
        raise ValueError(f"{name!r:.300} cannot be accessed: {error!s:.100}") from error
    could_be_name = isinstance(source, str) and not set("/:~") & set(name) and timm.is_model(name.partition(".")[0])
    model = _model(name) if could_be_name else None
    if model and there:
        raise ValueError(
            f"{name} is both the name of a model and a path: write ./{name} for the path, or {model} for the model"
        )
    if model:
        return _named(name)
    if is_folder:
        return _folder(path, name, f"{path} is not a source of weights")
    if name.startswith(LOCAL):
        raise ValueError(f"{name}: the folder {path} does not exist; expected one with {CONFIG} and {WEIGHTS[0]}")
    if path.exists():
        return Place("file", str(path))
    raise _nothing(name)


def _folder(path: Path, name: str, refused: str) -> Place:
    if (path / STATE_FILE).is_file():
        return Place("checkpoint", str(path))
    if (path / CONFIG).is_file():
        return Place("bundle", str(path))
    if is_run(path) and not name.startswith((HUB, LOCAL)):
        return Place("run", str(path))
    raise ValueError(
        f"{refused}: found neither a bundle ({CONFIG}, {WEIGHTS[0]}) nor "
        f"{f'the state of a run ({STATE_FILE})' if name.startswith((HUB, LOCAL)) else 'a run (recipe.yaml, checkpoints/)'}"
        " in it"
    )


def _model(name: str) -> str | None:
    """The name of a model of the zoo or of timm if the text could also be a path; None if it is not such a name.

    Raises:
        ValueError: it is a model of the zoo, and its weights are not known here.
    """
    if (adopted(name) / CONFIG).is_file():
        return f"{LOCAL}{adopted(name)}"
    if name in models():
        found = weights_of(find_model(name))
        if found is None and not Path(name).exists():
            raise ValueError(how_to_get(find_model(name)))
        return f"{HUB}{found}" if found else None
    base, _, tag = name.partition(".")
    if tag and not timm.models.is_model_pretrained(name):
        return None
    return f"{HUB}timm/{base}.{tag or 'TAG'}"


def _named(name: str) -> Place:
    """A model of the zoo, at the location of its weights, or one of timm."""
    folder = adopted(name)
    if not (folder / CONFIG).is_file():
        if name not in models():
            return Place("timm", name)
        folder = fetch(f"{HUB}{hub_id(find_model(name))}", CONFIG, PROVENANCE, WEIGHTS[0])
    found = read_config(folder / CONFIG, name)["architecture"]
    if found != name.partition(".")[0]:
        raise ValueError(f"{name} is published with the weights of another architecture: {found}")
    return Place("bundle", str(folder))


def _nothing(name: str) -> ValueError:
    path, (base, _, tag) = Path(name).expanduser(), name.partition(".")
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:  # not a folder, or no permission
        beside = []
    near = [str(path.with_name(found)) for found in difflib.get_close_matches(path.name, beside, n=1)]
    if "/" not in name:
        tagged = timm.list_pretrained(f"{base}.*") if tag and timm.is_model(base) else []
        near += tagged or difflib.get_close_matches(name, [*timm.list_models(), *models()], n=2, cutoff=0.75)
    hint = f" (did you mean {' or '.join(near[:12])}?)" if near else ""
    return ValueError(f"{name!r:.300} does not exist{hint}: expected {SOURCE}")


def _of_timm(at: str, name: str) -> Weights:
    """timm's weights, loaded by timm."""
    base, _, tag = at.partition(".")
    if not timm.models.is_model_pretrained(at):
        raise ValueError(f"timm has no weights of {base}: write {RANDOM}{base} to start from random ones")
    try:
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(at, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the Hub and the architectures raise arbitrary types
        raise ValueError(f"timm cannot load {at}: {explain(error)}") from None
    cfg: Any = model.pretrained_cfg
    return Weights(
        name,
        f"timm's {base}.{cfg.get('tag') or tag}",
        "timm",
        base,
        dict(model.state_dict()),
        read_preprocessing(cfg, f"timm's {at}"),
        origin={"tag": cfg.get("tag"), "url": cfg.get("origin_url")},
        license=cfg.get("license"),
        hub_id=cfg.get("hf_hub_id"),
    )


def _random(at: str, name: str, seed: int) -> Weights:
    if "." in at:
        base = at.partition(".")[0]
        raise ValueError(f"{name}: a tag (after the dot) names trained weights: write {RANDOM}{base} or {at}")
    require_architecture(at)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed every accelerator as well
        model: nn.Module = timm.create_model(at, num_classes=0)
    return Weights(name, name, "random", at, dict(model.state_dict()), origin={"seed": seed})
