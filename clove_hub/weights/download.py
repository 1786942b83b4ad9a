"""Downloading a file of weights from any URL, with resuming and verification.

Each file has its own folder, `$XDG_CACHE_HOME/clove-hub/downloads/<hash of the URL>/`:

    partial        what came so far
    record.json    what the server said of the file: its version (ETag or date), size, sha256, name
    <name>         the whole file; from then on nothing is fetched

An interrupted download resumes with `Range` and `If-Range`: a server whose file has changed, or that does not support
ranges, sends the whole file again. Files on Google Drive, which puts its own pages in front of them, are downloaded by
gdown.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import html
import http.client
import json
import logging
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from filelock import FileLock, Timeout
from tqdm import tqdm

from clove_hub.runs import sha256 as sum_of
from clove_hub.zoo.places import cache_folder

from .hub import redacted

log = logging.getLogger(__name__)
TRIES, TIMEOUT, BLOCK = 5, 60, 1 << 16
"""In a row without a new byte; seconds without a byte; bytes that are read at a time."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
DRIVE = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com")
AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may get another one."""
REFUSED = {
    401: "it asks for a login",
    403: "access is denied, or the link has expired",
    404: "there is no such file",
    410: "the file was removed",
}
BY_HAND = "open it in a browser, download the file, and give its path instead"


@dataclass
class Record:
    """A server's information about a file."""

    url: str
    """Without what could be a signature."""
    name: str
    version: str | None = None
    """For `If-Range`; None if the server gives nothing by which a part could be told to be of the same file."""
    size: int | None = None
    sha256: str | None = None


class _Cut(Exception):
    """The connection ended before the file did."""


class _Answer(Protocol):
    """What of a response is used."""

    status: int
    headers: Mapping[str, str]

    def read(self, amount: int = -1, /) -> bytes: ...


def is_address(source: object) -> bool:
    """Whether it is a URL and not a path."""
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def shown(url: str) -> str:
    """The address as records and messages have it: of a file on Google Drive with its id, of others without the query."""
    identifier = _drive_id(url)
    return f"https://drive.google.com/file/d/{identifier}/view" if identifier else redacted(url)


def download(url: str, sha256: str | None = None) -> Path:
    """Download a file, or find it in the cache.

    Args:
        url: `https://`; `http://` only on this machine.
        sha256: that it must have.

    Returns:
        Its path in the cache, under the name that the server gives it.

    Raises:
        ValueError: there is no file at this URL, it leads to a web page, or the checksum differs.
        OSError: the connection was lost too often, or the cache cannot be written to.
    """
    require_address(url)
    identifier = _drive_id(url)
    folder = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:20]
    with _in_words(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "lock", url):
            record = _read_record(folder)
            file = folder / record.name if record else None
            if record and file and file.is_file():
                log.info("%s was fetched before: %s", shown(url), file)
            elif identifier:
                file, record = _from_drive(identifier, folder)
            else:
                file, record = _fetch(url, folder)
            expected = {"--sha256": sha256, "the server's": record.sha256}
            found = sum_of(file) if any(expected.values()) else None
            for whose, wanted in expected.items():
                if wanted and wanted.lower() != found:
                    file.unlink()
                    raise ValueError(
                        f"{shown(url)} has sha256 {found}, but {whose} is {wanted}: it is another file, or was damaged on "
                        "the way. It was deleted; the next attempt fetches it again"
                    )
            return file


def require_address(url: str) -> None:
    """Raises ValueError unless something may be fetched from there."""
    parts = urllib.parse.urlsplit(url)
    if parts.username or parts.password:
        raise ValueError(
            f"an address of {parts.hostname} contains a user name or password, which would be stored: {BY_HAND}"
        )
    if not parts.hostname or parts.scheme not in ("https", "http"):
        raise ValueError(f"{redacted(url)} is not an address to fetch files from: expected https://")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ValueError(
            f"{redacted(url)} is not encrypted, so anybody on the way could change the file: give the https:// address, "
            f"or {BY_HAND}"
        )


