"""The origin of a card's weights: the initial weights, the training images, and the section on the training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from clove_hub.evaluation.adaptation import Adaptation, markdown
from clove_hub.settings import as_typed
from clove_hub.weights.weights import restriction
from clove_hub.zoo.models import Model, papers


def base_model(origin: Mapping[str, Any]) -> str | None:
    """The Hub repository of the initial weights of a run, if there is one."""
    begun_with = origin.get("recipe", {}).get("run", {}).get("init_from") or ""
    if found := re.fullmatch(r"hf-hub:([^/@\s]+/[^/@\s]+)(@\S+)?", str(begun_with)):
        return found[1]
    repositories = (base.get("model") for base in _bases(origin))
    return next((str(one) for one in repositories if one and re.fullmatch(r"[\w.-]+/[\w.-]+", str(one))), None)


def begun_with(origin: Mapping[str, Any]) -> str:
    """The chain of initial weights of a run, in words; empty if it started from random ones."""
    links = []
    for base in _bases(origin):
        repository, name = base.get("model"), f"`{base['source']}`"
        where = f" ([{repository}](https://huggingface.co/{repository}))" if repository else ""
        license = base.get("license")
        forbids = f", which {words}" if (words := restriction(license)) else ""
        links.append(f"{name}{where}, {f'under {license}{forbids}' if license else 'of unknown license'}")
    return "; these started from ".join(links)


def _bases(origin: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The initial weights of a run, the initial weights of those, and so on."""
    while base := origin.get("pretrained"):
        yield base
        origin = base.get("origin") or {}


def hub_dataset(origin: Mapping[str, Any]) -> str | None:
    """The Hub data set that a run was trained on, if it was one."""
    name = str(origin["data"]["name"]) if origin["kind"] == "run" else ""
    of_the_hub = origin.get("recipe", {}).get("data", {}).get("source") == "huggingface"
    return name if of_the_hub and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) else None


def training_data(origin: Mapping[str, Any], model: Model | None) -> str:
    """The training images, with a link if there is one."""
    if model:
        return f"[{model.data.name}]({model.data.page}), {model.data.images:,} images"
    name, count = origin["data"]["name"], f"{origin['data']['images']:,} images"
    hub = hub_dataset(origin)
    return f"[{name}](https://huggingface.co/datasets/{hub}), {count}" if hub else f"{name}, {count}"


def run_section(provenance: Mapping[str, Any], model: Model | None) -> str:
    """The section on the training that produced the weights."""
    origin = provenance["origin"]
    settings = {
        f"{section}.{key}": value
        for section in ("backbone", "method", "batch", "optimizer", "schedule")
        for key, value in origin["recipe"].get(section, {}).items()
    }
    rows = table(
        {
            "images": training_data(origin, model),
            "terms of the images": model.data.terms if model else "not recorded",
            "fingerprint of the images": f"`{origin['data']['fingerprint']}`",
            "images seen": f"{origin['images_seen']:,}",
            "optimizer steps": f"{origin['step']:,} of {origin['steps_total']:,}",
            **_peak_rate(origin["recipe"]),
            "hardware": origin["hardware"],
            "software": ", ".join(f"{name} {version}" for name, version in origin["versions"].items()),
        }
        | {
            f"changed after step {change['step']:,}": f"`{'; '.join(change['changed'])}`"
            for change in origin.get("changes", ())
        }
        | {f"`{name}`": f"`{as_typed(value)}`" for name, value in settings.items()}
    )
    # A relative address works wherever the card is read: in a folder, and at every revision of a repository.
    curves = (
        "\n\n![Loss and signs of collapse over the training steps](curves.png)"
        if "curves.png" in provenance["sha256"]
        else ""
    )
    level = origin["recipe"].get("backbone", {}).get("level", -1)
    behind = (
        f"\n\nThe training used the feature map {level}; the layers behind it keep their initial weights."
        if level != -1
        else ""
    )
    return f"{rows}\n\nThe complete recipe is in `clove_hub.json`.{behind}{_adaptation(origin)}{curves}"


def _peak_rate(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The learning rate that was used: the recipe has the one for 256 images."""
    rate, batch = recipe.get("optimizer", {}).get("learning_rate"), recipe.get("batch", {}).get("total")
    if rate is None or batch is None:
        return {}
    return {"peak learning rate": f"{rate * batch / 256:g} (`optimizer.learning_rate` x `batch.total` / 256)"}


def _adaptation(origin: Mapping[str, Any]) -> str:
    """Whether continued training has helped, by the measurements during the run."""
    told = [Adaptation(**one) for one in origin.get("adaptation", ())]
    if not told:
        unknown = "\n\nIt was not measured whether these weights are better than those that the training started from."
        return unknown if origin.get("pretrained") else ""
    return f"\n\nMeasured before and after this training:\n\n{markdown(told)}"


def adopted_section(origin: Mapping[str, Any], whose: str, model: Model | None) -> str:
    """The section on the file that the weights were taken from, and what is known about their training."""
    trained_by = "unknown; the file does not say"
    if model:
        arxiv = papers()[model.paper.released_by].arxiv
        trained_by = f"the authors of [arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})"
    rows = {
        "trained by": trained_by,
        "released at": origin.get("url") or "unknown",
        "file": f"`{origin['file']}`",
        "sha256 of the file": f"`{origin['sha256']}`",
        "format of the file": origin["format"],
        "taken from the file": f"the {whose}, every value unchanged",
    }
    if model:
        rows |= {
            "images": training_data(origin, model),
            "terms of the images": model.data.terms,
            "epochs": model.epochs,
            "hardware": "not recorded in the file",
            "recipe": f"`clove-hub pretrain {model.recipe}` repeats this training; these weights do not come from it",
        }
    converted = "clove-hub converted the weights and did not train them. Nothing else in the file was used."
    return "\n\n".join([table(rows), converted, *origin["notes"]])


def table(rows: Mapping[str, Any]) -> str:
    """Names and values as a Markdown table without a header."""
    lines = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())
    return "\n".join(("| | |", "|---|---|", *lines))
