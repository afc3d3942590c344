"""Serve a page on 127.0.0.1 until Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Callable

from starlette.types import ASGIApp

from engine.serving.server import address_of

ADDRESS = "127.0.0.1"


def serve_page(app: ASGIApp, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer until Ctrl-C or SIGTERM; `ready` is told the address as soon as it can be opened."""
    import uvicorn

    ready(f"{address_of(listener)}/")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    uvicorn.Server(config).run(sockets=[listener])
