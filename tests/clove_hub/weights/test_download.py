"""A download goes on where it was cut, and what arrives is what the server has; or one sentence says why not."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from loopback_files import FileServer

from clove_hub.weights import download as module
from clove_hub.weights.download import download, is_address, shown

CONTENT = random.Random(3).randbytes(400_000)
pytestmark = pytest.mark.network


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """How long was waited for; nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=found.append))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return found


def partial(cache: Path) -> Path:
    (folder,) = (cache / "clove-hub/downloads").iterdir()
    return folder / "partial"


def test_a_connection_that_is_cut_three_times_gives_the_whole_file(naps: list[float]) -> None:
    with FileServer(CONTENT, "cut:100000", "cut:120000", "cut:90000") as server:
        file = download(server.url)
    assert file.read_bytes() == CONTENT
    assert file.name == "ckpt.pth"
    assert [asked for asked, _ in server.asked] == [None, "bytes=100000-", "bytes=220000-", "bytes=310000-"]
    assert server.bytes_sent == len(CONTENT)
    assert naps == [], "each brought something"
    assert not file.with_name("partial").exists()


def test_a_killed_download_goes_on_in_the_next_call_and_a_whole_one_is_not_fetched_again(tmp_path: Path) -> None:
    with FileServer(CONTENT, "cut:150000", *["status:503"] * 5) as server:
        with pytest.raises(ConnectionError, match=r"HTTP 503.*150,000 bytes are kept: the same command resumes"):
            download(server.url)
        assert partial(tmp_path).stat().st_size == 150_000
        requests = len(server.asked)
        assert download(server.url).read_bytes() == CONTENT
        assert server.asked[requests:] == [("bytes=150000-", '"v1"')]
        assert download(server.url, hashlib.sha256(CONTENT).hexdigest()).read_bytes() == CONTENT
        assert len(server.asked) == requests + 1


