"""Publishing where others have been: repositories of the website and of timm, edited cards, late answers, refusals."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, Repository, refused, regular
from publish_worker import NAME, Worker, contents

from clove_hub.export.read_back import PREFIX, clear_interrupted, locked_folder
from clove_hub.export.take_over import merge
from clove_hub.weights.hub import explain

pytest_plugins = ["publish_fixtures"]

README = b"---\nlicense: mit\n---\n# Our model\n\nYears of work.\n"
WEBSITE = {".gitattributes": b"*.bin filter=lfs\n", "README.md": README, "LICENSE": b"MIT License\n"}
V2 = ("--repo", NAME, "--tag", "v1.1.0")


def made(hub: LoopbackHub, files: dict[str, bytes]) -> Repository:
    hub.repositories[NAME] = Repository(private=False)
    hub.repositories[NAME].commit("initial commit", {name: regular(content) for name, content in files.items()})
    return hub.repositories[NAME]


def edit(repository: Repository, **files: bytes) -> None:
    """Somebody commits files on the website; a name's `_` is its dot."""
    changed = {name.replace("_", "."): regular(content) for name, content in files.items()}
    repository.commit("edited on the website", {**repository.files, **changed})


def way_out(printed: str) -> list[str]:
    """The words that the refusal says to add."""
    found = re.search(r"add (--take-over \w+)", printed)
    assert found, printed
    return found[1].split()


def card(repository: Repository) -> str:
    content = repository.held["README.md"]
    assert content is not None
    return content.decode()


# ---- repositories that others made ------------------------------------------------------------------------------


