"""Static files of the pages, and the headers that every answer carries.

A page is HTML, one style sheet and one script, delivered as they lie in `static`. Nothing comes
from elsewhere, and no script or style stands inside the HTML: the policy would refuse both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC = Path(__file__).parent / "static"
PAGES = ("board", "chat")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def page_routes(page: str) -> list[Route]:
    """Routes of one of `PAGES`: `/`, its style sheet, its script and its icon."""
    files = {"/": f"{page}.html"}
    files |= {f"/{name}": name for name in ("page.css", "page.js", "icon.svg")}
    return [_file_route(path, STATIC / name) for path, name in files.items()]


def _file_route(path: str, file: Path) -> Route:
    def deliver(request: Request) -> Response:
        return tagged(request, file.read_bytes(), _KINDS[file.suffix])

    return Route(path, deliver)


def json_answer(request: Request, value: Any, status: int = 200) -> Response:
    """`value` as JSON; nothing but status 304 where the browser has it already."""
    body = json.dumps(value, allow_nan=False).encode()
    return tagged(request, body, "application/json", status)


def tagged(request: Request, body: bytes, kind: str, status: int = 200) -> Response:
    """An answer that is not sent again while it stays the same, with all of `HEADERS`."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:24]}"'
    headers = HEADERS | {"ETag": tag}
    if status == 200 and request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, status, headers, f"{kind}; charset=utf-8")
