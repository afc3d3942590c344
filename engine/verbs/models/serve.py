"""`engine serve`: answer requests over HTTP, as OpenAI's interface has them."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.tasks.serving import ServeSettings
from engine.device import resolve_device
from engine.errors import ConfigError
from engine.training.determinism import deterministic

if TYPE_CHECKING:
    from engine.serving.service import Service

log = logging.getLogger(__name__)

SHORTEST_KEY = 16
"""Characters of a key on a server that others can reach."""


def serve(model: str | Path, **options: Any) -> None:
    """Serve a model until the process is told to stop.

    Args:
        model: Hugging Face directory, hub id or .gguf file.
        options: the other settings of `ServeSettings`.

    Raises:
        ConfigError: a setting cannot be used, or a package is missing.
        CheckpointError: the model or an adapter cannot be read.
    """
    run(ServeSettings(model=str(model), **options))


def run(settings: ServeSettings) -> None:
    """Serve as `settings` ask, until a signal. Raises as `serve`."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"engine serve needs {' and '.join(missing)}, which the extra `serve` brings: "
            "pip install 'engine-trainer[serve]'"
        )
    from engine.serving.guards import is_local
    from engine.serving.server import address_of, listen

    key = checked_key(settings, is_local(settings.host))
    device = resolve_device(settings.device)
    sock = listen(settings.host, settings.port)  # a port that is taken is told before a long load
    with sock, deterministic(device, settings.deterministic):
        from engine.serving.load_service import load_service

        service = load_service(settings)
        log.info("Serving %s at %s/v1. Ctrl-C stops.", ", ".join(service.models), address_of(sock))
        _serve_until_stopped(service, settings, sock, key)


def checked_key(settings: ServeSettings, local: bool) -> str | None:
    """The API key, if any. Raises `ConfigError` where others could use the server without one."""
    key = settings.api_key or os.environ.get("ENGINE_API_KEY") or None
    if key is None and not local:
        raise ConfigError(
            f"On {settings.host} other machines can reach the server, so it needs an API key: set "
            "ENGINE_API_KEY to a long random text (python -c 'import secrets; "
            "print(secrets.token_urlsafe(32))'), or listen on 127.0.0.1."
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("The API key must be of visible ASCII characters, without spaces.")
    if key is not None and not local and len(key) < SHORTEST_KEY:
        raise ConfigError(
            f"The API key has {len(key)} characters, and other machines can reach the server and "
            f"try keys: use at least {SHORTEST_KEY} random ones."
        )
    return key


def _serve_until_stopped(
    service: Service, settings: ServeSettings, sock: Any, key: str | None
) -> None:
    from engine.pages.assets import page_routes
    from engine.serving.app import build_app
    from engine.serving.connections import Patience
    from engine.serving.guards import rules_for_host
    from engine.serving.server import HttpServer, address_of, allow_many_files

    rules = rules_for_host(settings.host, settings.allowed_host, settings.allow_origin, key)
    rules = replace(rules, body_bytes=int(settings.max_body * (1 << 20)))
    page = page_routes("chat") if settings.ui else []
    if settings.ui:
        # The page is the same for everybody; what it asks for needs the key.
        rules = replace(rules, public=rules.public | {route.path for route in page})
        log.info("Chats in a browser: %s/", address_of(sock))
    allow_many_files(settings.max_connections)
    server = HttpServer(
        build_app(service, rules, page),
        service.thread,
        settings.shutdown_timeout,
        Patience(most=settings.max_connections),
    )
    service.thread.start()
    server.run(sockets=[sock])
