"""Recipes: the definition of a run in one YAML file, converted on load to the dataclasses of `settings`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clove_hub.documents import read_document, reason, resolved
from clove_hub.evaluation import PROTOCOLS
from clove_hub.methods import METHODS
from clove_hub.settings import Given, build, described, nearest, plain, read_override, settle, shown

from .bands import backbone_for
from .settings import (
    BackboneSettings,
    BatchSettings,
    DataSettings,
    Evaluation,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
)

SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    method: Any
    """The settings dataclass of the method `method.name`."""
    method_name: str
    backbone: BackboneSettings
    data: DataSettings
    batch: BatchSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    run: RunSettings
    evaluate: tuple[Evaluation, ...] = ()


SECTIONS: dict[str, type] = {
    "backbone": BackboneSettings,
    "data": DataSettings,
    "batch": BatchSettings,
    "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings,
    "run": RunSettings,
}
NAMES = ["method", *SECTIONS, "evaluate"]


def recipe_files() -> dict[str, Path]:
    """The recipes that are available by name, from this package and from methods that other packages add."""
    folders = [entry.recipes for entry in METHODS.values() if entry.recipes is not None]
    return {path.stem: path for folder in [*folders, SHIPPED] for path in sorted(folder.glob("*.yaml"))}


def shipped_recipes() -> list[str]:
    return sorted(recipe_files())


def load(recipe: str, overrides: Sequence[str]) -> Recipe:
    """Read a shipped recipe by name, or a recipe by path, with `section.key=value` overrides.

    Raises:
        ValueError: no such recipe, an unknown or mistyped key, a value of the wrong type, a required one missing.
    """
    return parse(read_sections(recipe, overrides))


def read_sections(recipe: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a recipe as written, not typed yet; if a key is overridden twice, the last value counts.

    Raises:
        ValueError: there is no such recipe, or it is not a mapping of sections.
    """
    path = Path(recipe).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = recipe_files().get(recipe, path)
        if not path.is_file():
            raise ValueError(
                f"no recipe is called {recipe!r}{nearest(recipe, shipped_recipes())}; "
                f"shipped are {', '.join(shipped_recipes())}; a file of your own must end in .yaml"
            )
    elif not path.is_file():
        raise ValueError(f"the recipe file {recipe} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe file {path} cannot be read: {reason(error)}") from error
    sections = read_document(text, str(path))
    kinds = {"evaluate": list}
    if not isinstance(sections, dict) or not all(isinstance(v, kinds.get(k, dict)) for k, v in sections.items()):
        raise ValueError(
            f"{path}: a recipe is a mapping of sections ({', '.join(NAMES[:-1])}) and the list {NAMES[-1]}"
        )
    for override in overrides:
        apply_override(sections, override)
    return sections


def apply_override(sections: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value`, or the list `evaluate=[...]`, to the sections."""
    section, key, value = read_override(override, lists=["evaluate"])
    if key:
        sections.setdefault(section, {})[key] = value
    else:
        sections[section] = value


def parse(sections: Mapping[str, Any]) -> Recipe:
    """Sections as read -> a typed recipe. The inverse of `as_sections`."""
    for section in sections:
        if section not in NAMES:
            raise ValueError(f"unknown section {section!r}{nearest(section, NAMES)}; a recipe has {', '.join(NAMES)}")
    name, method = method_of(sections)
    built = {section: build(cls, sections.get(section, {}), section) for section, cls in SECTIONS.items()}
    recipe = Recipe(
        method=method,
        method_name=name,
        **built | {"backbone": backbone_for(built["backbone"], built["data"].bands)},
        evaluate=evaluations(sections.get("evaluate", [])),
    )
    if not recipe.run.output:
        raise ValueError("run.output is not set: give the run's folder, as in run.output=runs/my_run")
    return recipe


def method_of(sections: Mapping[str, Any]) -> tuple[str, Any]:
    """The name of a recipe's method and its settings.

    Raises:
        ValueError: there is no such method, or a setting is invalid.
    """
    given = dict(sections.get("method", {}))
    name = str(given.pop("name", None))
    if name not in METHODS:
        raise ValueError(f"method.name={shown(name)}{nearest(name, list(METHODS))}: choose one of {', '.join(METHODS)}")
    return name, build(METHODS[name].settings, given, "method")


def evaluations(entries: Any) -> tuple[Evaluation, ...]:
    """The list `evaluate`, typed."""
    if isinstance(entries, Given):
        entries = read_document(entries, f"evaluate={shown(entries)}")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"evaluate={shown(resolved(entries))}: expected a list, as in "
            '"evaluate=[{protocol: knn, data: DIR, every: 500}]"'
        )
    found = []
    for number, entry in enumerate(entries):
        given = entry.get("settings")
        if isinstance(given, dict) and entry.get("protocol") in PROTOCOLS:  # plain data; text stays as written
            from clove_hub.evaluation.run import find_protocol

            entry = {**entry, "settings": settle(given, find_protocol(entry["protocol"]).Settings)}
        found.append(build(Evaluation, entry, f"evaluate[{number}]"))
    return tuple(found)


def describe(recipe: str) -> str:
    """Every setting of a recipe for `--help`: its value, its type and its note.

    Raises:
        ValueError: as `read_sections`, or it names no method.
    """
    sections = resolved(read_sections(recipe))
    name, _ = method_of(sections)
    kinds = {"method": METHODS[name].settings, **SECTIONS}
    parts = [described(kind, section, sections.get(section)) for section, kind in kinds.items()]
    parts += ["  evaluate=[{...}, ...]  (a list; each entry has)", described(Evaluation)]
    return "\n".join([f"  method.name={name}  (text)", *parts])


def as_sections(recipe: Recipe) -> dict[str, Any]:
    """The complete recipe as plain data, with all defaults."""
    method = {"name": recipe.method_name, **plain(recipe.method)}
    sections = {section: plain(getattr(recipe, section)) for section in SECTIONS}
    return {"method": method, **sections, "evaluate": [plain(one) for one in recipe.evaluate]}