def _fetch(url: str, folder: Path) -> tuple[Path, Record]:
    partial, tries = folder / "partial", 0
    most = partial.stat().st_size if partial.exists() else 0
    while True:
        try:
            record = _once(url, folder, partial)
        except _Cut as cut:
            after = partial.stat().st_size if partial.exists() else 0
            tries = 0 if after > most else tries + 1
            most = max(most, after)
            if tries >= TRIES:
                raise ConnectionError(
                    f"{shown(url)}: {cut}, {TRIES} times without a new byte. "
                    + (
                        f"{after:,} bytes are kept: the same command resumes from there"
                        if after
                        else "Check the network"
                    )
                ) from None
            log.warning("%s: %s; trying again", shown(url), cut)
            if tries:
                time.sleep(2 ** (tries - 1))
        else:
            file = folder / record.name
            partial.replace(file)
            return file, record


def _once(url: str, folder: Path, partial: Path) -> Record:
    """One request and what comes of it, behind what is there of the file.

    Raises:
        _Cut: the file is not whole yet.
    """
    old = _read_record(folder)
    there = partial.stat().st_size if partial.exists() and old and old.version else 0
    headers = {"User-Agent": "clove-hub"}  # urllib asks for the plain bytes by itself
    if old and there:
        if there == old.size:
            return old
        headers |= {"Range": f"bytes={there}-", "If-Range": str(old.version)}
    redirects = _Redirects()
    quoted = urllib.parse.quote(url, safe=":/?#[]@!$&'()*+,;=%~")  # such as a typed space
    with _open(urllib.request.Request(quoted, headers=headers), redirects, url, partial) as response:
        said = _record(url, response, redirects.linked)
        begin, total = there, said.size
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
            total = int(span[2]) if span and span[2] != "*" else None
            if not span or int(span[1]) != there or not old or total != old.size:
                partial.unlink()
                raise _Cut("the server sent another part than the requested one")
            said = old
        else:
            if there:
                changed = not old or (old.version, old.size) != (said.version, said.size)
                why = "the file has changed on the server" if changed else "the server does not send parts of files"
                log.warning("%s: %s; it is fetched from the beginning", shown(url), why)
            begin = 0
        first = _read(response)
        if not begin:
            _require_no_page(url, response, first)
            partial.unlink(missing_ok=True)  # before the record, as it belongs to the old one
            (folder / "record.json").write_text(json.dumps(asdict(said), indent=2))
        with (
            partial.open("ab" if begin else "wb") as file,
            tqdm(total=total, initial=begin, unit="B", unit_scale=True, desc=said.name[-40:], disable=None) as bar,
        ):
            block = first
            while block:
                file.write(block)
                bar.update(len(block))
                block = _read(response)
    size = partial.stat().st_size
    if total is not None and size != total:
        if size > total:
            partial.unlink()
        raise _Cut(f"the server sent {size:,} of {total:,} bytes")
    return said


