"""A Hub on loopback: as much of its interface as publishing and loading need, with faults on demand.

The real client and timm talk to it over HTTP. It keeps everything in memory; with a folder for xet, files of
weights travel through hf_xet's local storage instead, and this server hands out the tokens that name it.

Only the standard library is imported here, because HF_ENDPOINT has to be set before huggingface_hub is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopbackTokenThatNobodyMayPrint"
READ_TOKEN = "hf_loopbackTokenThatMayOnlyRead"
USER, ORGANIZATION = "somebody", "acme"

FAULTS = {
    "cut": "the connection is cut, nothing was done",
    "lost": "it was done, the connection is cut before the answer",
    "503": "answered with 503, nothing was done",
    "429": "answered with 429 and Retry-After, nothing was done",
    "412": "answered with 412, nothing was done",
    "flipped": "one bit of the answer (of an upload: of what is stored) is flipped",
    "truncated": "the answer breaks off in the middle",
    "down": "from this request on no connection is answered",
}


@dataclass(frozen=True)
class Blob:
    content: bytes | None
    """None if it is in xet's storage."""
    size: int
    sha256: str
    lfs: bool
    xet: str | None = None

    @property
    def oid(self) -> str:
        """As git names it; of what git stores for a large file, the pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        stored = pointer if self.lfs else self.content or b""
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()


def regular(content: bytes) -> Blob:
    return Blob(content, len(content), hashlib.sha256(content).hexdigest(), lfs=False)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repository:
    private: bool
    main: str = ""
    commits: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: Mapping[str, Blob]) -> str:
        parent = self.main or None
        text = repr((parent, title, sorted((path, blob.sha256) for path, blob in files.items())))
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, dict(files))
        self.main = oid
        return oid

    def find(self, revision: str) -> Commit | None:
        oid = self.main if revision == "main" else self.tags.get(revision, revision)
        return self.commits.get(oid)

    @property
    def files(self) -> Mapping[str, Blob]:
        return self.commits[self.main].files

    @property
    def held(self) -> dict[str, bytes | None]:
        """What main holds, without the Hub's own file."""
        return {path: blob.content for path, blob in self.files.items() if path != ".gitattributes"}

    @property
    def sums(self) -> dict[str, str]:
        """The sha256 of what main holds, wherever that is stored, without the Hub's own file."""
        return {path: blob.sha256 for path, blob in self.files.items() if path != ".gitattributes"}


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def said(value: Any, status: int = 200, **headers: str) -> Answer:
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **names})


def refused(status: int, message: str, code: str | None = None) -> Answer:
    headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
    return said({"error": message}, status, **headers)


