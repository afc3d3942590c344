"""`engine serve` in a process of its own, on a free port."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

from tests.support.source_tree import ROOT


class ServedModel:
    """A running server. Leaving its block kills it; `output` is what it wrote so far."""

    def __init__(
        self, model: Path, *options: str, variables: Mapping[str, str] | None = None
    ) -> None:
        words = ["serve", "--model", str(model), "--port", "0", "--device", "cpu", *options]
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(variables or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *words],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | own,
        )
        assert self.process.stderr is not None
        self.output, match = "", None
        while match is None:
            line = self.process.stderr.readline()
            assert line, f"the server ended: {self.output}"
            self.output += line
            match = re.search(r"at http://(\S+):(\d+)/v1", self.output)
        self.port = int(match[2])
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.output += line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def connect(self) -> socket.socket:
        """A new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of one request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = None if body is None else json.dumps(body).encode()
            kind = {"content-type": "application/json"} if sent is not None else {}
            connection.request(method, path, sent, {**kind, **(headers or {})})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        """What `/health` says."""
        state = json.loads(self.request("GET", "/health")[1])
        assert isinstance(state, dict)
        return state

    def open_stream(self, prompt: str, tokens: int) -> socket.socket:
        """A connection on which an endless answer has begun to come."""
        body = json.dumps(
            {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
        )
        sock = self.connect()
        sock.sendall(completion_request(body.encode()))
        seen = b""
        while b"\r\n\r\n" not in seen:
            part = sock.recv(65536)
            assert part, seen
            seen += part
        return sock


def completion_request(body: bytes, *headers: bytes) -> bytes:
    """A request of `/v1/completions` as it is sent."""
    lines = [
        b"POST /v1/completions HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: application/json",
        *(headers or (b"Content-Length: %d" % len(body),)),
    ]
    return b"\r\n".join([*lines, b"", body])