@contextlib.contextmanager
def _open(request: urllib.request.Request, redirects: _Redirects, url: str, partial: Path) -> Iterator[_Answer]:
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            partial.unlink()
            raise _Cut("the file is shorter than the part fetched before") from None
        if error.code in AGAIN:
            raise _Cut(f"the server is not available (HTTP {error.code})") from None
        why = REFUSED.get(error.code, error.reason)
        raise ValueError(f"{shown(url)} cannot be fetched: {why} (HTTP {error.code}); {BY_HAND}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _lost(error, url, "no connection") from None
    with response:
        yield response


def _read(response: _Answer) -> bytes:
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _lost(error, "the answer", "the connection was lost") from None


def _lost(error: Exception, url: str, what: str) -> Exception:
    """What to raise when there is no answer: not `_Cut` where asking again cannot help."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return ValueError(f"{shown(url)}: the server's certificate is not valid ({reason.verify_message}); {BY_HAND}")
    if isinstance(reason, TimeoutError):
        return _Cut(f"nothing came for {TIMEOUT} seconds")
    return _Cut(f"{what} ({type(reason).__name__}: {redacted(str(reason))})")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to addresses that are allowed alone, and keeps what the Hub says of a file before it sends us on."""

    def __init__(self) -> None:
        self.linked: dict[str, str] = {}

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        require_address(newurl)
        if req.full_url.startswith("https:") and newurl.startswith("http:"):  # only possible to this machine
            raise ValueError(
                f"{shown(req.full_url)} redirects to {redacted(newurl)}, which is not encrypted; {BY_HAND}"
            )
        self.linked |= {key: headers[key] for key in ("X-Linked-Etag", "X-Linked-Size") if headers[key]}
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _record(url: str, response: _Answer, linked: Mapping[str, str]) -> Record:
    headers = response.headers
    etag = headers.get("ETag") or ""
    size = headers.get("Content-Length") or linked.get("X-Linked-Size") or ""
    digest = (linked.get("X-Linked-Etag") or headers.get("X-Linked-Etag") or "").strip('"')
    given = re.search(r'filename="?([^";]+)', headers.get("Content-Disposition") or "")
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    name = re.sub(r"[^\w.+-]", "_", (given[1] if given else path).rstrip("/").rpartition("/")[2]).lstrip(".")
    return Record(
        url=shown(url),
        name=name if name not in ("", "partial", "lock", "record.json") else "weights.pth",
        # A weak ETag does not identify the bytes.
        version=etag if etag.startswith('"') else headers.get("Last-Modified"),
        size=int(size) if size.isdigit() else None,
        sha256=digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None,
    )


def _require_no_page(url: str, response: _Answer, first: bytes) -> None:
    kind = (response.headers.get("Content-Type") or "").partition(";")[0]
    if kind == "text/html" or re.match(rb"\s*<(!doctype html|html)", first[:200], re.IGNORECASE):
        title = re.search(r"<title[^>]*>(.*?)</title>", first.decode(errors="replace"), re.IGNORECASE | re.DOTALL)
        called = f" ({redacted(html.unescape(title[1]))!r:.100})" if title else ""
        raise ValueError(
            f"{shown(url)} is a web page{called}, not a file, as where a login or an agreement is needed first: {BY_HAND}"
        )


def _read_record(folder: Path) -> Record | None:
    try:
        return Record(**json.loads((folder / "record.json").read_text()))
    except (OSError, ValueError, TypeError):  # there is none, or a killed process wrote half of it
        return None


@contextlib.contextmanager
def _alone(path: Path, url: str) -> Iterator[None]:
    """Until it ends, no other process fetches the same file; the one that waits finds it whole."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process fetches %s; waiting for it", shown(url))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _in_words(folder: Path) -> Iterator[None]:
    try:
        yield
    except ConnectionError:
        raise
    except OSError as error:
        why = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}.get(
            error.errno or 0, f"it cannot be written to ({error.strerror})"
        )
        raise OSError(f"{folder}: {why}. Free some space, or set XDG_CACHE_HOME to a folder with enough") from error


# ---- Google Drive ----------------------------------------------------------------------------------------------------


def _drive_id(url: str) -> str | None:
    """Of a file on Google Drive; None for another address.

    Raises:
        ValueError: it is a folder there, or nothing that is known.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.hostname not in DRIVE:
        return None
    found = re.search(r"/d/([\w-]+)", parts.path) or re.search(r"(?:^|&)id=([\w-]+)", parts.query)
    if found is None:
        what = "a folder" if "/folders/" in parts.path else "not a file"
        raise ValueError(
            f"{redacted(url)} is {what} on Google Drive: open it in a browser, and give the link of the file with the weights "
            "(https://drive.google.com/file/d/...), or download the file and give its path"
        )
    return found[1]


def _from_drive(identifier: str, folder: Path) -> tuple[Path, Record]:
    url = f"https://drive.google.com/file/d/{identifier}/view"
    try:
        import gdown
    except ImportError:
        raise ValueError(
            f"{url} is on Google Drive, which needs gdown: pip install 'clove-hub[drive]'; or {BY_HAND}"
        ) from None
    try:
        path = gdown.download(
            id=identifier, output=f"{folder}{os.sep}", resume=True, retries=TRIES, timeout=TIMEOUT, use_cookies=False,
            quiet=not sys.stderr.isatty(),
        )  # fmt: skip
    except OSError as error:
        if error.errno is not None:  # of the disk; those of its library for the network have none
            raise
        raise ConnectionError(f"{url}: {redacted(str(error))}. The same command resumes from there") from None
    except gdown.DownloadError as error:
        raise ValueError(f"{url} cannot be fetched: {redacted(str(error))}; {BY_HAND}") from None
    file = Path(str(path))  # its declared type includes streams
    record = Record(url=url, name=file.name, size=file.stat().st_size)
    (folder / "record.json").write_text(json.dumps(asdict(record), indent=2))
    return file, record
