"""Connections that are bounded in number and patience, on uvicorn's HTTP/1.1 protocol."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from engine.serving.guards import json_bytes
from engine.serving.openai.api_errors import ApiError


@dataclass
class Patience:
    """How long a client may take, in seconds, and how many may be connected.

    Attributes:
        head: from the connection, or the first byte, to the end of the headers.
        reading: until a client goes on reading an answer that fills its buffers.
        idle: between two requests.
        most: connections; beyond it the oldest without a request gives way.
        quiet: connections without a request under way, the oldest first.
    """

    head: float = 10.0
    reading: float = 60.0
    idle: float = 30.0
    most: int = 2048
    quiet: dict[PatientProtocol, None] = field(default_factory=dict)


class PatientProtocol(H11Protocol):
    """HTTP/1.1 for one connection, which is closed when its client keeps it waiting."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        patience: Patience | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._patience = patience or Patience()
        self._head_clock: asyncio.TimerHandle | None = None
        self._write_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        quiet = self._patience.quiet
        quiet[self] = None
        if len(self.connections) > self._patience.most:
            next(iter(quiet)).transport.abort()
        self._head_clock = self.loop.call_later(self._patience.head, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.quiet.pop(self, None)
        for clock in (self._head_clock, self._write_clock):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way:
            self._patience.quiet.pop(self, None)
        if under_way and self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None
        elif not under_way and self._head_clock is None:
            self._head_clock = self.loop.call_later(self._patience.head, self._end)

    def on_response_complete(self) -> None:
        self._patience.quiet[self] = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_clock = self.loop.call_later(self._patience.reading, self._end)

    def resume_writing(self) -> None:
        if self._write_clock is not None:
            self._write_clock.cancel()
            self._write_clock = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Say in JSON what cannot be read as HTTP, unless an answer is on its way already."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = ApiError(400, "the request is not HTTP/1.1, or its head is too large")
            body = json_bytes(error.body())
            head = h11.Response(
                status_code=400,
                headers=[
                    ("content-type", "application/json"),
                    ("content-length", str(len(body))),
                    ("connection", "close"),
                ],
                reason=b"Bad Request",
            )
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _end(self) -> None:
        """Close at once: what has not been sent by now has no reader."""
        self.transport.abort()
