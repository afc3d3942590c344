"""Serve a page on 127.0.0.1 until Ctrl-C."""

from __future__ import annotations

import socket
from collections.abc import Callable

from starlette.types import ASGIApp

from engine.errors import ConfigError

ADDRESS = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1; port 0 takes any that is free. Raises `ConfigError`."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Port {port} of {ADDRESS} cannot be used: {error.strerror}. Another program, or "
            "another `engine board`, may have it: choose one with --port, or any free one with "
            "--port 0."
        ) from None
    return listener


def serve_page(app: ASGIApp, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer until Ctrl-C or SIGTERM; `ready` is told the address as soon as it can be opened."""
    import uvicorn

    ready(f"http://{ADDRESS}:{listener.getsockname()[1]}/")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    uvicorn.Server(config).run(sockets=[listener])
