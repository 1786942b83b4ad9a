"""`clove-hub adopt`: turn a released checkpoint into a bundle, with only what is known about it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from clove_hub.command import Command, user_path
from clove_hub.global_state import kept_generators
from clove_hub.runs import sha256 as sum_of
from clove_hub.weights.download import download, is_address, shown
from clove_hub.weights.files import WRITTEN_BY_ANY_CODE, statement
from clove_hub.weights.weights import Preprocessing
from clove_hub.zoo.facts import facts
from clove_hub.zoo.models import Model, find_model, models, released_as
from clove_hub.zoo.places import adopted
from clove_hub.zoo.released import recognize
from clove_hub.zoo.resnets import RESNETS, not_a_resnet
from clove_hub.zoo.tensors import read_contents

from .bundle import write_bundle
from .card import UNKNOWN
from .card_files import WEIGHTS
from .confirm import match, only_match
from .contents import Contents
from .license import add_license_arguments, require_license

SIZE = 224
"""Side in pixels of the views of every released file known here whose card does not say another."""


@kept_generators()
def adopt(
    source: str | Path,
    name: str | None = None,
    out: Path | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    sha256: str | None = None,
) -> Contents:
    """Write the backbone of a released checkpoint as a bundle; return its weights.

    Args:
        source: the checkpoint as downloaded, or its URL (see `download`).
        name: a model of the zoo, whose card defines what the file must be and which encoder is taken; or, for a file
            that is not in the zoo, an architecture and a tag of your own (`resnet50.vicreg_in1k`). None for the one
            model of the zoo that the file can be, if the file itself confirms that.
        out: the bundle's folder; None for the one where timm's tags look for it.
        license: id of the license of the weights. A model of the zoo already has one; anything else needs one.
        license_name: with the license `other`: a short name, such as `my-license-1.0`.
        license_link: with the license `other`: the URL of its text.
        sha256: the SHA-256 that the file must have.

    Raises:
        ValueError: there is no such model, the file is refused (`read_tensors`, `recognize`), it is of another method
            or architecture than the name, it contradicts the card about its training, it does not hold the card's
            encoder, no name was given and the file does not determine it, its checksum differs, or as `write_bundle`.
        OSError: as `download`.

    Examples:
        >>> import clove_hub, torch
        >>> from clove_hub.weights import load
        >>> torch.save(load("random:resnet18").tensors, folder / "ckpt.pth")
        >>> weights = clove_hub.adopt(folder / "ckpt.pth", "resnet18.my_tag", folder / "adopted", license="mit")
        >>> weights.architecture, weights.exported
        ('resnet18', 'backbone')
    """
    if sha256 is not None and not re.fullmatch(r"[0-9A-Fa-f]{64}", sha256):
        raise ValueError(f"--sha256 {sha256}: expected 64 hexadecimal digits")
    if name is None and license is not None:
        raise ValueError("--license needs --as with a name of your own, such as --as resnet50.my_tag")
    model = _zoo_model(name, license) if name is not None else None
    if name is not None:
        require_license(model.paper.license if model else license, license_name, license_link)
    address = source if isinstance(source, str) and is_address(source) else None
    file = download(address, sha256) if address else Path(source)
    contents = read_contents(file)
    released, said, digest = recognize(contents.tensors, str(file)), statement(file, contents.rest), sum_of(file)
    if sha256 is not None and sha256.lower() != digest:
        raise ValueError(
            f"{file} has sha256 {digest}, expected {sha256}: it is another file or was damaged in transit; download it again"
        )
    if released is None:
        raise not_a_resnet(contents.tensors, str(file))
    told, known = facts(contents.rest), released_as(digest)
    if known and name not in (None, known.name):
        raise ValueError(
            f"{file} has the sha256 of the released file of {known.name}, but --as names {name}: give --as {known.name}"
        )
    if name is None:
        typed = address if address and shown(address) == address else str(file)  # what was left out cannot be typed
        model = known or only_match(str(file), typed, released, told)
        name = model.name
    named = name.partition(".")[0]
    if released.architecture != named:
        raise ValueError(
            f"{file} holds a {released.architecture}, but {name} names a {named}: give --as {released.architecture}.TAG"
        )
    if said is not None and said.architecture != named:  # one of the same names and shapes
        raise ValueError(
            f"{file} is a {said.architecture}, as {said.where} says, but {name} names a {named}: give the file of a {named}"
        )
    encoder, notes = released.exported, list[str]()
    if model is not None:
        found = match(str(file), released, told, model, known=model is known)
        encoder, notes = found.encoder, list(found.notes)
    images = said.preprocessing if said and said.preprocessing and not model else None
    if images is None and model is None:
        notes = [
            "The file does not say how its training images were preprocessed; 224 pixels and ImageNet's mean and standard "
            "deviation are assumed."
        ]
    what = f"the {encoder} in {file}"
    notes += contents.notes
    backbone = released.backbone(encoder)
    if half := sorted({str(t.dtype) for t in backbone.values() if t.dtype in (torch.float16, torch.bfloat16)}):
        stored = " and ".join(half).replace("torch.", "")
        notes.append(
            f"The file stores the weights in {stored}; here they are in float32, which represents each value exactly."
        )
    # Copies: a view would take along, unseen, all of the larger tensor that it looks into.
    backbone = {
        key: (tensor.float() if str(tensor.dtype) in half else tensor).clone(memory_format=torch.contiguous_format)
        for key, tensor in backbone.items()
    }
    if other := sorted({str(t.dtype) for t in backbone.values() if t.is_floating_point()} - {"torch.float32"}):
        raise ValueError(
            f"{what} is stored in {', '.join(other).replace('torch.', '')}, but a bundle holds float32, to which it "
            f"would have to be rounded: `clove-hub convert {file} --to timm --out OUT.safetensors` keeps its values"
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
            "sha256": digest,
            "size": file.stat().st_size,
            "format": released.title,
            "encoder": encoder,
            "left_out": len(released.heads),
            "url": model.paper.code if model else address and shown(address),
            "fetched_from": address and shown(address),
            "notes": notes,
        },
        license=model.paper.license if model else license,
        model=model,
        license_name=license_name,
        license_link=license_link,
    )
    write_bundle(weights, out or adopted(name))
    return weights


def _zoo_model(name: str, license: str | None) -> Model | None:
    """The model of the zoo; None for another name that comes with what it needs."""
    if name in models():
        model = find_model(name)
        if license not in (None, model.paper.license):
            raise ValueError(
                f"--license {license}: {name} is a model of {model.paper.name}, which was released under "
                f"{model.paper.license}; leave --license out"
            )
        return model
    if license is None:
        try:
            find_model(name)
        except ValueError as error:
            raise ValueError(
                f"{error}. Weights that are not in the zoo need a name of your own, such as resnet50.my_tag, and --license "
                "with the license that they were released under"
            ) from error
    if not re.fullmatch(rf"({'|'.join(RESNETS)})\.[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(
            f"--as {name}: expected an architecture and a tag in lowercase letters, such as resnet50.my_tag; architectures "
            f"that can be adopted are {', '.join(RESNETS)}"
        )
    return None


def source(text: str) -> str | Path:
    """A path or a URL, as typed."""
    return text if is_address(text) else user_path(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "An address is fetched into ~/.cache/clove-hub/downloads; the same command goes on with a download that was cut.\n"
        "Files on Google Drive need gdown: pip install 'clove-hub[drive]'.\n"
        "`clove-hub models` says where the authors keep the weights of the zoo's models."
    )
    where = "the checkpoint, as it was downloaded, or its https:// address"
    parser.add_argument("source", type=source, metavar="FILE_OR_URL", help=where)
    named = (
        "a model of the zoo (`clove-hub models`), or architecture.tag for a file that is not in the zoo (default: "
        "the model that the file records)"
    )
    parser.add_argument("--as", dest="name", metavar="MODEL", help=named)
    parser.add_argument("--out", type=user_path, help="the bundle's folder (default: where timm's tags look for it)")
    add_license_arguments(
        parser, "license of the weights, by its id on the Hub; only for a file that is not in the zoo"
    )
    parser.add_argument("--sha256", help="the SHA-256 that the file must have")


def run(options: argparse.Namespace) -> int:
    license = options.license, options.license_name, options.license_link
    weights = adopt(options.source, options.name, options.out, *license, options.sha256)
    name = weights.origin["name"]
    out = options.out or adopted(name)
    left = f"{count} other tensors were left out. " if (count := weights.origin["left_out"]) else ""
    print(
        f"{out}: {name}, {weights.what}, recognized by its tensor names as {weights.origin['format']}. "
        f"{left}timm loaded it back, bit for bit.\n"
        f"{WEIGHTS} has sha256 {sum_of(out / WEIGHTS)}"
    )
    for note in weights.origin["notes"]:
        print(note)
    tagged = weights.model is not None and options.out is None
    model, imports = (name, "clove_hub, timm") if tagged else (f"local-dir:{out}", "timm")
    print(
        f"\n    import {imports}\n\n    model = timm.create_model({model!r}, pretrained=True)  # (B, 3, H, W) -> (B, C)\n"
    )
    return 0


ADOPT = Command("Turn a checkpoint that a paper's authors released into a bundle that timm loads.", add_arguments, run)
