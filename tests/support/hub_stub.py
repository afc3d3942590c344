"""A stand-in of the hub's HTTP API on 127.0.0.1: listing, downloads, uploads, commits.

What it answers follows huggingface_hub's client. A repository's `fault` makes it answer as the hub
does for what cannot be had.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "X-Signature=storage-secret"
_FAULTS = {
    "missing": (401, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "revision": (404, "RevisionNotFound"),
    "forbidden": (403, None),
    "expired": (401, None),
    "broken": (500, None),
}


@dataclass
class StubRepository:
    """Files at one commit, which the branch `main` means, and what has been done to them."""

    files: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None
    private: bool = False
    revisions: tuple[str, ...] = ("main", COMMIT)
    messages: list[str] = field(default_factory=list)


class HubStub(ThreadingHTTPServer):
    """`repositories` by id, every request as (method, path), and the token that may write."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, StubRepository] = {}
        self.requests: list[tuple[str, str]] = []
        self.token = "hf_canary0token0value"
        self.storage: dict[str, bytes] = {}
        self.silent_for = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """The files that were downloaded, in order."""
        return [
            path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/resolve/main/")[2]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


@contextmanager
def running_stub() -> Iterator[HubStub]:
    """The server, answering until the block ends."""
    with HubStub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def client_of(stub: HubStub, cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Point huggingface_hub, which reads its settings as it is imported, at `stub`."""
    import huggingface_hub

    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    template = stub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", stub.token)
    yield
    huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    server: HubStub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._route(self._path("GET"), with_body=True)

    def do_HEAD(self) -> None:
        self._route(self._path("HEAD"), with_body=False)

    def do_PUT(self) -> None:
        path = self._path("PUT")
        self.server.storage[path.rpartition("/")[2]] = self._body()
        self._json({})

    def do_POST(self) -> None:
        path, body = self._path("POST"), self._body()
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._fail(401, None)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        name, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        repository = self.server.repositories[name]
        if repository.fault is not None:
            return self._fail(*_FAULTS[repository.fault])
        if action == "preupload":
            return self._json({"files": [self._mode(f) for f in json.loads(body)["files"]]})
        return self._commit(name, [json.loads(line) for line in body.splitlines()])

    def _path(self, method: str) -> str:
        time.sleep(self.server.silent_for)
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((method, path))
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _route(self, path: str, *, with_body: bool) -> None:
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {self.server.token}":
                return self._fail(401, None)
            return self._json({"type": "user", "name": "org", "orgs": []})
        if "/resolve/" in path:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            return self._file(name, revision, file, with_body)
        name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        repository = self.server.repositories.get(name)
        if repository is None:
            return self._fail(401, "RepoNotFound")
        if repository.fault in _FAULTS:
            return self._fail(*_FAULTS[repository.fault])
        if revision and revision not in repository.revisions:
            return self._fail(404, "RevisionNotFound")
        files = [{"rfilename": f, "size": len(data)} for f, data in repository.files.items()]
        listed = {"id": name, "sha": COMMIT, "siblings": files, "private": repository.private}
        return self._json(listed)

    def _file(self, name: str, revision: str, file: str, with_body: bool) -> None:
        repository = self.server.repositories.get(name, StubRepository())
        if revision not in repository.revisions:
            return self._fail(404, "RevisionNotFound")
        if file not in repository.files:
            return self._fail(404, "EntryNotFound")
        data = repository.files[file]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if with_body:
            cut = repository.fault == "cut" and len(data) > 1000
            self.wfile.write(data[start : len(data) // 2] if cut else data[start:])
            self.close_connection = cut
        return None

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        if name in self.server.repositories:
            return self._json({"url": f"{self.server.url}/{name}", "error": "exists"}, 409)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.repositories[name] = StubRepository(private=private)
        return self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".gguf", "tokenizer.json"))
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _batch(self, asked: dict[str, Any]) -> None:
        def action(item: dict[str, Any]) -> dict[str, Any]:
            href = f"{self.server.url}/storage/{item['oid']}?{SIGNATURE}"
            return {**item, "actions": {"upload": {"href": href}}}

        self._json({"transfer": "basic", "objects": [action(o) for o in asked["objects"]]})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.storage[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _fail(self, status: int, code: str | None) -> None:
        self._json({"error": "as the test asked for"}, status, code)

    def _json(self, value: Any, status: int = 200, code: str | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
