"""Let only this machine's pages ask a server on 127.0.0.1.

A browser lets any site send requests to 127.0.0.1, and a site whose name is made to point there may
even read the answers (DNS rebinding). The names that the browser itself reports tell them apart:
`Host` must be a name of this machine, and `Origin`, where there is one, the same as `Host`.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.pages.assets import HEADERS

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


class LocalAccess:
    """ASGI middleware that answers 403, with the reason, to whoever is not of this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        reason = refusal(Request(scope)) if scope["type"] == "http" else None
        if reason is None:
            await self.app(scope, receive, send)
            return
        await PlainTextResponse(f"{reason}\n", 403, HEADERS)(scope, receive, send)


def refusal(request: Request) -> str | None:
    """Why a request is refused; None where it is not."""
    host = request.headers.get("host", "")
    if _name(host) not in LOCAL_NAMES:
        return (
            f"This page is only for this machine, and was asked for as {host[:100]!r}. "
            f"Open it as http://127.0.0.1:PORT."
        )
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return f"Another site ({origin[:100]!r}) may not read this page."
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _navigates(
        request
    ):
        return "Another site may not read this page."
    return None


def _name(host: str) -> str:
    """The name in `name:port`."""
    name, colon, port = host.rpartition(":")
    return (name if colon and (port.isdecimal() and not host.endswith("]")) else host).lower()


def _navigates(request: Request) -> bool:
    """Whether a person followed a link here, which reads nothing back to where it stood."""
    return request.headers.get("sec-fetch-mode") == "navigate"
