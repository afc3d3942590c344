"""Serve an application in a thread of the test's own process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from engine.serving.server import address_of, listen


@contextmanager
def served(app: Starlette, port: int = 0) -> Iterator[str]:
    """The address under which `app` answers while the block runs."""
    listener = listen("127.0.0.1", port)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"{address_of(listener)}/"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
