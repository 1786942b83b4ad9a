"""Changes that others made to a repository before a publication, and how they are handled.

Their files are never replaced silently: they are shown first, and `--take-over COMMIT` agrees to what was shown for
that commit only. An edited card keeps its edits: they are merged with the new card, as in git.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher, unified_diff
from fnmatch import fnmatch
from typing import Any

from clove_hub.runs import STATE_FILE
from clove_hub.weights.bundle import PROVENANCE

from .card_files import CARD, json_bytes
from .hub import SAME_MODEL, Artifact, File, Remote, Repository, differences
from .metadata import check_metadata

MADE_BY_THE_HUB = {".gitattributes"}
"""The files of a newly created repository."""
RENDERED = "card_rendered"
"""Key in `Artifact.told_in` if the card has edits of others: the card without them, the base of the next merge."""
TEXTS, LARGEST_TEXT, LONGEST_DIFF = (".md", ".json", ".txt", ".yaml"), 1 << 18, 400
BESIDE = {
    "which programs without safetensors load instead of these weights": (
        "*.bin *.pt *.pth *.ckpt *.pkl *.h5 *.msgpack *.safetensors *.index.json"
    ),
    "which makes the client leave files out of a commit": ".gitignore",
}
"""Files that do harm beside the published ones: the harm, and the patterns of their names."""


@dataclass(frozen=True)
class Meeting:
    """What is published, considering the changes of others."""

    artifact: Artifact
    fates: Mapping[str, str] = field(default_factory=dict)
    """How files that others added or changed are handled, by name."""
    shown: tuple[str, ...] = ()
    """The changes of those files, as lines of text."""
    refusal: str = ""
    """Why this needs another option, and which one; empty if it does not."""


def meet(repository: Repository, remote: Remote, artifact: Artifact, take_over: str | None, keep_card: bool) -> Meeting:
    """Find the changes of others in the files that an artifact would replace.

    Args:
        take_over: the commit, or its first digits, in which files of others may be replaced.
        keep_card: keep a card that others wrote or edited.

    Raises:
        ValueError: the repository holds another model, or another kind of publication by clove-hub.
    """
    if not remote.files.keys() - MADE_BY_THE_HUB:
        return Meeting(artifact)
    name, head = repository.name, remote.head
    assert head is not None
    if artifact.told_in not in remote.files and (other := {PROVENANCE, STATE_FILE} & remote.files.keys()):
        raise ValueError(
            f"{name} holds another kind of publication by clove-hub ({', '.join(other)}, no {artifact.told_in}): give another "
            "--repo, which is created if it does not exist"
        )
    changed = {file for file, how in differences(artifact, remote.files).items() if how == "changed"}
    told = _told(repository, remote, artifact) if changed or artifact.told_in not in remote.files else {}
    if told:
        _require_same_model(name, told, artifact)
    foreign = artifact.told_in not in remote.files or (not told and artifact.told_in in changed)
    theirs = changed if foreign else _changed_by_others(repository, remote, told, changed - {artifact.told_in, CARD})
    agreed = take_over is not None and len(take_over) >= 7 and head.startswith(take_over)
    fates, shown = {}, []
    for file in sorted(theirs - {CARD}):
        fates[file] = "replaces theirs"
        shown += _difference(file, repository, remote, artifact.files[file])

    stuck = ""
    if CARD in changed:
        ours, edited = artifact.files[CARD].read().decode(), _text(repository.read(CARD, head))
        before = None if foreign else _card_before(repository, remote, told, edited)
        if edited != before:
            merged, stuck = (None, "") if before is None else _merged_card(before, edited, ours, artifact)
            if keep_card or merged is not None:
                card = edited if keep_card else merged
                assert card is not None
                artifact = with_card(artifact, card.encode(), ours)
                fates[CARD] = "theirs, as it is" if keep_card else "ours, with their edits"
                if before is not None:
                    shown += _diff(f"{CARD}: the edits of others, which are kept", before, edited)
            else:
                fates[CARD] = "replaces theirs"
                shown += _diff(f"{CARD}: the version of others, and what replaces it", edited, ours)
    lost = sorted(file for file, fate in fates.items() if fate == "replaces theirs")
    refusal = ""
    if (lost or foreign) and not agreed:
        refusal = _refusal(name, head, remote, lost, foreign, stuck, take_over)
    return Meeting(artifact, fates, tuple(shown), refusal)


def beside(artifact: Artifact, remote: Remote | None) -> dict[str, str]:
    """Harmful files that remain beside the published ones: the harm by name."""
    return {
        file: harm
        for file in sorted((remote.files if remote else {}).keys() - artifact.files.keys())
        for harm, patterns in BESIDE.items()
        if any(fnmatch(file, pattern) for pattern in patterns.split())
    }


def merge(before: str, theirs: str, ours: str) -> str | None:
    """Merge both changes of a text, line by line; None if they conflict."""
    lines = [text.splitlines() for text in (before, theirs, ours)]

    def hunks(new: list[str]) -> list[tuple[int, int, tuple[str, ...]]]:
        changes = SequenceMatcher(None, lines[0], new, autojunk=False).get_opcodes()
        return [(start, end, tuple(new[a:b])) for kind, start, end, a, b in changes if kind != "equal"]

    left, right = hunks(lines[1]), hunks(lines[2])
    if any(a != b and a[0] <= b[1] and b[0] <= a[1] for a in left for b in right):
        return None
    merged, at = [], 0
    for start, end, new in sorted({*left, *right}):
        merged += [*lines[0][at:start], *new]
        at = end
    return "\n".join([*merged, *lines[0][at:]]) + "\n"


def with_card(artifact: Artifact, card: bytes, rendered: str) -> Artifact:
    """The artifact with another card; `told_in` gets its checksum and the rendered card, for the next merge."""
    files = {**artifact.files, CARD: File(card)}
    if card != rendered.encode():
        told = json.loads(artifact.files[artifact.told_in].read())
        if CARD in told.get("sha256", {}):
            told["sha256"][CARD] = hashlib.sha256(card).hexdigest()
        told[RENDERED] = rendered
        files[artifact.told_in] = File(json_bytes(told))
    return replace(artifact, files=files)


def _told(repository: Repository, remote: Remote, artifact: Artifact) -> dict[str, Any]:
    """The repository's metadata; empty if it was not written by clove-hub."""
    if artifact.told_in not in remote.files:
        return {}
    assert remote.head is not None
    try:
        told = json.loads(repository.read(artifact.told_in, remote.head))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return {}
    return told if isinstance(told, dict) and {"method", "backbone"} <= told.keys() else {}


