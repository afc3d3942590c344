"""Listen, serve, and stop in good order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from engine.errors import ConfigError
from engine.serving.connections import Patience, PatientProtocol
from engine.serving.guards import HEAD_BYTES
from engine.serving.model_thread import ModelThread
from engine.serving.openai.api_errors import ApiError

log = logging.getLogger(__name__)

SHUTTING_DOWN = ApiError(
    503, "the server is shutting down; ask again when it is back", code="shutting_down"
)
_SIGNALS = ("SIGINT", "SIGTERM")
_CLOSING_SECONDS = 5
_SPARE_FILES = 256


class HttpServer(uvicorn.Server):
    """uvicorn's server with our way to stop.

    The first signal stops listening, refuses what waits, and gives what has begun `grace` seconds.
    The second ends the process at once.
    """

    def __init__(
        self, app: ASGIApp, thread: ModelThread, grace: float, patience: Patience | None = None
    ) -> None:
        self._patience = patience or Patience()
        protocol = partial(PatientProtocol, patience=self._patience)
        super().__init__(
            uvicorn.Config(
                app,
                http=cast(Any, protocol),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=int(self._patience.idle),
                timeout_graceful_shutdown=_CLOSING_SECONDS,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self._model, self._grace = thread, grace

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals inside the block; outside the main thread nothing is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {
            number: signal.signal(number, self.handle_exit)
            for number in (getattr(signal, name) for name in _SIGNALS)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ask for a stop; when that was asked for already, end."""
        if self.should_exit:
            os.write(2, b"engine: Stopped at once.\n")
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse what waits, finish what has begun or refuse it after a while, and close."""
        model = self._model
        log.info(
            "Stopping: %d answers have begun and get %g s, %d that wait are refused. A second "
            "signal ends at once.",
            model.running, self._grace, model.waiting,
        )  # fmt: skip
        for server in self.servers:
            server.close()
        model.drain(SHUTTING_DOWN)
        until = time.monotonic() + self._grace
        while model.running and model.alive and time.monotonic() < until:
            await asyncio.sleep(0.05)
        if model.running:
            log.warning("%d answers were not finished in time and are refused.", model.running)
        await asyncio.to_thread(model.stop, SHUTTING_DOWN)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"The server cannot listen on {host} port {port}: {reason}. Choose another --port, or "
            "an address of this machine as --host."
        ) from None


def address_of(sock: socket.socket) -> str:
    """Where a listening socket is reached, as the beginning of a URL."""
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def allow_many_files(connections: int) -> None:
    """Let the process open a file for every connection, as far as the system lets it."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _SPARE_FILES
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
