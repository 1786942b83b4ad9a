"""Publishing into repositories that other hands have made or changed: nothing is replaced unseen, nothing refused for ever."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, Repository, refused, regular
from publish_worker import NAME, Worker, contents

from clove_hub.export.bundle import check_bundle
from clove_hub.export.read_back import PREFIX, clear_abandoned

pytest_plugins = ["publish_fixtures"]

WEBSITE = {
    ".gitattributes": regular(b"*.safetensors filter=lfs\n"),
    "README.md": regular(b"---\nlicense: mit\n---\n\n# my detector's backbone\n"),
    "LICENSE": regular(b"MIT License\n"),
}
"""What the form for a new repository makes, with a card written there."""
TIMM = """
import timm
model = timm.create_model("test_resnet", num_classes=7)
timm.models.push_to_hf_hub(model, {name!r}, private=True, safe_serialization="both")
"""


def changed(hub: LoopbackHub) -> list[str]:
    return [name for name in hub.requests if name.startswith(("POST repos", "POST commit", "POST tag", "PUT"))]


def test_a_repository_made_on_the_website_is_taken_over_with_a_word(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    hub.repositories[NAME] = Repository(private=True)
    hub.repositories[NAME].commit("initial commit", WEBSITE)

    shown = worker.publish(bundle, "--repo", NAME)
    assert shown.code == 0
    assert "README.md is not as clove-hub wrote it" in shown.printed
    assert "-# my detector's backbone" in shown.printed
    assert "--- README.md (on the Hub)" in shown.printed
    refusal = worker.publish(bundle, "--repo", NAME, "--yes")
    assert refusal.code == 2
    assert f"{NAME} holds what clove-hub has not written: README.md. --take-over" in refusal.printed
    assert changed(hub) == []

    assert worker.publish(bundle, "--repo", NAME, "--yes", "--take-over").code == 0
    repository = hub.repositories[NAME]
    assert repository.held == contents(bundle) | {"LICENSE": b"MIT License\n"}
    assert "Already published" in worker.publish(bundle, "--repo", NAME, "--yes").printed


def test_what_timm_pushed_is_replaced_and_its_pickle_removed(
    hub: LoopbackHub, worker: Worker, bundle: Path, tmp_path: Path
) -> None:
    environment = os.environ | hub.environment(tmp_path)
    subprocess.run([sys.executable, "-c", TIMM.format(name=NAME)], env=environment, check=True)
    repository = hub.repositories[NAME]
    assert {"pytorch_model.bin", "model.safetensors", "config.json", "README.md"} <= repository.files.keys()

    shown = worker.publish(bundle, "--repo", NAME).printed
    for name in ("README.md", "config.json", "model.safetensors"):
        assert f"{name} is not as clove-hub wrote it" in shown
    assert '-  "num_classes": 7' in shown
    assert "would be removed: weights that other programs may take" in shown
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 2
    assert worker.publish(bundle, "--repo", NAME, "--yes", "--take-over").code == 0
    assert repository.held == contents(bundle)
    worker.require_loads(bundle)


def test_files_of_something_else_stay_and_are_named_first(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.repositories[NAME] = Repository(private=False)
    hub.repositories[NAME].commit("initial commit", {"thesis.pdf": regular(b"years of work")})
    refusal = worker.publish(bundle, "--repo", NAME, "--yes")
    assert refusal.code == 2
    assert f"{NAME} holds what clove-hub has not written: thesis.pdf" in refusal.printed
    assert changed(hub) == []
    assert worker.publish(bundle, "--repo", NAME, "--yes", "--take-over").code == 0
    assert hub.repositories[NAME].held == contents(bundle) | {"thesis.pdf": b"years of work"}


def test_a_spoiled_record_is_replaced_with_a_word(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    repository = hub.repositories[NAME]
    repository.commit("nonsense", {**repository.files, "clove_hub.json": regular(b"[1, 2]")})
    arguments = ("--repo", NAME, "--yes", "--tag", "v1.0.1")
    refusal = worker.publish(bundle, *arguments).printed
    assert "has not written: README.md, clove_hub.json" in refusal  # nothing says whose the card is
    assert worker.publish(bundle, *arguments, "--take-over").code == 0
    assert repository.held == contents(bundle, "v1.0.1")


def edit(hub: LoopbackHub) -> bytes:
    """Somebody adds a line to the card on the website."""
    repository = hub.repositories[NAME]
    edited = repository.held["README.md"] + b"\nAsk us in the forum.\n"
    repository.commit("Update README.md", {**repository.files, "README.md": regular(edited)})
    return edited


def test_an_edited_card_is_shown_and_kept_or_replaced(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path, tmp_path: Path
) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    edited = edit(hub)
    arguments = (newer, "--repo", NAME, "--yes", "--tag", "v1.1.0")
    refusal = worker.publish(*arguments)
    assert refusal.code == 2
    assert "--- README.md (as published)" in refusal.printed
    assert "+Ask us in the forum." in refusal.printed  # and nothing of what the new version's card says otherwise
    assert "has not written: README.md. --take-over" in refusal.printed
    assert "--keep-card leaves README.md as it is" in refusal.printed

    assert worker.publish(*arguments, "--keep-card").code == 0
    repository = hub.repositories[NAME]
    assert repository.held["README.md"] == edited
    assert repository.held["model.safetensors"] == contents(newer)["model.safetensors"]
    for name, content in repository.held.items():
        (tmp_path / name).write_bytes(content)
    check_bundle(tmp_path)  # whoever downloads it finds the sum of the card that is there

    # It stays theirs: the next version asks again, although the sums fit.
    assert "has not written: README.md" in worker.publish(bundle, "--repo", NAME, "--yes", "--tag", "v1.2.0").printed
    assert worker.publish(bundle, "--repo", NAME, "--yes", "--tag", "v1.2.0", "--take-over").code == 0
    assert repository.held == contents(bundle, "v1.2.0")


def test_a_card_that_is_nothing_for_the_hub_is_not_kept(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    assert "has no README.md to keep" in worker.publish(bundle, "--repo", NAME, "--keep-card").printed
    worker.publish(bundle, "--repo", NAME, "--yes")
    repository = hub.repositories[NAME]
    repository.commit("Update README.md", {**repository.files, "README.md": regular(b"# no front matter\n")})
    reply = worker.publish(bundle, "--repo", NAME, "--keep-card", "--tag", "v1.1.0")
    assert reply.code == 2
    assert f"--keep-card: README.md of {NAME} cannot stay as it is" in reply.printed


@pytest.mark.parametrize("looks", [2, 50])
def test_a_tag_that_is_not_shown_yet_is_not_somebody_else(
    hub: LoopbackHub, worker: Worker, bundle: Path, looks: int
) -> None:
    answer, left = hub.answer, [looks]

    def late(method: str, path: str, *others: object) -> object:
        repository = hub.repositories.get(NAME)
        if path.endswith("/refs") and repository and repository.tags and left[0]:
            left[0] -= 1
            tags, repository.tags = repository.tags, {}
            found = answer(method, path, *others)
            repository.tags = tags
            return found
        return answer(method, path, *others)

    hub.answer = late
    try:
        reply = worker.publish(bundle, "--repo", NAME, "--yes")
    finally:
        del hub.answer
    if looks == 2:
        assert reply.code == 0, reply.printed
    else:
        assert f"the Hub accepted the tag v1.0.0 of {NAME} and does not show it yet: wait a minute" in reply.printed
        assert "Run the same command again" in reply.printed
        assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_once_more_when_it_says_when(
    hub: LoopbackHub, worker: Worker, bundle: Path, status: int
) -> None:
    answer, waiting = hub.answer, {"/api/whoami-v2", "/refs", "/tree/", "/tag/", "/settings"}

    def busy(method: str, path: str, *others: object) -> object:
        if not (asked := {part for part in waiting if part in path}):
            return answer(method, path, *others)
        waiting.difference_update(asked)
        refusal = refused(status, "come again")
        refusal.headers["Retry-After"] = "7"
        return refusal

    hub.answer = busy
    try:
        reply = worker.publish(bundle, "--repo", NAME, "--yes")
    finally:
        del hub.answer
    assert not waiting
    assert reply.code == 0, reply.printed
    assert reply.printed.count("the Hub asks to wait 7 seconds") == 4  # the client itself repeats listings


def test_a_commit_is_never_repeated(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    answer = hub.answer

    def busy(method: str, path: str, *others: object) -> object:
        if "/commit/" not in path:
            return answer(method, path, *others)
        refusal = refused(503, "come again")
        refusal.headers["Retry-After"] = "7"
        return refusal

    hub.answer = busy
    try:
        assert worker.publish(bundle, "--repo", NAME, "--yes").code == 2
    finally:
        del hub.answer
    assert hub.requests.count("POST commit") == 1


def test_a_refusal_of_the_storage_is_not_blamed_on_the_token(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    answer = hub.answer
    hub.answer = lambda method, path, *others: (
        refused(403, "Request has expired") if path.startswith("/upload/") else answer(method, path, *others)
    )
    try:
        reply = worker.publish(bundle, "--repo", NAME, "--yes")
    finally:
        del hub.answer
    assert reply.code == 2
    assert "the storage refused the address that the Hub had signed" in reply.printed
    assert "the token may not do this" not in reply.printed


def test_what_a_killed_read_back_left_is_removed_and_a_living_one_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, dead, other = (tmp_path / name for name in (f"{PREFIX}living", f"{PREFIX}dead", "other"))
    for folder in (living, dead, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert clear_abandoned() == [dead]
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "other"]


def test_the_record_of_a_kept_card_says_so(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    edit(hub)
    assert worker.publish(bundle, "--repo", NAME, "--yes", "--tag", "v1.1.0", "--keep-card").code == 0
    told = json.loads(hub.repositories[NAME].held["clove_hub.json"])
    assert told["card_kept"] is True