class LoopbackHub:
    """Runs while the `with` block does; `url` is what HF_ENDPOINT names."""

    def __init__(self, xet: Path | None = None, xet_hash: Callable[[str], str] | None = None) -> None:
        self.xet = xet
        self.xet_hash = xet_hash
        """Of the file with a sha256, which this server never gets to see."""
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.renamed: dict[str, str] = {}
        """New names of repositories by their old ones, which go on being answered."""
        self.private: bool | None = None
        """How every repository is whatever is asked for, if not None: other servers do not know all settings."""
        self.refusals: dict[str, Answer] = {}
        """What requests of a name are answered with, always."""
        self.storage: str | None = None
        """The address of the storage that uploads go to, if it has another host's name than the Hub."""
        self.ignored: set[str] = set()
        """Files that a .gitignore keeps out of commits."""
        self.requests: list[str] = []
        """Every one since `forget`, as `METHOD what`."""
        self.fault: tuple[int, str] | None = None
        """Number of the request that goes wrong, counted from 1, and how."""
        self.before: Callable[[str], None] | None = None
        """Called with each request's name before it is served: somebody else on the Hub."""
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def forget(self, fault: tuple[int, str] | None = None) -> None:
        """Starts counting requests anew, with another fault ahead or none."""
        with self.lock:
            self.requests, self.fault = [], fault

    def environment(self, home: Path) -> dict[str, str]:
        """What a process has to find in its environment to talk to this Hub, and keep its files in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "no_proxy": "127.0.0.1,localhost",
        }

    # ---- what is answered ----------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes, token: str | None) -> Answer:
        if token is not None and token not in (TOKEN, READ_TOKEN):
            return refused(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._whoami(token)
        if path == "/api/validate-yaml":
            return said({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if match := re.fullmatch(r"/upload/([0-9a-f]{64})", path):
            self.uploads[match[1]] = body
            return Answer(200)
        for pattern, serve in self._routes:
            if match := re.fullmatch(pattern, path):
                name = self.renamed.get(match["id"], match["id"])
                repository = self.repositories.get(name)
                if repository is None or (repository.private and token is None):
                    return refused(404 if token else 401, "Repository not found", "RepoNotFound")
                changes = method == "PUT" or (method == "POST" and "paths-info" not in path)
                if changes and token != TOKEN:
                    return refused(403, "This token may not write")
                return serve(self, name, repository, match.groupdict(), body)
        return refused(404, f"no such address: {path}", "EntryNotFound")

    def _whoami(self, token: str | None) -> Answer:
        if token is None:
            return refused(401, "Invalid username or password.")
        role = "write" if token == TOKEN else "read"
        organizations = [{"type": "org", "name": ORGANIZATION}]
        return said({"type": "user", "name": USER, "orgs": organizations, "auth": {"accessToken": {"role": role}}})

    def _create(self, wanted: dict[str, Any], token: str | None) -> Answer:
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if token != TOKEN or owner not in (USER, ORGANIZATION):
            return refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.repositories:
            return said({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        self.repositories[name] = Repository(self._wanted_private(wanted))
        self.repositories[name].commit("initial commit", {".gitattributes": regular(b"*.safetensors filter=lfs\n")})
        return said({"url": f"{self.url}/{name}", "name": name, "id": name})

    def _info(self, name: str, repository: Repository, at: dict[str, str], _: bytes) -> Answer:
        commit = repository.find(at.get("revision") or "main")
        if commit is None:
            return refused(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in commit.files]
        facts = {"id": name, "modelId": name, "sha": commit.oid, "private": repository.private, "siblings": siblings}
        return said(facts | {"tags": [], "downloads": 0, "likes": 0})

    def _tree(self, _: str, repository: Repository, at: dict[str, str], __: bytes) -> Answer:
        commit = repository.find(at["revision"])
        if commit is None:
            return refused(404, "Invalid rev id", "RevisionNotFound")
        return said([_entry(path, blob) for path, blob in sorted(commit.files.items())])

    def _paths(self, _: str, repository: Repository, at: dict[str, str], body: bytes) -> Answer:
        commit = repository.find(at["revision"])
        if commit is None:
            return refused(404, "Invalid rev id", "RevisionNotFound")
        wanted = parse_qs(body.decode())["paths"]
        return said([_entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def _refs(self, _: str, repository: Repository, __: dict[str, str], ___: bytes) -> Answer:
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repository.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.main}
        return said({"branches": [main], "converts": [], "tags": tags})

    def _preupload(self, _: str, repository: Repository, __: dict[str, str], body: bytes) -> Answer:
        files = []
        for wanted in json.loads(body)["files"]:
            there = repository.files.get(wanted["path"])
            oid = there and (there.sha256 if there.lfs else there.oid)
            mode = "lfs" if wanted["path"].endswith((".safetensors", ".bin")) else "regular"
            ignored = wanted["path"] in self.ignored
            files.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return said({"files": files})

    def _batch(self, name: str, _: Repository, __: dict[str, str], body: bytes) -> Answer:
        order, objects = json.loads(body), []
        for wanted in order["objects"]:
            actions = {
                "upload": {"href": f"{self.storage or self.url}/upload/{wanted['oid']}?Signature=secret"},
                "verify": {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"},
            }
            held = {} if wanted["oid"] in self.uploads else {"actions": actions}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | held)
        xet = self.xet is not None and "xet" in order["transfers"]  # older clients ask here
        return said({"transfer": "xet" if xet else "basic", "objects": objects})

    def _verify(self, _: str, __: Repository, ___: dict[str, str], body: bytes) -> Answer:
        oid = json.loads(body)["oid"]
        if hashlib.sha256(self.uploads.get(oid, b"")).hexdigest() == oid:
            return said({})
        self.uploads.pop(oid, None)
        return refused(422, "What was uploaded is not what was announced")

    def _commit(self, name: str, repository: Repository, _: dict[str, str], body: bytes) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.main):
            return refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = regular(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                oid, size = value["oid"], value["size"]
                if self.xet is not None and self.xet_hash is not None:
                    files[value["path"]] = Blob(None, size, oid, lfs=True, xet=self.xet_hash(oid))
                elif oid in self.uploads:
                    files[value["path"]] = Blob(self.uploads[oid], size, oid, lfs=True)
                else:
                    return refused(400, f"the file {value['path']} was never uploaded")
            else:
                files.pop(value["path"], None)
        oid = repository.commit(header["summary"], files)
        return said({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"})

    def _tag(self, _: str, repository: Repository, at: dict[str, str], body: bytes) -> Answer:
        tag, commit = json.loads(body)["tag"], repository.find(at["revision"])
        if commit is None:
            return refused(404, "Invalid rev id", "RevisionNotFound")
        if tag in repository.tags:
            return refused(409, "Tag reference exists already")
        repository.tags[tag] = commit.oid
        return said({})

    def _settings(self, _: str, repository: Repository, __: dict[str, str], body: bytes) -> Answer:
        wanted = json.loads(body)
        repository.private = self._wanted_private(wanted)
        return said({"private": repository.private})

    def _wanted_private(self, wanted: dict[str, Any]) -> bool:
        asked = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return asked if self.private is None else self.private

    def _xet_token(self, _: str, __: Repository, ___: dict[str, str], ____: bytes) -> Answer:
        if self.xet is None:
            return refused(404, "no xet here")
        address, expires = f"local://{self.xet}", int(time.time()) + 3600
        return said(
            {"casUrl": address, "accessToken": "xet", "exp": expires},
            X_Xet_Cas_Url=address,
            X_Xet_Access_Token="xet",
            X_Xet_Token_Expiration=str(expires),
        )

    def _resolve(self, name: str, repository: Repository, at: dict[str, str], _: bytes) -> Answer:
        commit = repository.find(at["revision"])
        if commit is None:
            return refused(404, "Invalid rev id", "RevisionNotFound")
        blob = commit.files.get(at["path"])
        if blob is None:
            missing = refused(404, "Entry not found", "EntryNotFound")
            missing.headers["X-Repo-Commit"] = commit.oid
            return missing
        etag = blob.sha256 if blob.lfs else blob.oid
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "X-Linked-Size": str(blob.size)}
        if blob.xet is not None:
            headers["X-Xet-Hash"] = blob.xet
            headers["Link"] = f'<{self.url}/api/models/{name}/xet-read-token/{commit.oid}>; rel="xet-auth"'
        return Answer(200, blob.content if blob.content is not None else bytes(blob.size), headers)

    _MODEL = r"/api/models/(?P<id>[^/]+/[^/]+)"
    _FILES = r"/(?P<id>[^/]+/[^/]+?)"
    _routes: tuple[tuple[str, Callable[..., Answer]], ...] = (
        (_MODEL, _info),
        (_MODEL + r"/revision/(?P<revision>[^/]+)", _info),
        (_MODEL + r"/tree/(?P<revision>[^/]+)", _tree),
        (_MODEL + r"/paths-info/(?P<revision>[^/]+)", _paths),
        (_MODEL + r"/refs", _refs),
        (_MODEL + r"/preupload/(?P<revision>[^/]+)", _preupload),
        (_MODEL + r"/commit/main", _commit),
        (_MODEL + r"/tag/(?P<revision>[^/]+)", _tag),
        (_MODEL + r"/settings", _settings),
        (_MODEL + r"/xet-(?:read|write)-token/(?P<revision>[^/]+)", _xet_token),
        (_FILES + r"\.git/info/lfs/objects/batch", _batch),
        (_FILES + r"\.git/info/lfs/objects/verify", _verify),
        (_FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
    )


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry | ({"xetHash": blob.xet} if blob.xet else {})


class _Handler(BaseHTTPRequestHandler):
    """HTTP around `LoopbackHub.answer`, and the faults."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = self._chunks()
        url = urlsplit(self.path)
        path, hub = unquote(url.path), self.hub
        with hub.lock:
            name = _named(self.command, path)
            hub.requests.append(name)
            fault = None
            if hub.fault is not None:
                number, kind = hub.fault
                if len(hub.requests) == number or (kind == "down" and len(hub.requests) > number):
                    fault = kind
            if hub.before is not None:
                hub.before(name)
            if fault in ("cut", "down"):
                return self._cut()
            if fault in ("503", "412", "429"):
                answer = refused(int(fault), "a fault of this test")
                return self._send(replace(answer, headers=answer.headers | {"Retry-After": "7"}), fault)
            if hub.refusals and (refusal := hub.refusals.get(name)):
                return self._send(refusal, fault)
            if fault == "flipped" and self.command == "PUT" and path.startswith("/upload/"):
                body, fault = _flip(body), None
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            answer = hub.answer(self.command, path, parse_qs(url.query), body, token)
        if fault == "lost":
            return self._cut()
        return self._send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def _send(self, answer: Answer, fault: str | None) -> None:
        body = answer.body
        if fault == "flipped" and body:
            body = _flip(body)
        with suppress(ConnectionError):
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if fault == "truncated" else body)
            self.wfile.flush()
        if fault == "truncated":
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content


def _flip(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _named(method: str, path: str) -> str:
    """A request without what differs from one run to the next: `POST commit`, `GET resolve config.json`."""
    path = re.sub(r"/(resolve)/[^/]+/", r"/\1/", path)
    path = re.sub(r"/(tree|revision|paths-info|preupload|commit|tag|xet-\w+-token)/[^/]+$", r"/\1", path)
    path = re.sub(r"/upload/.*", "/upload", path)
    path = re.sub(r"^/api/models/[^/]+/[^/]+$", "/info", path)
    path = re.sub(
        r"^(/api/models)?/[^/]+/[^/]+?(\.git/info|)/(?=resolve|tree|revision|paths|preup|com|tag|xet|refs|set|lfs)",
        "/",
        path,
    )
    return f"{method} {path.removeprefix('/').removeprefix('api/').replace('/', ' ')}"