@pytest.mark.parametrize(
    ("plan", "headers", "said"),
    [
        (["cut:90000", "whole"], {}, "does not send parts of files; it is fetched from the beginning"),
        (["cut:90000", "part:5"], {}, "another part than the requested one"),
        (["cut:90000"], {"ETag": ""}, ""),
        (["cut:90000"], {"ETag": 'W/"weak"'}, ""),
    ],
    ids=["no parts", "another part", "no version", "a weak version"],
)
def test_a_server_that_cannot_go_on_begins_again(
    plan: list[str], headers: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FileServer(CONTENT, *plan, headers=headers) as server:
        assert download(server.url).read_bytes() == CONTENT
    assert said in caplog.text
    if headers:
        assert server.asked == [(None, None)] * 2


def test_a_file_that_changes_in_between_is_fetched_from_the_beginning(caplog: pytest.LogCaptureFixture) -> None:
    other = "another file" * 9000
    with FileServer(CONTENT, "cut:90000", f"change:{other}") as server:
        assert download(server.url).read_bytes() == other.encode()
    assert server.asked[1] == ("bytes=90000-", '"v1"')
    assert "the file has changed on the server; it is fetched from the beginning" in caplog.text


def test_a_kill_while_it_begins_again_mixes_no_two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = Path.open, list[str]()

    def killed(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "partial":
            opened.append(arguments[0])
            if len(opened) == 2:
                raise KeyboardInterrupt
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", killed)
    other = "another file" * 9000
    with FileServer(CONTENT, "cut:90000", f"change:{other}") as server:
        with pytest.raises(KeyboardInterrupt):
            download(server.url)
        assert download(server.url).read_bytes() == other.encode()


def test_a_body_that_stays_short_is_no_file(naps: list[float], tmp_path: Path) -> None:
    with (
        FileServer(CONTENT, headers={"Content-Length": str(len(CONTENT) + 5), "ETag": ""}) as server,
        pytest.raises(ConnectionError, match=r"sent 400,000 of 400,005 bytes, 5 times without a new byte"),
    ):
        download(server.url)
    assert naps == [1, 2, 4, 8]
    assert not partial(tmp_path).with_name("ckpt.pth").exists()


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    with (
        FileServer(CONTENT, *["stall"] * 5) as server,
        pytest.raises(ConnectionError, match=r"nothing came for 0.05 seconds, 5 times without a new byte"),
    ):
        download(server.url)


@pytest.mark.parametrize(
    ("plan", "headers", "content", "message"),
    [
        (["status:404"], {}, CONTENT, r"there is no such file \(HTTP 404\); open it in a browser"),
        (["status:403"], {}, CONTENT, r"access is denied, or the link has expired \(HTTP 403\)"),
        (
            [],
            {"Content-Type": "text/html; charset=utf-8"},
            b"<html><title>Google Drive - Virus scan &amp; more</title></html>",
            r"is a web page \('Google Drive - Virus scan & more'\), not a file.*give its path",
        ),
        ([], {}, b"\n<!DOCTYPE html><html>", "is a web page, not a file"),
    ],
    ids=["404", "403", "page", "page without a type"],
)
def test_what_is_no_file_is_named_without_what_could_be_a_signature(
    plan: list[str], headers: dict[str, str], content: bytes, message: str, tmp_path: Path
) -> None:
    with FileServer(content, *plan, headers=headers) as server, pytest.raises(ValueError, match=message) as error:
        download(f"{server.url}?sig=secret")
    assert "secret" not in str(error.value)
    assert server.url in str(error.value)
    assert not partial(tmp_path).exists()


def test_a_wrong_sum_is_refused_and_the_file_not_kept(tmp_path: Path) -> None:
    with FileServer(CONTENT) as server:
        with pytest.raises(ValueError, match=f"has sha256 {hashlib.sha256(CONTENT).hexdigest()}, but --sha256 is 00"):
            download(server.url, "00" * 32)
        assert download(server.url).read_bytes() == CONTENT
        assert len(server.asked) == 2
    with (
        FileServer(CONTENT, headers={"X-Linked-Etag": f'"{"ab" * 32}"'}) as server,
        pytest.raises(ValueError, match="but the server's is abab"),
    ):
        download(server.url)


def test_two_at_once_fetch_one_file(caplog: pytest.LogCaptureFixture) -> None:
    found: list[Path] = []
    caplog.set_level(logging.INFO, "clove_hub")
    with FileServer(CONTENT) as server:
        both = [threading.Thread(target=lambda: found.append(download(server.url))) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert found[0] == found[1]
    assert found[0].read_bytes() == CONTENT
    assert len(server.asked) == 1
    assert "was fetched before" in caplog.text


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full. Free some space, or set XDG_CACHE_HOME"),
        (errno.EROFS, r"it cannot be written to \(Read-only file system\)"),
    ],
)
def test_a_cache_that_takes_nothing_is_named(monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    real = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "partial":
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    with FileServer(CONTENT) as server, pytest.raises(OSError, match=message) as error:
        download(server.url)
    assert error.value.strerror is None, "what is printed is the sentence"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/ckpt.pth?sig=secret", r"http://example.org/ckpt.pth is not encrypted.*give the https://"),
        ("ftp://example.org/ckpt.pth", "not an address to fetch files from: expected https://"),
        ("https://me:secret@example.org/x", "an address of example.org contains a user name or password"),
        (
            "https://drive.google.com/drive/folders/1LKWsiOGpVlZGBaI7xiKD4VeZmsWyHoNW?usp=sharing",
            "is a folder on Google",
        ),
    ],
)
def test_addresses_that_nothing_is_fetched_from(url: str, message: str) -> None:
    assert is_address(url)
    with pytest.raises(ValueError, match=message) as error:
        download(url)
    assert "secret" not in str(error.value)


def test_a_server_that_leads_on_to_what_is_not_encrypted_is_not_followed() -> None:
    class Elsewhere(FileServer):
        def answer(self, request: Any) -> None:
            request.send_response(302)
            request.send_header("Location", "http://example.org/ckpt.pth")
            request.end_headers()

    with Elsewhere(CONTENT) as server, pytest.raises(ValueError, match=r"http://example.org/ckpt.pth is not encrypted"):
        download(server.url)


DRIVE = "https://drive.google.com/file/d/1oZwYSLSYSOzTLtOFdi4jXW6T5cGkQTgD/view?usp=sharing"


def test_google_drive_needs_an_extra_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ValueError, match=r"needs gdown.*pip install 'clove-hub\[drive\]'"):
        download(DRIVE)


def test_google_drive_is_asked_through_gdown(monkeypatch: pytest.MonkeyPatch) -> None:
    gdown: Any = pytest.importorskip("gdown", reason="gdown is not installed")
    asked = {}

    def fake(**options: Any) -> str:
        asked.update(options)
        Path(options["output"], "pixpro.pth").write_bytes(CONTENT)
        return str(Path(options["output"], "pixpro.pth"))

    signature = __import__("inspect").signature(gdown.download)
    monkeypatch.setattr(gdown, "download", fake)
    for url in (DRIVE, "https://drive.google.com/uc?export=download&id=1oZwYSLSYSOzTLtOFdi4jXW6T5cGkQTgD"):
        file = download(url)
        assert file.read_bytes() == CONTENT
        signature.bind(**asked)
        assert asked["id"] == "1oZwYSLSYSOzTLtOFdi4jXW6T5cGkQTgD"
        assert json.loads(file.with_name("record.json").read_text())["url"] == shown(url) == DRIVE.partition("?")[0]