def _require_same_model(name: str, told: Mapping[str, Any], artifact: Artifact) -> None:
    """Raise ValueError unless the repository holds another version of the same model."""
    found = {key: told.get(key) for key in SAME_MODEL}
    unknown = None in (found["model"], artifact.model["model"])  # a zoo entry, or None
    if any(found[key] != artifact.model[key] for key in SAME_MODEL if not (key == "model" and unknown)):
        theirs, ours = (
            ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
            for facts in (found, artifact.model)
        )
        raise ValueError(f"{name} holds another model ({theirs}), but this is {ours}: give another --repo")


def _sums(told: Mapping[str, Any]) -> dict[str, str]:
    return {
        file: sum for key in ("sha256", "files") if isinstance(told.get(key), dict) for file, sum in told[key].items()
    }


def _changed_by_others(repository: Repository, remote: Remote, told: Mapping[str, Any], files: set[str]) -> set[str]:
    """The files that differ from those published with the repository's metadata."""
    assert remote.head is not None
    published = _sums(told)
    found = {}
    for file in files:
        large = len(remote.files[file]) == 64  # sha256 for large files; git's hash for small ones
        found[file] = remote.files[file] if large else _sum(repository.read(file, remote.head))
    return {file for file in files if found[file] != published.get(file)}


def _card_before(repository: Repository, remote: Remote, told: Mapping[str, Any], now: str) -> str | None:
    """The card as published, before others edited it; None if unknown."""
    if isinstance(told.get(RENDERED), str):
        return str(told[RENDERED])
    published = _sums(told).get(CARD)
    if published == _sum(now.encode()):
        return now
    versions = {
        tuple(map(int, tag[1:].split("."))): tag for tag in remote.tags if re.fullmatch(r"v\d+(\.\d+){1,2}", tag)
    }
    for _, tag in sorted(versions.items(), reverse=True):
        if CARD in repository.files(remote.tags[tag]):
            card = repository.read(CARD, remote.tags[tag])
            if published in (None, _sum(card)):  # a published state has no checksum of its card
                return _text(card)
    return None


def _merged_card(before: str, theirs: str, ours: str, artifact: Artifact) -> tuple[str | None, str]:
    """The merged card, or None and the reason."""
    merged = merge(before, theirs, ours)
    if merged is None:
        return None, "it was edited in lines that the new card also changes"
    try:
        if artifact.library:
            check_metadata(merged, artifact.library)
    except ValueError as error:
        return None, f"with its edits it would not be valid on the Hub ({error})"
    return merged, ""


def _refusal(
    name: str, head: str, remote: Remote, lost: list[str], foreign: bool, stuck: str, take_over: str | None
) -> str:
    some = sorted(remote.files.keys() - MADE_BY_THE_HUB)
    what = f"{name} holds files of others ({', '.join(some[:4])}{', ...' if len(some) > 4 else ''})"
    if not foreign:
        what = f"others changed {', '.join(lost)} of {name} after it was published"
    moved = f"main is not at --take-over {take_over}. " if take_over else ""
    keep = ", or --keep-card to keep their card" if CARD in lost and not foreign else ""
    if keep and lost != [CARD]:
        keep = ""
    return (
        f"{moved}{what}"
        + (f"; the card cannot be merged: {stuck}" if stuck else "")
        + ". The changes are shown above. To accept them, add "
        + f"--take-over {head[:12]}{keep}"
        + ("; add --keep-card as well to keep their card" if CARD in lost and not keep else "")
        + ("; or give another --repo, which is created if it does not exist" if foreign else "")
    )


def _difference(file: str, repository: Repository, remote: Remote, ours: File) -> list[str]:
    """The diff of a text file; empty for large files and other types."""
    large = len(remote.files[file]) == 64
    if large or not file.endswith(TEXTS) or ours.size > LARGEST_TEXT:
        return []
    assert remote.head is not None
    return _diff(
        f"{file}: the version of others, and what replaces it",
        _text(repository.read(file, remote.head)),
        _text(ours.read()),
    )


def _diff(title: str, old: str, new: str) -> list[str]:
    lines = list(unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1))[2:]
    more = [f"... {len(lines) - LONGEST_DIFF} more lines"] if len(lines) > LONGEST_DIFF else []
    return [f"  {title}", *(f"    {line}" for line in [*lines[:LONGEST_DIFF], *more])]


def _text(content: bytes) -> str:
    """Decode text with normalized line endings; the Hub's editor may have written others."""
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
