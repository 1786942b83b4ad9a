"""`clove-hub adopt`: a checkpoint that somebody released becomes a bundle, with what is known about it and no more."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clove_hub.command import Command, user_path
from clove_hub.runs import sha256
from clove_hub.weights.files import WRITTEN_BY_ANY_CODE, statement
from clove_hub.weights.weights import Preprocessing
from clove_hub.zoo.facts import facts
from clove_hub.zoo.formats import Encoder
from clove_hub.zoo.models import Model, adopted, data, find_model, models, papers
from clove_hub.zoo.released import Released, recognize
from clove_hub.zoo.resnets import RESNETS, not_a_resnet
from clove_hub.zoo.tensors import read_contents

from .bundle import Contents, write_bundle
from .card import UNKNOWN
from .card_files import WEIGHTS
from .license import add_license_arguments, require_license

SIZE = 224
"""Side in pixels of the views of every released file known here whose card does not say another."""


def adopt(
    file: Path,
    name: str,
    out: Path,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> Contents:
    """Writes the backbone of a released checkpoint as a bundle, and returns what went into it.

    Args:
        file: the checkpoint, as it was downloaded.
        name: a model of the zoo, whose card then says what the file must be and which encoder is taken; or, for what the
            zoo does not have, an architecture and a tag of one's own (`resnet50.vicreg_in1k`).
        out: the bundle's folder.
        license: id of the license of the weights. A model of the zoo has one already, anything else needs one.
        license_name: with the license `other`: a short name, such as `my-license-1.0`.
        license_link: with the license `other`: the address of its text.

    Raises:
        ValueError: there is no such model, the file is refused (`read_tensors`, `recognize`), it is another method's or
            architecture's than the name says, it does not hold the encoder that the card says, or as `write_bundle`.
    """
    model = _zoo_model(name, license)
    require_license(model.paper.license if model else license, license_name, license_link)
    contents = read_contents(file)
    released, said = recognize(contents.tensors, str(file)), statement(file, contents.rest)
    if released is None:
        raise not_a_resnet(contents.tensors, str(file))
    named = name.partition(".")[0]
    if released.architecture != named:
        raise ValueError(f"{file} holds a {released.architecture}, and {name} names a {named}")
    if said is not None and said.architecture != named:  # one of the same names and shapes
        raise ValueError(f"{file} is a {said.architecture}, as {said.where} says, and {name} names another")
    encoder, notes = _encoder(file, released, model)
    images = said.preprocessing if said and said.preprocessing and not model else None
    if images is None and model is None:
        notes = ["The file does not say how images were prepared; 224 pixels and ImageNet's mean and std are taken."]
    if model is not None:
        notes = [*notes, *_confirm(file, facts(contents.rest), model)]
    what = f"the {encoder} in {file}"
    notes = [*notes, *contents.notes]
    backbone = released.backbone(encoder)
    if half := sorted({str(t.dtype) for t in backbone.values() if t.dtype in (torch.float16, torch.bfloat16)}):
        stored = " and ".join(half).replace("torch.", "")
        notes.append(
            f"The file stores weights in {stored}; in float32, as they are written here, each is the same number."
        )
    # Copies: a view would take along, unseen, all of the larger tensor that it looks into.
    backbone = {
        key: (tensor.float() if str(tensor.dtype) in half else tensor).clone(memory_format=torch.contiguous_format)
        for key, tensor in backbone.items()
    }
    if other := sorted({str(t.dtype) for t in backbone.values() if t.is_floating_point()} - {"torch.float32"}):
        raise ValueError(
            f"{what} is stored in {', '.join(other).replace('torch.', '')}, and a bundle holds float32, into which it "
            "would have to be rounded: `clove-hub convert` writes it for timm as it is"
        )
    method = model.method if model else released.format
    weights = Contents(
        what=what,
        architecture=named,
        tensors=backbone,
        method=UNKNOWN if method in WRITTEN_BY_ANY_CODE else method,
        exported=model.exported if model else encoder,
        preprocessing=images or Preprocessing(model.input_size if model else SIZE),
        origin={
            "kind": "adopted",
            "name": name,
            "file": file.name,
            "sha256": sha256(file),
            "size": file.stat().st_size,
            "format": released.title,
            "encoder": encoder,
            "left_out": len(released.heads),
            "url": model.paper.code if model else None,
            "notes": notes,
        },
        license=model.paper.license if model else license,
        model=model,
        license_name=license_name,
        license_link=license_link,
    )
    write_bundle(weights, out)
    return weights


def _zoo_model(name: str, license: str | None) -> Model | None:
    """The model of the zoo; None for another name that comes with what it needs."""
    if name in models():
        model = find_model(name)
        if license not in (None, model.paper.license):
            raise ValueError(
                f"--license {license}: {model.paper.name} was released under {model.paper.license}, and that goes with "
                f"{name}; leave --license away"
            )
        return model
    if license is None:
        try:
            find_model(name)
        except ValueError as error:
            raise ValueError(
                f"{error}. Weights that the zoo does not have get a name of their own, such as resnet50.my_tag, and need "
                "--license with the license that they were released under"
            ) from error
    if not re.fullmatch(rf"({'|'.join(RESNETS)})\.[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(
            f"--as {name}: expected an architecture and a tag in small letters, such as resnet50.my_tag; architectures "
            f"that can be adopted are {', '.join(RESNETS)}"
        )
    return None


def _encoder(file: Path, released: Released, model: Model | None) -> tuple[Encoder, list[str]]:
    """Which encoder to take, and what is to be said about that."""
    if model is None:
        return released.exported, []
    wanted: Encoder = "teacher" if model.exported == "teacher" else "student"
    if model.method not in released.methods:
        raise ValueError(
            f"{file} is {'' if released.exported == 'backbone' else 'a checkpoint of '}{released.title}, and "
            f"{model.name} is a model of {model.paper.name}: give the file that its authors released ({model.paper.code})"
        )
    if released.exported == "backbone":
        if released.heads:
            raise ValueError(
                f"{file} is {released.title} with a classifier ({', '.join(released.heads)}), trained with labels or on "
                f"labels afterwards, and {model.name} is a model of {model.paper.name}"
            )
        return "backbone", [
            f"The file holds one backbone and does not say whose it is; that it is the {wanted}'s, the model's card says."
        ]
    if wanted not in released.encoders:
        raise ValueError(
            f"{file} holds no {wanted}, which {model.name} is by its card, only the {' and '.join(released.encoders)}"
        )
    if len(released.methods) > 1:
        others = " and ".join(papers()[method].name for method in released.methods)
        return wanted, [
            f"Files of {others} have the same names; which of them it is, the model's card says: {model.paper.name}."
        ]
    return wanted, []


def _confirm(file: Path, told: Mapping[str, Any], model: Model) -> list[str]:
    """What a file says of its training agrees with the model's card, or says nothing.

    Returns:
        A sentence on what it does not say.

    Raises:
        ValueError: it says something else. The message names both values.
    """
    dataset = str(told.get("dataset", ""))
    named = [known for known in data().values() if dataset and dataset.lower() in known.name.lower()]
    checks = {
        # What is compared, what the file says, what the card says, and whether that is the same. Some count from 0.
        "epoch": (told.get("epoch"), model.epochs, told.get("epoch") in (model.epochs, model.epochs - 1)),
        "epochs": (told.get("epochs"), model.epochs, told.get("epochs") == model.epochs),
        "images": (told.get("images"), model.data.images, told.get("images") == model.data.images),
        "data set": (dataset if named else None, model.data.name, model.data in named),
    }
    for what, (found, wanted, same) in checks.items():
        if found is not None and not same:
            raise ValueError(
                f"{file} says {what} {found}, and {model.name} has {what} {wanted} by its card: give the file of that "
                "model, or a name of your own with --license"
            )
    silent = [what for what in ("epoch", "data set") if checks[what][0] is None]
    return [f"The file does not say its {' and '.join(silent)}; the model's card does."] if silent else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=user_path, metavar="FILE", help="the checkpoint, as it was downloaded")
    named = "a model of the zoo (`clove-hub models`), or architecture.tag for what the zoo does not have"
    parser.add_argument("--as", dest="name", required=True, metavar="MODEL", help=named)
    parser.add_argument("--out", type=user_path, help="the bundle's folder (default: where timm's tags look for it)")
    add_license_arguments(parser, "of the weights, as the Hub spells it; only for what the zoo does not have")


def run(options: argparse.Namespace) -> int:
    out = options.out or adopted(options.name)
    license = options.license, options.license_name, options.license_link
    weights = adopt(options.file, options.name, out, *license)
    print(
        f"{out}: {options.name}, {weights.what}, by its names {weights.origin['format']}. "
        f"{weights.origin['left_out']} other tensors were left out. timm loaded it back, bit for bit.\n"
        f"{WEIGHTS} has sha256 {sha256(out / WEIGHTS)}"
    )
    for note in weights.origin["notes"]:
        print(note)
    tagged = weights.model is not None and options.out is None
    model, imports = (options.name, "clove_hub, timm") if tagged else (f"local-dir:{out}", "timm")
    print(
        f"\n    import {imports}\n\n    model = timm.create_model({model!r}, pretrained=True)  # (B, 3, H, W) -> (B, C)\n"
    )
    return 0


ADOPT = Command("Turn a checkpoint that a paper's authors released into a bundle that timm loads.", add_arguments, run)
