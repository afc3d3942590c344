"""Who may use the server, checked before any route.

A page in a browser can send requests to a server on the same machine. Two checks keep a page from
elsewhere out: its `Origin` must be the server's own or one that was allowed, and a server that
listens on this machine alone answers only under this machine's names, so that a foreign name that
was made to point here (DNS rebinding) is of no use.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serving.openai.api_errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEAD_BYTES, HEAD_FIELDS = 16 << 10, 100
"""Bytes and header fields of a request's head."""

_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST, OPTIONS",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}


@dataclass(frozen=True)
class AccessRules:
    """What requests must be like.

    Attributes:
        hosts: names under which the server answers; empty for any.
        origins: origins of pages that may use the server, beside its own; `*` is any.
        api_key: what `Authorization: Bearer` must bring; None for nothing.
        public: paths that need no key.
        body_bytes, body_seconds: how much a body may be, and how long it may take to come.
    """

    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    api_key: str | None = None
    public: frozenset[str] = frozenset({"/health"})
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0


class Guard:
    """ASGI middleware that holds requests to `rules` and answers the others itself."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # Nothing here speaks over WebSockets.
        headers = Headers(scope=scope)
        granted: dict[str, str] = {}
        try:
            _check_head(scope)
            self._check_host(headers)
            granted = self._check_origin(scope, headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _answer(send, 204, {**granted, **_PREFLIGHT}, b"")
                return
            self._check_key(scope["path"], headers)
            self._check_length(headers)
        except ApiError as error:
            await answer_error(send, error, granted)
            return
        body = _BoundedBody(receive, self._rules)
        await self._app(scope, body.receive, with_headers(send, granted))

    def _check_host(self, headers: Headers) -> None:
        if not self._rules.hosts:
            return
        name = host_name(headers.get("host", ""))
        if name not in self._rules.hosts:
            raise ApiError(
                403,
                f"the Host header names {name[:200]!r}; this server answers only as "
                f"{', '.join(sorted(self._rules.hosts))} (--allowed-host adds a name)",
                code="host_not_allowed",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> dict[str, str]:
        """The headers that let a page of an allowed origin read the answer."""
        origin = headers.get("origin")
        if origin is None:
            site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
            if site == "cross-site" and not (mode == "navigate" and scope["method"] == "GET"):
                raise _foreign("a page of another site")
            return {}
        own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}"
        if origin.lower() == own.lower():
            return {}
        allowed = self._rules.origins
        if origin.lower() not in allowed and "*" not in allowed:
            raise _foreign(f"a page from {origin[:200]!r}")
        return {"access-control-allow-origin": origin, "vary": "Origin",
                "access-control-expose-headers": "x-engine-ignored, x-request-id"}  # fmt: skip

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._rules.api_key
        if key is None or path in self._rules.public:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401,
                "this server needs an API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._rules.body_bytes:
            raise _too_large(self._rules.body_bytes)


class _BoundedBody:
    """`receive` that fails for a body that is too large or too slow."""

    def __init__(self, receive: Receive, rules: AccessRules) -> None:
        self._receive, self._rules = receive, rules
        self._size, self._whole = 0, False
        self._until = asyncio.get_running_loop().time() + rules.body_seconds

    async def receive(self) -> Message:
        """One message. Raises `ApiError` 413 or 408."""
        if self._whole:
            return await self._receive()  # The next is the client's leaving, whenever that is.
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {self._rules.body_seconds:g} s",
                headers={"connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._rules.body_bytes:
                raise _too_large(self._rules.body_bytes)
        return message


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def rules_for_host(
    bound: str, allowed_hosts: Iterable[str], origins: Iterable[str], api_key: str | None
) -> AccessRules:
    """The rules of a server that listens on the address `bound`."""
    names = {name.lower() for name in allowed_hosts}
    hosts = frozenset({*LOOPBACK, bound.lower(), *names} if is_local(bound) else names)
    cleaned = frozenset(origin.lower().rstrip("/") for origin in origins)
    return AccessRules(hosts=hosts, origins=cleaned, api_key=api_key)


def _check_head(scope: Scope) -> None:
    """A head that came in one piece is parsed whatever its size; here it is bounded."""
    size = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > HEAD_BYTES or len(scope["headers"]) > HEAD_FIELDS:
        raise ApiError(
            431,
            f"the head of the request has {size} bytes in {len(scope['headers'])} fields; at most "
            f"{HEAD_BYTES} in {HEAD_FIELDS} are read",
            headers={"connection": "close"},
        )


def _foreign(who: str) -> ApiError:
    return ApiError(
        403,
        f"{who} asks, and no page from elsewhere may use this server; --allow-origin names one "
        "that may",
        code="origin_not_allowed",
    )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes; shorten the request",
        code="request_too_large",
        headers={"connection": "close"},
    )


def with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """`send` that adds headers to the answer."""
    added = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return sender


async def answer_error(send: Send, error: ApiError, headers: dict[str, str]) -> None:
    """Answer with an error, in OpenAI's shape."""
    await _answer(send, error.status, {**headers, **error.headers}, json_bytes(error.body()))


def json_bytes(value: Any) -> bytes:
    """JSON in ASCII, which every transport carries."""
    return json.dumps(value, separators=(",", ":")).encode()


async def _answer(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    pairs += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
