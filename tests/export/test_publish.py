"""Publishing to a Hub on loopback with the real client: what gets there, when, and what happens when things go wrong."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from loopback_hub import ORGANIZATION, READ_TOKEN, TOKEN, USER, LoopbackHub, Repository, regular
from publish_worker import NAME, Worker, contents

from clove_hub.cli import main
from clove_hub.export import export_run, from_run, write_bundle
from clove_hub.export import hub as hub_module
from clove_hub.export.hub import Repository as Remotely
from clove_hub.export.read_back import read_back
from clove_hub.runs import read_state, sha256
from clove_hub.weights.hub import explain, in_plain_words
from clove_hub.weights.run import find_checkpoint
from clove_hub.zoo.models import find_model

pytest_plugins = ["publish_fixtures"]


def changes(hub: LoopbackHub) -> list[str]:
    return [name for name in hub.requests if not name.startswith(("GET", "HEAD"))]


# ---- what happens -------------------------------------------------------------------------------------------


def test_without_yes_it_tells_everything_and_changes_nothing(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    reply = worker.publish(bundle, "--repo", NAME)
    assert reply.code == 0
    for name, content in contents(bundle).items():
        size, expected = f"{len(content):,}", hashlib.sha256(content).hexdigest()
        assert re.search(rf"{re.escape(name)} +{size} bytes  sha256 {expected}  new", reply.printed), name
    assert "does not exist, or you have no access to it" in reply.printed
    assert "1. create the repository, private" in reply.printed
    assert "7. make the repository public" in reply.printed
    assert "Nothing was changed. The same command with --yes does it." in reply.printed
    assert hub.repositories == {}
    assert hub.requests == ["GET info"]


def test_it_is_private_until_one_commit_was_proved_and_tagged(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    seen = []
    hub.before = lambda name: seen.append((name, [repository.private for repository in hub.repositories.values()]))
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 0, reply.printed
    repository = hub.repositories[NAME]
    assert repository.held == contents(bundle)
    initial, commit = repository.commits.values()
    assert (commit.parent, commit.oid, commit.title) == (initial.oid, repository.main, "Publish v1.0.0")
    assert repository.tags == {"v1.0.0": commit.oid}
    assert f"at {commit.oid}, tagged v1.0.0." in reply.printed

    assert not repository.private
    opened = seen.index(("PUT settings", [True]))
    assert not any([False] in state for _, *state in seen[:opened])
    order = [name for name, _ in seen]
    proofs = ("POST repos create", "POST commit", "GET resolve model.safetensors", "POST tag", "PUT settings")
    assert [name for name in order if name in proofs] == list(proofs)


def test_a_second_time_changes_nothing(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    before = copy.deepcopy(hub.repositories)
    hub.forget()
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 0
    assert f"Already published: {NAME} holds exactly this" in reply.printed
    assert changes(hub) == []
    assert hub.repositories == before


def test_private_stays_private_until_it_is_published_without_it(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    assert worker.publish(bundle, "--repo", NAME, "--yes", "--private").code == 0
    assert hub.repositories[NAME].private
    assert hub.repositories[NAME].tags.keys() == {"v1.0.0"}
    assert "Already published" in worker.publish(bundle, "--repo", NAME, "--yes", "--private").printed
    hub.forget()
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0
    assert changes(hub) == ["PUT settings"]
    assert not hub.repositories[NAME].private

    reply = worker.publish(bundle, "--repo", NAME, "--yes", "--private")
    assert reply.code == 2
    assert "is already public, and --private does not make it private again" in reply.printed


def test_a_new_version_is_one_commit_on_the_old_one_which_keeps_its_tag(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path
) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    repository = hub.repositories[NAME]
    old = repository.main
    told = worker.publish(newer, "--repo", NAME, "--tag", "v1.1.0").printed
    assert re.search(r"config\.json .* same\n", told)
    assert re.search(r"model\.safetensors .* changed\n", told)
    assert f"public, main at {old}" in told
    assert "it is already public: the new commit is visible at once" in told

    hub.forget()
    reply = worker.publish(newer, "--repo", NAME, "--tag", "v1.1.0", "--yes")
    assert reply.code == 0, reply.printed
    assert repository.held == contents(newer, "v1.1.0")
    assert repository.commits[repository.main].parent == old
    proofs = ("POST commit", "GET resolve model.safetensors", "POST tag")
    assert [name for name in hub.requests if name in proofs] == list(proofs)
    assert repository.tags == {"v1.0.0": old, "v1.1.0": repository.main}


def test_what_others_added_to_the_repository_stays(hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    repository = hub.repositories[NAME]
    repository.commit("a figure", {**repository.files, "figure.png": regular(b"png")})
    reply = worker.publish(newer, "--repo", NAME, "--tag", "v1.1.0", "--yes")
    assert reply.code == 0
    assert "kept: .gitattributes, figure.png" in reply.printed
    assert repository.held == contents(newer, "v1.1.0") | {"figure.png": b"png"}


# ---- the whole state ----------------------------------------------------------------------------------------


def test_the_full_state_of_a_run_is_published_by_the_same_flow(
    hub: LoopbackHub, worker: Worker, run: Path, tmp_path: Path
) -> None:
    name = f"{NAME}-state"
    arguments = (run, "--state", "--repo", name, "--license", "mit", "--yes")
    reply = worker.publish(*arguments)
    assert reply.code == 0, reply.printed
    repository = hub.repositories[name]
    assert repository.held.keys() == {"README.md", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert repository.tags == {"v1.0.0": repository.main}
    assert not repository.private
    for path, content in repository.held.items():
        assert content is not None
        assert b"/home/somebody" not in content, path
        (tmp_path / path).write_bytes(content)

    newest = run / "checkpoints" / "step_00000020"
    state = read_state(tmp_path)  # which compares the sums of the other two
    assert state == json.loads((newest / "state.json").read_text().replace("/home/somebody/", ""))
    assert (tmp_path / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert f"run.init_from=hf-hub:{name}@v1.0.0\n" in card

    assert "Already published" in worker.publish(*arguments).printed
    reply = worker.publish(run, "--state", "--repo", NAME, "--license", "mit", "--yes", "--tag", "1")
    assert reply.code == 2


def test_state_and_bundle_do_not_share_a_repository(hub: LoopbackHub, worker: Worker, run: Path, bundle: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    reply = worker.publish(run, "--state", "--repo", NAME, "--license", "mit", "--yes")
    assert reply.code == 2
    assert f"{NAME} holds another kind of publication by clove-hub (clove_hub.json, no state.json)" in reply.printed
    assert hub.repositories[NAME].held == contents(bundle)


# ---- what is refused before anything is sent ---------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["publish", *list(map(str, arguments))]) == 2
    return capsys.readouterr().err


def test_what_is_no_sound_bundle_with_a_license_is_refused(
    run: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unlicensed = export_run(run, tmp_path / "unlicensed", checkpoint=10)
    assert "the card names no license" in refusal(capsys, unlicensed, "--repo", NAME)
    copied = tmp_path / "copied"
    shutil.copytree(bundle, copied)
    (copied / "secret.env").write_text("TOKEN=")
    assert "missing or unexpected: secret.env" in refusal(capsys, copied, "--repo", NAME)
    (copied / "secret.env").unlink()
    (copied / "README.md").write_text("better than all")
    assert "README.md is not what was exported" in refusal(capsys, copied, "--repo", NAME)
    assert "is a run: publish the bundle that `clove-hub export" in refusal(capsys, run, "--repo", NAME)
    assert "is not the folder of a bundle" in refusal(capsys, tmp_path / "nowhere", "--repo", NAME)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repo", "resnet50"], "expected organization/name"),
        (["--repo", "a/b/c"], "expected organization/name"),
        (["--repo", NAME, "--tag", "latest"], "--tag latest: expected a version such as v1.0.0"),
        (["--repo", NAME, "--license", "mit"], "--license needs --state"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    bundle: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, bundle, *arguments)


def test_a_state_needs_a_license(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--state needs --license" in refusal(capsys, run, "--state", "--repo", NAME)
    said = refusal(capsys, run, "--state", "--repo", NAME, "--license", "MIT")
    assert "'MIT' is not a license id of the Hub" in said


# ---- others on the Hub -------------------------------------------------------------------------------------


def somebody_commits(hub: LoopbackHub, at: str) -> Callable[[str], None]:
    """Somebody else adds a file just before a request of this name is served, once."""

    def before(name: str) -> None:
        if name == at:
            hub.before = None
            hub.repositories[NAME].commit("theirs", {**hub.repositories[NAME].files, "theirs.txt": regular(b"theirs")})

    return before


def test_a_commit_of_somebody_else_is_not_committed_over(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.before = somebody_commits(hub, "POST commit")
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert "somebody else committed in the meantime" in reply.printed
    assert "Stopped at: upload the new and changed files" in reply.printed
    assert hub.repositories[NAME].held == {"theirs.txt": b"theirs"}
    assert hub.repositories[NAME].private
    assert hub.requests.count("POST commit") == 1, "it was tried again"


def test_a_commit_of_somebody_else_after_ours_is_not_made_public(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    hub.before = somebody_commits(hub, "POST tag")
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"somebody else changed {NAME} in the meantime" in reply.printed
    repository = hub.repositories[NAME]
    assert repository.private
    assert "theirs.txt" not in repository.commits[repository.tags["v1.0.0"]].files


def test_a_tag_is_never_moved(hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    repository = hub.repositories[NAME]
    before = copy.deepcopy(repository)
    reply = worker.publish(newer, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"the tag v1.0.0 of {NAME} is at the commit {repository.main[:12]}" in reply.printed
    assert "these files have changed: README.md, clove_hub.json, model.safetensors" in reply.printed
    assert "--tag v1.1.0" in reply.printed
    assert repository == before

    hub.before = lambda name: repository.tags.update({"v1.1.0": before.main}) if name == "POST tag" else None
    reply = worker.publish(newer, "--repo", NAME, "--yes", "--tag", "v1.1.0")  # set by somebody just before
    assert reply.code == 2
    assert "somebody else set v1.1.0 a moment ago, at another commit" in reply.printed
    assert repository.tags["v1.1.0"] == before.main


def test_a_repository_of_something_else_is_left_alone(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.repositories[NAME] = Repository(private=False)
    hub.repositories[NAME].commit("initial commit", {"thesis.pdf": regular(b"years of work")})
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"{NAME} holds files of others (thesis.pdf)" in reply.printed
    assert changes(hub) == []


def test_a_repository_of_another_model_is_left_alone(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    other = {"clove_hub.json": regular(b'{"method": "slotcon", "backbone": "resnet50", "model": null}')}
    hub.repositories[NAME] = Repository(private=False)
    hub.repositories[NAME].commit("initial commit", other)
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"{NAME} holds another model (method slotcon, backbone resnet50)" in reply.printed
    hub.repositories[NAME].commit("nonsense", {"clove_hub.json": regular(b"[1, 2]")})
    assert f"{NAME} holds files of others (clove_hub.json)" in worker.publish(bundle, "--repo", NAME, "--yes").printed
    assert changes(hub) == []


def test_versions_in_one_repository_are_of_one_entry_of_the_zoo(
    hub: LoopbackHub, worker: Worker, run: Path, tmp_path: Path
) -> None:
    weights = from_run(find_checkpoint(run, 10), "mit")
    for name in ("200", "400"):
        model = find_model(f"resnet50.clove_in1k_{name}ep")
        write_bundle(replace(weights, model=model), tmp_path / name)
    repository = f"{ORGANIZATION}/resnet50.clove_in1k_200ep"
    told = worker.publish(tmp_path / "200", "--repo", repository, "--yes").printed
    assert "the zoo finds it only" not in told
    reply = worker.publish(tmp_path / "400", "--repo", repository, "--yes", "--tag", "v1.1.0")
    assert reply.code == 2
    assert f"{repository} holds another model (method clove, backbone test_resnet, model resnet50" in reply.printed
    told = worker.publish(tmp_path / "400", "--repo", NAME).printed
    assert "this is resnet50.clove_in1k_400ep: the zoo finds it only in a repository of that name" in told


def test_a_renamed_repository_is_asked_for_by_its_new_name(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes")
    hub.renamed = {f"{ORGANIZATION}/old": NAME}
    reply = worker.publish(bundle, "--repo", f"{ORGANIZATION}/old", "--yes")
    assert reply.code == 2
    assert f"{ORGANIZATION}/old is {NAME} on the Hub: give --repo {NAME}" in reply.printed


def test_a_file_that_the_client_left_out_is_missed(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.ignored = {"config.json"}
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert re.search(rf"{NAME} at \w{{40}} differs from what was sent in config\.json", reply.printed)
    assert "Stopped at: compare the checksums" in reply.printed
    assert hub.repositories[NAME].private


def test_a_server_that_does_not_make_it_private_gets_nothing(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.private = False
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"{NAME} was created, but is no longer empty and private" in reply.printed
    assert hub.repositories[NAME].held == {}


def test_a_server_that_does_not_make_it_public_is_not_believed(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.private = True
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"{NAME} is still private, although the Hub accepted the request to make it public" in reply.printed


def test_an_empty_repository_is_filled(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.repositories[NAME] = Repository(private=True)
    hub.repositories[NAME].commit("initial commit", {".gitattributes": regular(b"")})
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0
    assert hub.repositories[NAME].held == contents(bundle)


# ---- tokens, network, disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "publishing needs a token with write access: store one with `hf auth login`"),
        ("hf_wrong", "the Hub does not accept the token"),
        (READ_TOKEN, f"the token of {USER} has only read access"),
    ],
)
def test_without_a_token_that_may_write_nothing_is_sent(
    hub: LoopbackHub, worker: Worker, bundle: Path, token: str, message: str
) -> None:
    reply = worker.publish(bundle, "--repo", NAME, "--yes", HF_TOKEN=token)
    assert reply.code == 2
    assert message in reply.printed
    assert hub.repositories == {}
    assert len(hub.requests) <= 1


def test_an_organization_of_others_is_out_of_reach(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    reply = worker.publish(bundle, "--repo", "others/model", "--yes")
    assert reply.code == 2
    assert "creating others/model failed: the token does not permit this" in reply.printed
    assert hub.repositories == {}


def test_no_network_is_said_at_once(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.forget((1, "down"))
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"no answer from {hub.url}" in reply.printed
    assert "Check the network, proxies and HF_ENDPOINT" in reply.printed


def test_offline_mode_is_named(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert constants.HF_HUB_OFFLINE  # set for all tests
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it" in refusal(capsys, bundle, "--repo", NAME)


def test_a_disk_without_room_for_reading_back_stops_before_anything_is_sent(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    reply = worker.publish(bundle, "--repo", NAME, "--yes", free=1_000_000)
    assert reply.code == 2
    assert "make room, or set TMPDIR" in reply.printed
    assert hub.repositories == {}


def test_a_full_disk_is_called_that_and_no_traceback_shows_what_the_client_raised() -> None:
    def client_call() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
        except OSError as error:
            raise RuntimeError(f"Bearer {TOKEN}") from error

    with (
        pytest.raises(ValueError, match=r"it failed: the disk is full \(/tmp/x\): free some space") as caught,
        in_plain_words("it"),
    ):
        client_call()
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_a_disk_that_fills_up_on_this_side_is_no_traceback(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Remotely, "look", full)
    assert "the disk is full" in refusal(capsys, bundle, "--repo", NAME)


def test_addresses_lose_their_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = explain(RuntimeError(f"PUT https://storage/file?Signature=abc went wrong\nwith Bearer {TOKEN}"))
    assert said == "RuntimeError: PUT https://storage/file went wrong with Bearer (token)"


def test_an_interruption_by_hand_says_how_to_go_on(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    def interrupt(name: str) -> None:
        if name == "POST commit":
            hub.before = None
            os.kill(worker.process.pid, signal.SIGINT)

    hub.before = interrupt
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 130
    assert "interrupted. Stopped at: upload the new and changed files" in reply.printed
    assert "Run the same command again" in reply.printed
    assert hub.repositories[NAME].private
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0
    assert hub.repositories[NAME].held == contents(bundle)


def test_a_file_that_the_hub_damaged_is_found_and_not_made_public(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    weights = (bundle / "model.safetensors").read_bytes()

    def damage(name: str) -> None:
        if name == "POST commit":
            (oid,) = hub.uploads
            hub.uploads[oid] = weights[:-1] + bytes([weights[-1] ^ 1])

    hub.before = damage
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert f"model.safetensors of {NAME} differs from what was sent" in reply.printed
    assert hub.repositories[NAME].private
    assert hub.repositories[NAME].tags == {}


# ---- loaded from the Hub -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_timm_and_transformers_load_what_was_published_bit_for_bit(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    reply = worker.publish(bundle, "--repo", NAME, "--yes", fresh=True)
    assert reply.code == 0, reply.printed
    assert "POST lfs objects batch" in hub.requests
    worker.require_loads(bundle)


def test_what_timm_makes_of_the_file_is_compared_with_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_bit_off(source: str, **_: object) -> torch.nn.Module:
        model: torch.nn.Module = create_model(f"local-dir:{bundle}", pretrained=True)
        with torch.no_grad():
            model.get_parameter("conv1.0.weight")[0, 0, 0, 0].neg_()
        return model

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", one_bit_off)
    monkeypatch.setattr(hub_module, "hf_hub_download", lambda repository, name, **_: str(bundle / name))
    told = {path.name: sha256(path) for path in bundle.iterdir()}
    with pytest.raises(
        ValueError, match=rf"{NAME}, loaded by timm, differs from its file in \d+ tensors? \(conv1\.0\.weight"
    ):
        read_back(NAME, "0" * 40, told, library="timm", cache="unused")


@pytest.mark.slow
def test_the_fresh_process_finds_what_is_wrong(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    hub.before = lambda name: hub.repositories.clear() if name == "HEAD resolve config.json" else None
    reply = worker.publish(bundle, "--repo", NAME, "--yes", fresh=True)
    assert reply.code == 2
    assert f"loading {NAME} with timm failed: it does not exist on the Hub" in reply.printed
    assert "Stopped at: read that commit back in a fresh process" in reply.printed
