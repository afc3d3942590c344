"""Requests that are nearly right, as bytes, and what a server makes of them.

`python -m tests.support.request_fuzzer MODEL COUNT [SEED]` sends COUNT of them to a server of its
own and prints how often each status came.
"""

from __future__ import annotations

import json
import random
import socket
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.support.processes.served import ServedModel

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_SEEDS: list[tuple[str, dict[str, Any]]] = [
    (_TEXT, {"model": "tiny", "prompt": "abc", "max_tokens": 2, "logprobs": 2, "echo": True}),
    (_TEXT, {"prompt": [5, 6, 7], "max_tokens": 1, "stop": ["a", "b"], "seed": 3, "n": 2}),
    (_TEXT, {"prompt": ["a", "b"], "max_tokens": 1, "stream": True, "logit_bias": {"5": -1}}),
    (_CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "top_p": 0.5}),
    (
        _CHAT,
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
                {"role": "user", "content": "Hi"},
            ],
            "tools": [_TOOL],
            "tool_choice": "auto",
            "max_completion_tokens": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 1,
        },
    ),
]
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2.5, 1e300, -(2**63), 2**64, 10**200, "", "a", "\x00", "\ud7ff",
    "日本", "\U0001f389" * 9, "x" * 5000, [], [[]], {}, {"": {}}, [None], ["a", 1], {"type": "a"},
    [{"role": "user", "content": "x"}] * 3, [[[[[[1]]]]]], "NaN", [1e308, -1e308], {"5": "x"},
]  # fmt: skip
_PATHS = ["/", "/v1", "/v1/chat/completions/", "/v1/models/%ff%fe", "/%00", "/v1/models/..%2f..",
          "/health?x=%", "//v1/models", "/v1/completions?" + "a" * 3000, "*", "http://evil/v1/models",
          "/v1/\xe9", "/metrics;x", "/.env", "/v1/embeddings"]  # fmt: skip
_PATIENCE = 600.0
"""Seconds for an answer: what a busy machine takes for the longest one is no hang."""

_METHODS = ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "FOO", "post", "P OST"]
_HEADERS = [
    b"Content-Type: text/html", b"Content-Type: \xff\xfe", b"Content-Encoding: br",
    b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", b"Expect: nothing",
    b"Host: evil.example",
    b"Origin: https://evil.example", b"Origin: null", b"X: " + b"y" * 20_000,
    b": empty", b"No colon",
    b"Upgrade: websocket\r\nConnection: Upgrade", b"Content-Length: 5\r\nContent-Length: 6",
    b"Sec-Fetch-Site: cross-site", b"Authorization: Bearer \xff", b"X\x00Y: z",
]  # fmt: skip


def fuzzed(generator: random.Random) -> bytes:
    """One request that has been spoilt in one to three respects."""
    path, body = generator.choice(_SEEDS)
    method, headers = "POST", [b"Content-Type: application/json", b"Host: localhost"]
    value = json.loads(json.dumps(body))
    data = b""
    for kind in generator.choices(
        ("value", "key", "bytes", "path", "method", "header", "encoding", "junk"),
        weights=(8, 3, 5, 1, 1, 2, 1, 1),
        k=generator.randint(1, 3),
    ):
        if kind == "value":
            _spoil(generator, value)
        elif kind == "key":
            name = generator.choice([*value, "extra"])
            value[_shaken(generator, name)] = value.pop(name, deepcopy(generator.choice(_VALUES)))
        elif kind == "bytes":
            data = _shaken_bytes(generator, json.dumps(value).encode())
        elif kind == "path":
            path = generator.choice(_PATHS)
        elif kind == "method":
            method = generator.choice(_METHODS)
        elif kind == "header":
            headers.insert(generator.randint(0, 2), generator.choice(_HEADERS))
        elif kind == "encoding":
            data = json.dumps(value, ensure_ascii=False).encode(
                generator.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")), "replace"
            )
        else:
            return generator.randbytes(generator.randint(1, 300)) + b"\r\n\r\n"
    data = data or json.dumps(value, ensure_ascii=generator.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )
    line = f"{method} {path} HTTP/1.1".encode("latin-1")
    last = [b"Content-Length: %d" % len(data), b"Connection: close", b"", data]
    return b"\r\n".join([line, *headers, *last])


def _spoil(generator: random.Random, value: Any) -> None:
    """Replace, remove or add one value at some depth."""
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = generator.choice(keys)
        inner = value[key]
        if isinstance(inner, dict | list) and inner and generator.random() < 0.5:
            value = inner
            continue
        if generator.random() < 0.2:
            del value[key]
        else:
            value[key] = deepcopy(generator.choice(_VALUES))
        return


def _shaken(generator: random.Random, name: str) -> str:
    at = generator.randint(0, len(name))
    return generator.choice((name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name.upper()))


def _shaken_bytes(generator: random.Random, data: bytes) -> bytes:
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(data) or 1)
        kind = generator.randrange(4)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + generator.randbytes(generator.randint(1, 4)) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + 1 :]
        else:
            data = data[:at] + bytes([generator.randrange(256)]) + data[at + 1 :]
    return data


def outcome(port: int, request: bytes) -> str:
    """The status that a request got, and what is wrong with the answer, if anything."""
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as sock:
        answer = b""
        try:
            sock.sendall(request)
            while part := sock.recv(65536):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            pass
    if not answer:
        return "closed"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    if status < 300:
        return str(status)
    try:
        reason = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{status} without a reason: {answer[:300]!r}"
    return (
        str(status)
        if status < 500 and reason and b"Traceback" not in body
        else f"{status} {reason}"
    )


def campaign(server: ServedModel, count: int, seed: int) -> Counter[str]:
    """How often each outcome came of `count` requests."""
    requests = [fuzzed(random.Random(f"{seed}/{number}")) for number in range(count)]
    with ThreadPoolExecutor(64) as pool:  # some wait for the server's patience to end
        return Counter(pool.map(lambda request: outcome(server.port, request), requests))


def main(model: str, count: str, seed: str = "0") -> None:
    with ServedModel(Path(model), "--name", "tiny") as server:
        print(json.dumps(campaign(server, int(count), int(seed)), indent=1))
        print(server.health(), len(server.output), "Traceback" in server.output)


if __name__ == "__main__":
    main(*sys.argv[1:])
