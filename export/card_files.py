"""The two interdependent files of a bundle: the card, and clove_hub.json, which has the card's checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clove_hub.weights.architectures import architecture
from clove_hub.weights.bundle import CONFIG, PROVENANCE
from clove_hub.weights.bundle import WEIGHTS as WEIGHTS_FILES

from .card import Facts, Published, render_card
from .cost import cost
from .metadata import check_metadata

WEIGHTS, CARD = WEIGHTS_FILES[0], "README.md"


def published_files(bundle: Path, at: Published) -> dict[str, bytes]:
    """The card of a bundle and its clove_hub.json as they are in a repository on the Hub.

    The card's snippets load from there, and clove_hub.json has this card's checksum. Every other file is published
    unchanged.

    Args:
        bundle: a folder that passes `check_bundle`.

    Raises:
        ValueError: the card has no license or is not valid on the Hub, or clove_hub.json lacks what a card needs.
    """
    provenance = json.loads((bundle / PROVENANCE).read_text(encoding="utf-8"))
    config = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))
    rendered = card_files(bundle, provenance, config, at)
    check_metadata(rendered[CARD].decode())  # without a license, `render_card` leaves it unchecked
    return rendered


def card_files(
    folder: Path, provenance: Mapping[str, Any], config: Mapping[str, Any], at: Published | None = None
) -> dict[str, bytes]:
    """The card and clove_hub.json, the last two files of a bundle, from what the others and the provenance say.

    Args:
        folder: has the weights.
        at: where the card will be read, as in `render_card`.

    Raises:
        ValueError: the provenance lacks something, or as `render_card`.
    """
    name, side = config["architecture"], config["pretrained_cfg"]["input_size"][-1]
    args = config.get("model_args", {})
    known = architecture(name, args, str(folder / CONFIG))
    facts = Facts((folder / WEIGHTS).stat().st_size, known.parameters, cost(name, side, args))
    try:
        card = render_card(provenance, config, facts, at).encode()
        sums = {**provenance["sha256"], CARD: hashlib.sha256(card).hexdigest()}
        return {CARD: card, PROVENANCE: json_bytes({**provenance, "sha256": sums})}
    except (AttributeError, KeyError, TypeError) as error:  # clove_hub.json has no sum of itself
        raise no_card(folder, error) from error


def no_card(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder / PROVENANCE} does not say what a card is made of ({type(error).__name__}: {error}): export again"
    )


def json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
