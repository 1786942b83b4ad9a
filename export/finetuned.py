"""A fine-tuned model for others: `clove-hub export` makes it from a fine-tuning run, `publish` checks it.

Its format and reading are in `clove_hub.weights.finetuned`. The check uses the library's public functions, as a user
would.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import clove_hub
from clove_hub.evaluation.collected import collect, find
from clove_hub.runs import sha256
from clove_hub.weights.bundle import CONFIG, PROVENANCE, require_sums
from clove_hub.weights.finetuned import read_finetuned
from clove_hub.weights.weights import restriction
from clove_hub.zoo.checks import counted
from clove_hub.zoo.tensors import read_tensors

from .bundle import DOWNLOADED, FILES, FORMAT, beside, different, log, require_replaceable, without_folders
from .card import Published
from .card_files import CARD, WEIGHTS, json_bytes, no_card
from .card_finetuned import render_finetuned_card
from .hub import SAME_MODEL, Artifact, File
from .license import require_license
from .metadata import check_metadata
from .results import entry

RESULTS = "results.json"


def export_finetuned(
    run: Path,
    out: Path,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> None:
    """Writes the fine-tuned model of a run to the folder `out`, with its card, after it has passed `check_finetuned`.

    Raises:
        ValueError: the run is not finished, the license is no id of the Hub, `out` holds something else or cannot be
            written, or as `check_finetuned`.
    """
    require_license(license, license_name, license_link)
    require_replaceable(out)
    stored = read_finetuned(run)
    if not (run / RESULTS).is_file():
        raise ValueError(
            f"{run} has no {RESULTS}: the fine-tuning has not finished; run the command that started it again"
        )
    (row,) = collect(find([run / RESULTS]))
    base = stored.pretrained
    if (words := restriction(base.get("license"))) and license not in (None, base.get("license")):
        log.warning(
            "%s started from %s, whose license %s %s: check that --license %s is allowed",
            *(stored.what, base.get("source"), base.get("license"), words, license),
        )
    config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    record = row.record
    facts: dict[str, Any] = {
        "format": FORMAT,
        "method": record.protocol,
        "exported": "the whole network",
        "backbone": stored.architecture,
        "model": None,
        "origin": without_folders(
            {
                "kind": "fine-tuned",
                "data": {"name": record.data.name, "fingerprint": record.data.fingerprint}
                | {"train_images": record.settings.get("train_images"), "test_images": record.data.samples},
                "settings": record.settings,
                "versions": dict(record.versions),
                "pretrained": dict(base),
            }
        ),
        "license": {"license": license, "license_name": license_name, "license_link": license_link},
        "results": [entry(row)],
        "export": {"clove-hub": version("clove-hub")},
    }
    with beside(out) as folder:
        shutil.copyfile(run / WEIGHTS, folder / WEIGHTS)
        (folder / CONFIG).write_bytes(json_bytes(without_folders(config)))
        facts["sha256"] = {name: sha256(folder / name) for name in (CONFIG, WEIGHTS)}
        for name, content in card_files(folder, facts).items():
            (folder / name).write_bytes(content)
        check_finetuned(folder)


def card_files(folder: Path, facts: Mapping[str, Any], at: Published | None = None) -> dict[str, bytes]:
    """The card and clove_hub.json, as of a bundle.

    Args:
        folder: has the other files.
        facts: what clove_hub.json says.
        at: where the card will be read.

    Raises:
        ValueError: clove_hub.json does not say what a card needs, or the card is nothing for the Hub.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        card = render_finetuned_card(facts, config, (folder / WEIGHTS).stat().st_size, at).encode()
        sums = {**facts["sha256"], CARD: hashlib.sha256(card).hexdigest()}
        return {CARD: card, PROVENANCE: json_bytes({**facts, "sha256": sums})}
    except (AttributeError, KeyError, TypeError) as error:  # clove_hub.json has no sum of itself
        raise no_card(folder, error) from error


def check_finetuned(folder: Path) -> None:
    """Verify the folder of an exported model.

    That is its files and their sums, and a strict load by `clove_hub.load_detector`, each tensor of which must equal the
    file's bit for bit.

    Raises:
        ValueError: naming the file or the tensors; or as `load_detector`.
    """
    found = {path.name for path in folder.iterdir()} - DOWNLOADED
    if unknown := sorted(found ^ set(FILES)):
        raise ValueError(
            f"{folder} is not an exported model: expected exactly {', '.join(FILES)}; missing or unexpected: "
            f"{', '.join(unknown)}"
        )
    what = f"the fine-tuned model {folder}"
    told = require_sums(folder, sorted(found - {PROVENANCE}), what)["sha256"]
    if other := sorted(told.keys() - found):
        raise ValueError(f"{folder} is not as exported: {', '.join(other)} of {PROVENANCE} is missing")
    detector = clove_hub.load_detector(folder, device="cpu")
    tensors, _ = read_tensors(folder / WEIGHTS)
    if names := different(detector.network.state_dict(), tensors):
        raise ValueError(f"{what}, once loaded, differs from its file in {counted('tensor', names)}")


def finetuned_artifact(folder: Path, at: Published) -> Artifact:
    """An exported model, after it has passed its self-check, with the card that it has on the Hub.

    Raises:
        ValueError: it fails `check_finetuned`, or its card names no license or is nothing for the Hub.
    """
    check_finetuned(folder)
    told = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    rendered = card_files(folder, told, at)
    check_metadata(rendered[CARD].decode(), "clove-hub")  # without a license, rendering leaves it unchecked
    return Artifact(
        what=f"the fine-tuned model {folder}",
        files={name: File(rendered.get(name, folder / name)) for name in sorted({*told["sha256"], PROVENANCE})},
        told_in=PROVENANCE,
        model={key: told.get(key) for key in SAME_MODEL},
        library="clove-hub",
    )
