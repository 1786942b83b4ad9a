"""Check a released file's record of its training against the card of a model of the zoo.

A contradiction in anything that identifies the model (method, encoder, epoch, data set, prototypes, images a step) is
an error. Missing information becomes a note, and so does another learning rate: PixPro's own code stores the default of
its command line there when the script does not give one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clove_hub.zoo.formats import Encoder
from clove_hub.zoo.models import Data, Model, data, models, papers
from clove_hub.zoo.released import Released

PROTOTYPES = "center"
"""The tensor of a whole SlotCon checkpoint that has a number for each prototype, by its name in our state dict."""


@dataclass(frozen=True)
class Match:
    """A file that can be a model."""

    model: Model
    encoder: Encoder
    """The encoder to take from it."""
    missing: tuple[str, ...]
    """The identifying facts that it does not record."""
    notes: tuple[str, ...]


def match(file: str, released: Released, told: Mapping[str, Any], model: Model, known: bool = False) -> Match:
    """Compare a file's record of its training with a model's card.

    Args:
        file: what messages call it.
        told: what it says of its training, as `facts` gives it.
        known: whether its sha256 identifies it as this model; then nothing has to be recorded in it.

    Raises:
        ValueError: it is of another method, does not hold the encoder, or contradicts the card. The message names both
            values.
    """
    encoder, notes = _encoder(file, released, model)
    dataset = str(told.get("dataset", ""))
    named = _named(dataset)
    prototypes = released.tensors[PROTOTYPES].shape[-1] if PROTOTYPES in released.tensors else told.get("prototypes")
    batch, wanted = _images_a_step(told), model.training
    checks = {
        # What is compared, what the file says, what the card says, and whether that is the same. Some count from 0.
        "epoch": (told.get("epoch"), model.epochs, told.get("epoch") in (model.epochs, model.epochs - 1)),
        "epochs": (told.get("epochs"), model.epochs, told.get("epochs") == model.epochs),
        "images": (told.get("images"), model.data.images, told.get("images") == model.data.images),
        "data set": (dataset if named else None, model.data.name, model.data in named),
        "prototypes": (prototypes, wanted.get("prototypes"), prototypes == wanted.get("prototypes")),
        "images a step": (batch, wanted.get("batch_size"), batch == wanted.get("batch_size")),
    }
    for what, (found, by_card, same) in checks.items():
        if found is not None and by_card is not None and not same:
            raise ValueError(
                f"{file} records {what} {found}, but the card of {model.name} has {what} {by_card}: give the file of that "
                "model, or a name of your own with --license"
            )
    confirmed = {what for what, (found, _, _) in checks.items() if found is not None}
    rate = told.get("learning_rate")
    if rate is not None and rate != wanted.get("learning_rate", rate):
        notes.append(f"The file records learning rate {rate}; {model.recipe} has {wanted['learning_rate']}.")
    if known:
        return Match(model, encoder, (), (*notes, f"Its sha256 is that of the released file of {model.name}."))
    if not confirmed and released.exported == "backbone":
        missing: tuple[str, ...] = ("method", "epoch", "data set")
        notes.append(
            f"**Nothing in the file confirms that these are the weights of {model.name}.** It holds only a ResNet and does "
            "not record the method, the epochs or the images of its training; whoever converted it chose this name."
        )
    else:
        several = len(released.methods) > 1 or released.exported == "backbone"
        silent = tuple(
            what for what, by in (("epoch", {"epoch"}), ("data set", {"data set", "images"})) if not by & confirmed
        )
        missing = ("method", *silent) if several else silent
        if silent:
            notes.append(f"The file does not record its {' and '.join(silent)}; those of {model.name} are given here.")
    if "batch_size" in told and batch is None:
        notes.append(
            f"The file records batch size {told['batch_size']}, but not the number of devices: the "
            f"{wanted['batch_size']} images a step of {model.recipe} could not be confirmed."
        )
    return Match(model, encoder, missing, tuple(notes))


def only_match(file: str, typed: str, released: Released, told: Mapping[str, Any]) -> Model:
    """The one model of the zoo that a file's record identifies.

    Args:
        typed: how a command names the file.

    Raises:
        ValueError: it can be none, or its record does not identify one. The message has a command for each candidate.
    """
    matches, against = [], []
    for model in models().values():
        if model.architecture == released.architecture and model.method in released.methods:
            try:
                matches.append(match(file, released, told, model))
            except ValueError as error:
                against.append(str(error).partition(": give")[0].removeprefix(f"{file} "))
    if len(matches) == 1 and not matches[0].missing:
        return matches[0].model
    command = f"clove-hub adopt {shlex.quote(typed)} --as"
    own = f"    {command} {released.architecture}.my_tag --license ID"
    shows = f"{file} is {'' if released.exported == 'backbone' else 'a checkpoint of '}{released.title}"
    if not matches:
        reasons = "".join(f"\n    it {reason}" for reason in dict.fromkeys(against))
        raise ValueError(
            f"{shows}, but no model of the zoo{f':{reasons}' if reasons else ''}\nTo adopt it under a name of your own:\n{own}"
        )
    missing = dict.fromkeys(what for found in matches for what in found.missing)
    lines = "".join(f"\n    {command} {found.model.name}" for found in matches)
    silent = f"It does not record its {', '.join(missing)}" if missing else "Its record matches several models"
    raise ValueError(
        f"{shows}. {silent}; give the name under which you downloaded it. Models of the zoo that it can be:{lines}\n"
        f"or, if it is none of these:\n{own}"
    )


def _encoder(file: str, released: Released, model: Model) -> tuple[Encoder, list[str]]:
    """Which encoder to take, and what is to be said about that."""
    wanted: Encoder = "teacher" if model.exported == "teacher" else "student"
    if model.method not in released.methods:
        raise ValueError(
            f"{file} is {'' if released.exported == 'backbone' else 'a checkpoint of '}{released.title}, but "
            f"{model.name} is a model of {model.paper.name}: give the file that its authors released ({model.paper.code})"
        )
    if released.exported == "backbone":
        if released.heads:
            raise ValueError(
                f"{file} is {released.title} with a classifier ({', '.join(released.heads)}), for which labels were "
                f"used, but {model.name} is a model of {model.paper.name}, pre-trained without: give the file that its "
                f"authors released ({model.paper.code})"
            )
        return "backbone", [
            f"The file holds one backbone and does not record which encoder it is of; that of {model.name} is the {wanted}'s."
        ]
    if wanted not in released.encoders:
        raise ValueError(
            f"{file} holds only the {' and '.join(released.encoders)}, but {model.name} is the {wanted}: give the file that "
            f"its authors released ({model.paper.code})"
        )
    if len(released.methods) > 1:
        others = " and ".join(papers()[method].name for method in released.methods)
        return wanted, [f"Files of {others} have the same tensor names; {model.name} is of {model.paper.name}."]
    return wanted, []


def _named(dataset: str) -> list[Data]:
    """The data sets that can be meant: the one of exactly this name, or all in whose name it is."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower().replace("+", "plus"))

    told = plain(dataset)
    if exact := [known for key, known in data().items() if plain(key) == told]:
        return exact
    return [known for known in data().values() if told and told in plain(known.name)]


def _images_a_step(told: Mapping[str, Any]) -> int | None:
    """Over all devices; None if the file does not say on how many they were."""
    factors = (told.get("batch_size"), told.get("processes"), told.get("accumulation", 1))
    if not all(isinstance(factor, int) for factor in factors):
        return None
    each, processes, times = map(int, factors)
    return each * processes * times
