"""The application: OpenAI's routes, health and metrics, behind the guards.

Further routes, such as a page, are mounted through `extra_routes`.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serving.guards import AccessRules, Guard, answer_error, with_headers
from engine.serving.metrics import CONTENT_TYPE, Metrics
from engine.serving.openai.api_errors import ApiError, Notes
from engine.serving.openai.fields import parse_body
from engine.serving.routes import answer_chat, answer_completion
from engine.serving.service import ServedModel, Service

log = logging.getLogger(__name__)

_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json\b")
Answering = Callable[[Service, Mapping[str, Any], Notes], Awaitable[Response]]


def build_app(
    service: Service, rules: AccessRules | None = None, extra_routes: Sequence[BaseRoute] = ()
) -> ASGIApp:
    """The server's application.

    Args:
        service: what answers; routes find it as `request.app.state.service`.
        rules: who may use it; by default anybody who can reach it.
        extra_routes: further routes. They need the API key as all do, but for the paths in
            `rules.public`.
    """
    routes: list[BaseRoute] = [
        Route("/health", _health),
        Route("/metrics", _metrics),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/v1/completions", _generating(answer_completion), methods=["POST"]),
        Route("/v1/chat/completions", _generating(answer_chat), methods=["POST"]),
        *extra_routes,
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    paths = (getattr(route, "path", "") for route in routes)
    return Observed(Guard(app, rules or AccessRules()), service.metrics, frozenset(paths))


class Observed:
    """ASGI middleware that counts and logs requests, names them, and answers what nobody caught.

    The log has path, status and time, and nothing of what was asked or answered.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        number, started, status = secrets.token_hex(8), time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        answer = with_headers(noting, {"x-request-id": number, "x-content-type-options": "nosniff"})
        try:
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            log.debug("%s: the client left before its request was whole.", number)
        except ApiError as error:  # from the body of a request, while a route read it
            if not status:
                await answer_error(answer, error, {})
        except Exception as error:
            log.error("Request %s failed.", number, exc_info=error)
            if not status:
                text = f"the server failed; its log has the reason under {number}"
                await answer_error(answer, ApiError(500, text, code="internal_error"), {})
        finally:
            route = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count(self._metrics.requests, route, str(status or "left"))
            seconds = time.monotonic() - started
            quiet = scope["method"] == "GET" and status < 400
            log.log(
                logging.DEBUG if quiet else logging.INFO,
                "%s %s %s: %s after %.2f s",
                number,
                scope["method"][:16],
                route,
                status or "left",
                seconds,
            )


def _generating(answer: Answering) -> Callable[[Request], Awaitable[Response]]:
    """A route that reads JSON and answers with what a model writes."""

    async def endpoint(request: Request) -> Response:
        kind = request.headers.get("content-type", "")
        if not _JSON.match(kind.strip().lower()):
            raise ApiError(
                415,
                f"the content type is {kind[:100]!r}; send JSON as application/json",
                headers={"connection": "close"},
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(
                415,
                "compressed bodies are not read; send the JSON as it is",
                headers={"connection": "close"},
            )
        body = await request.body()
        return await answer(request.app.state.service, parse_body(body), Notes())

    return endpoint


async def _health(request: Request) -> Response:
    """200 while requests are answered; 503 with the reason otherwise."""
    thread = request.app.state.service.thread
    problem = thread.problem()
    state = {"running": thread.running, "waiting": thread.waiting}
    if problem is None:
        return JSONResponse({"status": "ok", **state})
    return JSONResponse({"status": "failed", "reason": str(problem), **state}, 503)


async def _metrics(request: Request) -> Response:
    text = request.app.state.service.metrics.text()
    return Response(text, headers={"content-type": CONTENT_TYPE})


async def _models(request: Request) -> Response:
    service: Service = request.app.state.service
    entries = [_entry(service, model) for model in service.models.values()]
    return JSONResponse({"object": "list", "data": entries})


async def _model(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse(_entry(service, service.model(request.path_params["name"])))


def _entry(service: Service, model: ServedModel) -> dict[str, Any]:
    base = next(iter(service.models))
    return {
        "id": model.name,
        "object": "model",
        "created": service.created,
        "owned_by": "engine",
        "parent": None if model.adapter is None else base,
        "max_model_len": service.bounds.context,
    }


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"there is no route {request.url.path[:200]}; see /v1/models and docs/serving.md"
    elif error.status_code == 405:
        message = f"{request.method[:16]} is not a method of {request.url.path[:200]}"
    else:
        message = str(error.detail)
    body = ApiError(error.status_code, message).body()
    return JSONResponse(body, error.status_code, dict(error.headers or {}))
