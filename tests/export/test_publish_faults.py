"""A fault at every single request of a publication, one after the other: by LFS, and what differs with xet."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from loopback_hub import FAULTS, LoopbackHub, Repository, regular
from publish_worker import NAME, Worker, contents

pytest_plugins = ["publish_fixtures"]

ONCE = {"GET whoami-v2", "GET info", "GET refs", "POST repos create", "POST commit", "POST tag", "PUT settings"}
"""What the client itself asks for only once."""


def sums(bundle: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents(bundle).items()}


def applies(kind: str, request: str) -> bool:
    """Whether a fault of this kind makes a difference to such a request."""
    if kind == "429":  # others the client itself repeats
        return request in ONCE
    if kind == "412":
        return request.startswith(("POST", "PUT"))
    if kind == "truncated":
        return not request.startswith("HEAD") and request != "PUT upload"
    return kind != "flipped" or not request.startswith("HEAD")


def sweep(
    hub: LoopbackHub,
    worker: Worker,
    start: Mapping[str, Repository],
    uploads: Mapping[str, bytes],
    arguments: tuple[object, ...],
    kinds: tuple[str, ...],
    state: Callable[[], str],
    only: str = "",
) -> list[tuple[int, str, dict[str, str]]]:
    """Publishes with each fault at each request, and again without; `state` says what the Hub holds, or fails.

    Args:
        only: at requests with this in their name.

    Returns:
        For each request its number, its name and, by kind of fault, what came of it.
    """

    def begin(fault: tuple[int, str] | None) -> None:
        hub.repositories, hub.uploads = copy.deepcopy(dict(start)), dict(uploads)
        hub.forget(fault)

    begin(None)
    assert worker.publish(*arguments).code == 0
    requests = list(hub.requests)
    table = []
    for number, request in enumerate(requests, 1):
        if only not in request:
            continue
        outcomes = {}
        for kind in kinds:
            if not applies(kind, request):
                outcomes[kind] = "-"
                continue
            begin((number, kind))
            where = f"{kind} at request {number}, {request}"
            first = worker.publish(*arguments)
            left = state()
            assert first.code in (0, 2), f"{where}: {first.printed}"
            assert first.code == 2 or left == "new, public", where
            if first.code == 2:
                assert "error: " in first.printed, where
                assert "Traceback" not in first.printed.partition("error: ")[2], where
            hub.forget()
            second = worker.publish(*arguments)
            assert second.code == 0, f"{where}, the next run: {second.printed}"
            assert state() == "new, public", where
            outcomes[kind] = "done" if first.code == 0 else left
        table.append((number, request, outcomes))
    return table


def show(title: str, table: list[tuple[int, str, dict[str, str]]]) -> None:
    kinds = list(table[0][2])
    print(f"\n{title}: a fault at each request and what it left behind; the next run completed all of them")
    for kind in kinds:
        print(f"  {kind}: {FAULTS[kind]}")
    print("  done: the command succeeded all the same")
    print("".join((f"\n{'':>3} {'request':<30}", *(f"{kind:<14}" for kind in kinds))))
    for number, request, outcomes in table:
        print(f"{number:>3} {request:<30}" + "".join(f"{outcomes[kind]:<14}" for kind in kinds))


def state_of_new(hub: LoopbackHub, bundle: Path) -> str:
    """How far a repository has come that did not exist before; fails if it is in a state that nobody should see."""
    repository = hub.repositories.get(NAME)
    if repository is None:
        return "nothing"
    if not repository.private:
        assert repository.tags == {"v1.0.0": repository.main}, "public without having been proved"
    if repository.sums == {}:
        assert repository.private
        return "empty"
    assert repository.sums == sums(bundle), "half a commit"
    assert all(content in (None, contents(bundle)[name]) for name, content in repository.held.items()), "damaged"
    if not repository.private:
        return "new, public"
    return "new, tagged" if repository.tags else "new"


@pytest.mark.slow
def test_whatever_fails_a_new_repository_is_never_half_published_and_the_next_run_completes_it(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    arguments = (bundle, "--repo", NAME, "--yes")
    table = sweep(hub, worker, {}, {}, arguments, tuple(FAULTS), lambda: state_of_new(hub, bundle))
    show("a new repository", table)
    by_request = {request: outcomes for _, request, outcomes in table}
    assert by_request["POST commit"]["cut"] == "empty"
    assert by_request["POST commit"]["lost"] == "new"
    assert by_request.keys() >= ONCE
    for request, outcomes in by_request.items():
        assert outcomes["429"] == ("done" if request in ONCE else "-"), request
        assert outcomes["503"] == "done" or request == "POST validate-yaml", request
    assert by_request["PUT settings"]["lost"] == "new, public"
    assert by_request["PUT upload"]["flipped"] == "empty"
    assert by_request["GET resolve model.safetensors"]["flipped"] == "new"


@pytest.mark.slow
def test_whatever_fails_a_published_repository_holds_the_old_version_or_the_new_one(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path
) -> None:
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0
    start, uploads = copy.deepcopy(hub.repositories), dict(hub.uploads)
    first, old, new = start[NAME].main, contents(bundle), contents(newer, "v1.1.0")

    def state() -> str:
        repository = hub.repositories[NAME]
        assert repository.tags["v1.0.0"] == first
        assert not repository.private
        if "v1.1.0" in repository.tags:
            assert repository.tags["v1.1.0"] == repository.main
            assert repository.held == new
            return "new, public"
        assert repository.held in (old, new), "half a commit"
        return "old" if repository.held == old else "new"

    arguments = (newer, "--repo", NAME, "--tag", "v1.1.0", "--yes")
    show("a new version", sweep(hub, worker, start, uploads, arguments, ("cut", "lost"), state))


def test_whatever_fails_a_repository_of_others_is_taken_over_or_as_they_left_it(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    theirs = {"README.md": b"# Ours\n", "LICENSE": b"MIT\n", "pytorch_model.bin": b"pickle"}
    hub.repositories[NAME] = Repository(private=False)
    commit = hub.repositories[NAME].commit("by hand", {name: regular(content) for name, content in theirs.items()})
    start = copy.deepcopy(hub.repositories)

    def state() -> str:
        repository = hub.repositories[NAME]
        if repository.held == theirs:
            return "theirs"
        assert repository.held == contents(bundle) | {"LICENSE": b"MIT\n"}, "half a commit"
        return "new, public" if repository.tags == {"v1.0.0": repository.main} else "new"

    arguments = (bundle, "--repo", NAME, "--yes", "--take-over", commit[:12], "--remove", "pytorch_model.bin")
    reading = sweep(hub, worker, start, {}, arguments, ("cut", "lost", "503"), state, only="resolve README")
    committing = sweep(hub, worker, start, {}, arguments, ("cut", "lost", "503"), state, only="POST commit")
    show("a repository of others", reading + committing)
    assert {outcomes["503"] for _, _, outcomes in committing} == {"done"}
    assert {outcomes["lost"] for _, _, outcomes in committing} == {"new"}


@pytest.mark.slow
@pytest.mark.network
def test_with_xet_it_is_the_same(bundle: Path, tmp_path: Path) -> None:
    hf_xet = pytest.importorskip("hf_xet", reason="the client is installed without xet")
    (known,) = hf_xet.hash_files([str(bundle / "model.safetensors")])
    storage = tmp_path / "storage"
    storage.mkdir()
    with LoopbackHub(storage, lambda sha256: known.hash) as hub, Worker(hub, tmp_path / "home") as worker:
        reply = worker.publish(bundle, "--repo", NAME, "--yes")
        assert reply.code == 0, reply.printed
        assert {"GET xet-write-token", "GET xet-read-token"} <= set(hub.requests)
        assert not {"PUT upload", "GET resolve model.safetensors"} & set(hub.requests)
        assert hub.repositories[NAME].files["model.safetensors"].content is None
        arguments = (bundle, "--repo", NAME, "--yes")
        # Of the kinds those that xet does not wait many seconds for to pass.
        table = sweep(hub, worker, {}, {}, arguments, ("lost", "412"), lambda: state_of_new(hub, bundle), only="xet")
        show("with xet", table)
        worker.require_loads(bundle)
