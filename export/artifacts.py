"""What can be published: a bundle, or the full state of a pre-training run. `finetuned.py` adds fine-tuned models."""

from __future__ import annotations

import json
from pathlib import Path

from clove_hub.runs import STATE_FILE
from clove_hub.weights import load
from clove_hub.weights.bundle import PROVENANCE
from clove_hub.weights.run import find_checkpoint, is_run

from .bundle import check_bundle, without_folders
from .card import Published
from .card_files import CARD, published_files
from .hub import SAME_MODEL, Artifact, File
from .license import require_license
from .state_card import render_state_card


def bundle_artifact(folder: Path, at: Published) -> Artifact:
    """A bundle that has passed `check_bundle`, with its card for the Hub.

    Raises:
        ValueError: it is not a bundle, fails `check_bundle`, or its card names no license or is not valid on the Hub.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not the folder of a bundle; `clove-hub export RUN` makes one")
    if is_run(folder):
        raise ValueError(
            f"{folder} is a run: publish the bundle that `clove-hub export {folder}` makes, or the run's full state "
            "with --state"
        )
    check_bundle(folder)
    rendered = published_files(folder, at)
    told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    return Artifact(
        what=f"the bundle {folder}",
        files={name: File(rendered.get(name, folder / name)) for name in sorted({*told["sha256"], PROVENANCE})},
        told_in=PROVENANCE,
        model={key: told.get(key) for key in SAME_MODEL},
        library="timm",
    )


def state_artifact(
    run: Path, at: Published, license: str | None, license_name: str | None, license_link: str | None
) -> Artifact:
    """The newest complete checkpoint of a run, with a card, and without the names of the machine's folders.

    Args:
        license: license of the weights, as in `require_license`.

    Raises:
        ValueError: no license was given or it is invalid, or as `find_checkpoint`.
    """
    if license is None:
        raise ValueError(
            "--state needs --license (mit, apache-2.0, cc-by-nc-4.0, ...): nobody may use weights without a license"
        )
    require_license(license, license_name, license_link)
    found = find_checkpoint(run)
    load(found.folder)  # a state that fails here would have no usable backbone
    raw = json.loads((found.folder / STATE_FILE).read_text(encoding="utf-8"))
    state = (json.dumps(without_folders(raw), indent=1, ensure_ascii=False) + "\n").encode()
    files = {name: File(found.folder / name) for name in found.files}
    terms = {"license": license, "license_name": license_name, "license_link": license_link}
    card = render_state_card(found, {name: file.sha256 for name, file in files.items()}, terms, at)
    return Artifact(
        what=f"the state in {found.folder}",
        files=dict(sorted((files | {STATE_FILE: File(state), CARD: File(card.encode())}).items())),
        told_in=STATE_FILE,
        model={key: raw.get(key) for key in SAME_MODEL},
    )
