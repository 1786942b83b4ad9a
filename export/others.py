"""What other hands have put into a repository: on the website, with timm's `push_to_hf_hub`, by editing a card.

Nothing of theirs is replaced or removed unseen. A publication that would do so shows the difference and asks for a word:
`--take-over` replaces and removes (git keeps what was there), `--keep-card` leaves README.md as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from clove_hub.runs import STATE_FILE
from clove_hub.weights.bundle import PROVENANCE

from .card_files import CARD, json_bytes
from .hub import SAME_MODEL, Artifact, File, Remote, Repository, differences
from .metadata import check_metadata

BESIDE = {".gitattributes", ".gitignore", "LICENSE", "LICENSE.txt", "LICENSE.md"}
"""What may be there without a word: the Hub makes the first, and its form for a new repository offers a license."""
KEPT = "card_kept"
"""The key that says in the published JSON file that the card is somebody else's."""
READABLE = 64 << 10
"""Bytes of a file of which a difference is shown."""
LINES = 40
"""Of a difference."""
SHA256 = 64
"""Characters of one, which the Hub tells of large files; of others it tells what git calls them, 40 characters."""


def of_others(repository: Repository, remote: Remote, artifact: Artifact) -> dict[str, str]:
    """The files that publishing would replace or remove although clove-hub has not written them, and what would change.

    Returns:
        By name a unified difference, from what clove-hub wrote to what is there or, where that is not known, from what is
        there to what would be; or a sentence.

    Raises:
        ValueError: the repository holds another model of clove-hub, or cannot be read.
    """
    foreign = remote.files.keys() - BESIDE
    if not foreign:
        return {}
    assert remote.head is not None
    if other := (foreign & {PROVENANCE, STATE_FILE}) - {artifact.told_in}:
        raise ValueError(
            f"{repository.name} holds something else ({', '.join(other)}) and this has {artifact.told_in}: bundle and state "
            "do not share a repository, publish to another one"
        )
    told = _told(repository, remote, artifact)
    if told is not None:
        _require_same_model(repository.name, told, artifact)
    sums = {**told.get("files", {}), **told.get("sha256", {})} if told else {}  # a run's state has both
    if told and told.get(KEPT):
        sums.pop(CARD, None)
    found = {} if told else dict.fromkeys(foreign - artifact.files.keys(), "stays")
    for name, how in differences(artifact, remote.files).items():
        if how == "new" or (name == artifact.told_in and told):
            continue
        if how == "removed":
            found[name] = "would be removed: weights that other programs may take instead of model.safetensors"
            continue
        there, content = remote.files[name], None
        if len(there) != SHA256:  # of a small file the Hub tells no sum
            content = repository.read(name, remote.head)
            there = hashlib.sha256(content).hexdigest()
        if there == sums.get(name):
            continue
        if content is None or max(len(content), artifact.files[name].size) > READABLE:
            ours = artifact.files[name]
            found[name] = f"would be replaced by {ours.size:,} bytes with sha256 {ours.sha256[:12]}..."
            continue
        written = (repository.read(name, commit) for commit in remote.tags.values() if name in sums)
        before = next((one for one in written if hashlib.sha256(one).hexdigest() == sums[name]), None)
        if before is not None:
            found[name] = _difference((f"{name} (as published)", before), (f"{name} (on the Hub)", content))
        else:
            after = artifact.files[name].read()
            found[name] = _difference((f"{name} (on the Hub)", content), (f"{name} (to be published)", after))
    return found


def ask(name: str, found: Mapping[str, str]) -> str:
    """What to type where something of others would be replaced."""
    card = "; --keep-card leaves README.md as it is" if CARD in found else ""
    return (
        f"{name} holds what clove-hub has not written: {', '.join(sorted(found))}. --take-over publishes there all the same, "
        f"as shown above (the repository's history keeps what was there){card}; or publish to another repository"
    )


def keep_card(repository: Repository, remote: Remote | None, artifact: Artifact) -> Artifact:
    """The same with the repository's own card, of which the JSON file then has the sum.

    Raises:
        ValueError: there is none, or it is nothing for the Hub.
    """
    if remote is None or remote.head is None or CARD not in remote.files:
        raise ValueError(f"--keep-card: {repository.name} has no {CARD} to keep")
    content = repository.read(CARD, remote.head)
    try:
        check_metadata(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"--keep-card: {CARD} of {repository.name} cannot stay as it is: {error}") from error
    told = json.loads(artifact.files[artifact.told_in].read())
    told["sha256"] = {**told.get("sha256", {}), CARD: hashlib.sha256(content).hexdigest()}
    told[KEPT] = True
    files = {**artifact.files, CARD: File(content), artifact.told_in: File(json_bytes(told))}
    return dataclasses.replace(artifact, files=files)


def _told(repository: Repository, remote: Remote, artifact: Artifact) -> dict[str, Any] | None:
    """What the repository's own JSON file says; None if there is none, or it says nothing."""
    if artifact.told_in not in remote.files:
        return None
    assert remote.head is not None
    try:
        told = json.loads(repository.read(artifact.told_in, remote.head))
    except (ValueError, RecursionError):
        return None
    sums = ("sha256", "files")
    return told if isinstance(told, dict) and all(isinstance(told.get(key, {}), dict) for key in sums) else None


def _require_same_model(name: str, told: Mapping[str, Any], artifact: Artifact) -> None:
    found = {key: told.get(key) for key in SAME_MODEL}
    unknown = None in (found["model"], artifact.model["model"])  # an entry of the zoo, or none of them
    if any(found[key] != artifact.model[key] for key in SAME_MODEL if not (key == "model" and unknown)):
        theirs, ours = (
            ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
            for facts in (found, artifact.model)
        )
        raise ValueError(f"{name} holds another model ({theirs}), this is {ours}: publish to another repository")


def _difference(before: tuple[str, bytes], after: tuple[str, bytes]) -> str:
    """Of two texts with their names."""
    (name, old), (new_name, new) = before, after
    one, other = (content.decode("utf-8", "backslashreplace").splitlines() for content in (old, new))
    lines = list(difflib.unified_diff(one, other, name, new_name, n=1, lineterm=""))
    more = [f"... and {len(lines) - LINES} more lines"] if len(lines) > LINES else []
    return "\n".join([*lines[:LINES], *more])