def test_one_made_on_the_website_is_shown_and_taken_over_with_the_word_that_the_refusal_names(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    repository = made(hub, WEBSITE)
    before = copy.deepcopy(repository)
    arguments = (bundle, "--repo", NAME, "--yes")
    reply = worker.publish(*arguments)
    assert reply.code == 2
    assert "    -Years of work.\n" in reply.printed
    assert re.search(r"README\.md .* replaces theirs\n", reply.printed)
    assert "kept: .gitattributes, LICENSE" in reply.printed
    assert repository == before

    word = way_out(reply.printed)
    edit(repository, README_md=README + b"And more.\n")  # which nobody was shown
    reply = worker.publish(*arguments, *word)
    assert reply.code == 2
    assert f"main is not at {' '.join(word)}." in reply.printed
    assert "    -And more.\n" in reply.printed
    assert worker.publish(*arguments, *way_out(reply.printed)).code == 0
    assert repository.held == contents(bundle) | {"LICENSE": b"MIT License\n"}
    assert "Already published" in worker.publish(*arguments, *word).printed


def test_a_card_of_the_website_can_stay_and_is_not_replaced_later(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path
) -> None:
    repository = made(hub, WEBSITE)
    arguments = (bundle, "--repo", NAME, "--yes", "--keep-card")
    reply = worker.publish(*arguments, *way_out(worker.publish(*arguments).printed))
    assert reply.code == 0, reply.printed
    assert repository.held["README.md"] == README
    assert "Already published" in worker.publish(*arguments).printed
    assert worker.publish(newer, *V2, "--yes").code == 2  # no merge makes sense of it, and it is not lost
    assert repository.held["README.md"] == README
    assert worker.publish(newer, *V2, "--yes", "--keep-card").code == 0
    assert repository.held["README.md"] == README


def test_one_made_by_timm_is_taken_over_and_its_pickle_is_removed_with_a_word(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path
) -> None:
    worker.push(bundle)
    repository = hub.repositories[NAME]
    assert repository.held.keys() == {"README.md", "config.json", "model.safetensors", "pytorch_model.bin"}
    arguments = (newer, "--repo", NAME, "--yes")
    reply = worker.publish(*arguments)
    assert reply.code == 2
    for name in ("README.md", "config.json", "model.safetensors"):
        assert re.search(rf"{re.escape(name)} .* replaces theirs\n", reply.printed), name
    assert re.search(
        r"kept: pytorch_model\.bin, which programs without .* \(to remove it: --remove pytorch_model\.bin\)",
        reply.printed,
    )
    assert (
        '    -    "tag": ' in reply.printed
        or "config.json: the version of others, and what replaces it" in reply.printed
    )
    word = way_out(reply.printed)
    reply = worker.publish(*arguments, *word, "--remove", "pytorch_model.bin")
    assert reply.code == 0, reply.printed
    assert "removed: pytorch_model.bin" in reply.printed
    assert repository.held == contents(newer)
    assert "Already published" in worker.publish(*arguments, "--remove", "pytorch_model.bin").printed


def test_weights_that_timm_pushed_over_ours_are_not_replaced_unseen(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path
) -> None:
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0
    worker.push(newer)
    repository = hub.repositories[NAME]
    before = copy.deepcopy(repository)
    reply = worker.publish(bundle, *V2, "--yes")
    assert reply.code == 2
    assert f"others changed config.json, model.safetensors of {NAME} after it was published" in reply.printed
    assert repository == before
    reply = worker.publish(bundle, *V2, "--yes", *way_out(reply.printed), "--remove", "pytorch_model.bin")
    assert reply.code == 0
    assert repository.held == contents(bundle, "v1.1.0")


def test_only_files_of_others_are_removed(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    reply = worker.publish(bundle, "--repo", NAME, "--remove", "config.json")
    assert reply.code == 2
    assert "--remove config.json: part of what is published" in reply.printed


# ---- cards that others edited -----------------------------------------------------------------------------------


def test_edits_of_a_card_are_shown_and_stay_version_after_version(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path
) -> None:
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0
    repository = hub.repositories[NAME]
    edit(repository, README_md=(card(repository) + "\n## Thanks\n\nTo all.\n").encode().replace(b"\n", b"\r\n"))
    told = worker.publish(newer, *V2).printed
    assert re.search(r"README\.md .* ours, with their edits\n", told)
    assert "    +To all.\n" in told
    reply = worker.publish(newer, *V2, "--yes")
    assert reply.code == 0, reply.printed
    assert card(repository) == contents(newer, "v1.1.0")["README.md"].decode() + "\n## Thanks\n\nTo all.\n"
    told_in = json.loads(repository.held["clove_hub.json"] or b"")
    assert told_in["sha256"]["README.md"] == repository.sums["README.md"]
    assert "Already published" in worker.publish(newer, *V2, "--yes").printed

    assert worker.publish(bundle, "--repo", NAME, "--tag", "v1.2.0", "--yes").code == 0
    assert card(repository) == contents(bundle, "v1.2.0")["README.md"].decode() + "\n## Thanks\n\nTo all.\n"


def test_edits_that_cannot_be_merged_need_a_word_and_either_one_works(
    hub: LoopbackHub, worker: Worker, bundle: Path, newer: Path
) -> None:
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0
    cards = contents(bundle)["README.md"], contents(newer, "v1.1.0")["README.md"]
    old, new = (content.decode().splitlines() for content in cards)
    line = next(line for line in old if line not in new)
    edited = "\n".join(f"{one} (checked by me)" if one == line else one for one in old).encode() + b"\n"
    edit(hub.repositories[NAME], README_md=edited)
    start = copy.deepcopy(hub.repositories)
    reply = worker.publish(newer, *V2, "--yes")
    assert reply.code == 2
    assert "it was edited in lines that the new card also changes" in reply.printed
    assert f"    -{line} (checked by me)\n" in reply.printed
    assert ", or --keep-card to keep their card" in reply.printed
    assert hub.repositories == start
    assert worker.publish(newer, *V2, "--yes", *way_out(reply.printed)).code == 0
    assert hub.repositories[NAME].held == contents(newer, "v1.1.0")
    hub.repositories = start
    assert worker.publish(newer, *V2, "--yes", "--keep-card").code == 0
    assert hub.repositories[NAME].held["README.md"] == edited


def test_a_merge_keeps_both_changes_or_none() -> None:
    before = "a\nb\nc\nd\ne\n"
    assert merge(before, "a\nB\nc\nd\ne\n", "a\nb\nc\nd\nE\nf\n") == "a\nB\nc\nd\nE\nf\n"
    assert merge(before, "a\nB\nc\nd\ne\n", "a\nB\nc\nd\ne\n") == "a\nB\nc\nd\ne\n"
    assert merge(before, "a\nB\nc\nd\ne\n", "a\nb\nC\nd\ne\n") is None
    assert merge(before, "x\n" + before, "y\n" + before) is None


# ---- what the Hub answers late, or once more --------------------------------------------------------------------


@pytest.mark.parametrize(("looks", "code"), [(2, 0), (99, 2)])
def test_a_tag_that_is_shown_late_is_not_somebody_else(
    hub: LoopbackHub, worker: Worker, bundle: Path, looks: int, code: int
) -> None:
    hidden: dict[str, str] = {}
    left = looks

    def late(name: str) -> None:
        nonlocal left
        repository = hub.repositories.get(NAME)
        if repository is None:
            return
        repository.tags.update(hidden)
        hidden.clear()
        if name == "GET refs" and repository.tags and left:
            left -= 1
            hidden.update(repository.tags)
            repository.tags.clear()

    hub.before = late
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == code, reply.printed
    assert "somebody else" not in reply.printed
    if code:
        assert "the Hub does not show the change yet" in reply.printed
        hub.before = None
        hub.repositories[NAME].tags.update(hidden)
        assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0


def test_a_commit_that_is_refused_for_a_moment_is_not_repeated_over_somebody_else(
    hub: LoopbackHub, worker: Worker, bundle: Path
) -> None:
    def theirs(name: str) -> None:
        if name == "POST commit":
            hub.before = None
            edit(hub.repositories[NAME], theirs_txt=b"theirs")

    hub.before = theirs
    hub.refusals = {"POST commit": refused(503, "busy")}
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert hub.requests.count("POST commit") == 1
    hub.refusals = {}
    reply = worker.publish(bundle, "--repo", NAME, "--yes")  # what the message says, which finds theirs
    assert f"{NAME} holds files of others (theirs.txt)" in reply.printed
    assert worker.publish(bundle, "--repo", NAME, "--yes", *way_out(reply.printed)).code == 0
    assert hub.repositories[NAME].held == contents(bundle) | {"theirs.txt": b"theirs"}


def test_a_stale_parent_says_what_happens_next(hub: LoopbackHub, worker: Worker, bundle: Path) -> None:
    worker.publish(bundle, "--repo", NAME, "--yes", "--private")
    hub.repositories[NAME].tags.clear()
    edit(hub.repositories[NAME], config_json=b"{}")
    hub.refusals = {"POST commit": refused(412, "A commit has happened since.")}
    reply = worker.publish(bundle, "--repo", NAME, "--yes", *way_out(worker.publish(bundle, "--repo", NAME).printed))
    assert reply.code == 2
    assert (
        "somebody else committed in the meantime, so nothing was committed. Run the command without --yes"
        in reply.printed
    )
    assert "publishes on top of it" not in reply.printed


# ---- who refuses, and why ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_name", "status", "said", "code", "message"),
    [
        ("PUT upload", 403, "Request has expired", None, "the storage refused an address that the Hub had signed"),
        ("POST commit", 403, "Private repository storage limit reached", None, "the storage of this user"),
        ("POST commit", 413, "too large", None, "the storage of this user"),
        ("POST tag", 507, "full", None, "the storage of this user"),
        ("POST commit", 403, "You may not", None, "the token does not permit this"),
        ("POST commit", 409, "conflict", None, "another change on the Hub conflicts"),
        ("GET info", 403, "Access to model is restricted", "GatedRepo", "its owner must grant you access"),
        ("GET info", 401, 'User Access Token "mine" is expired', None, "the token has expired"),
        ("GET whoami-v2", 401, 'User Access Token "mine" is expired', None, "the token has expired"),
        ("POST repos create", 409, "exists", None, "it exists already: somebody created it a moment ago"),
    ],
)
def test_each_refusal_names_its_real_cause(
    hub: LoopbackHub, worker: Worker, bundle: Path, request_name: str, status: int, said: str, code: str, message: str
) -> None:
    hub.storage = hub.url.replace("127.0.0.1", "localhost")
    hub.refusals = {request_name: refused(status, said, code)}
    reply = worker.publish(bundle, "--repo", NAME, "--yes")
    assert reply.code == 2
    assert message in reply.printed
    assert "Signature=secret" not in reply.printed.partition("error: ")[2]
    hub.refusals = {}
    assert worker.publish(bundle, "--repo", NAME, "--yes").code == 0


@pytest.mark.network
@pytest.mark.parametrize(
    ("status", "reason"), [(403, "the storage refused an address"), (404, "the storage lacks a file")]
)
def test_what_xet_says_of_the_storage_is_not_about_the_token_or_the_network(
    tmp_path: Path, status: int, reason: str
) -> None:
    hf_xet = pytest.importorskip("hf_xet", reason="the client is installed without xet")

    class Storage(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    (tmp_path / "weights").write_bytes(os.urandom(100_000))
    with ThreadingHTTPServer(("127.0.0.1", 0), Storage) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        token = ("xet", 2**40)
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ConnectionError) as caught:
            hf_xet.upload_files([str(tmp_path / "weights")], address, token, lambda: token, None, "model")
        server.shutdown()
    assert explain(caught.value).startswith(reason)
    assert "no answer" not in explain(caught.value)


# ---- what a killed publication left -----------------------------------------------------------------------------


def test_folders_of_killed_publications_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = tmp_path / "something"
    other.mkdir()
    (other / "weights").write_bytes(bytes(1000))
    (tmp_path / f"{PREFIX}link").symlink_to(other)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        with locked_folder() as folder:
            (Path(folder) / "weights").write_bytes(bytes(1000))
            os.write(writing, folder.encode())
            while True:
                signal.pause()
    folder = Path(os.read(reading, 1000).decode())
    clear_interrupted()
    assert (folder / "weights").exists(), "it is in use"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert folder.exists()
    clear_interrupted()
    assert not folder.exists()
    assert (other / "weights").exists()
    assert capsys.readouterr().out.startswith(f"Removed {folder} (1,000 bytes)")
