"""A stand-in for engine serve's interface, for tests of the page that talks to it."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from engine.pages.assets import page_routes


class ChatStub:
    """Answers with the model's name and what was said, word by word.

    With a `key`, requests without it get status 401. A message with `slowly` streams until the
    client is gone, one with `fail` ends in an error event, one with `refuse` gets status 400.
    The model `late` is a while behind the others. `asked` are the bodies of the requests for
    answers, `ended` counts streams that were closed.
    """

    def __init__(
        self,
        models: tuple[str, ...] = ("base", "tuned"),
        key: str | None = None,
        late: str | None = None,
    ) -> None:
        self.models, self.key, self.late = models, key, late
        self.asked: list[dict[str, Any]] = []
        self.ended = 0
        self.app = Starlette(
            routes=[
                *page_routes("chat"),
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "The API key is wrong or missing."}}, 401)

    async def list_models(self, request: Request) -> Response:
        """`/v1/models`."""
        listed = [{"id": name, "object": "model"} for name in self.models]
        return self._refusal(request) or JSONResponse({"object": "list", "data": listed})

    async def answer(self, request: Request) -> Response:
        """`/v1/chat/completions`, always as a stream."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        body = await request.json()
        if body["model"] == self.late:
            await asyncio.sleep(0.3)
        self.asked.append(body)
        said = body["messages"][-1]["content"]
        if "refuse" in said:
            message = "max_tokens is 0; it should be at least 1."
            return JSONResponse({"error": {"message": message}}, 400)
        return StreamingResponse(self._events(body, said), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], said: str) -> AsyncIterator[str]:
        words = [f"{body['model']} heard: ", *(f"{word} " for word in said.split())]
        try:
            for word in words:
                yield event({"choices": [{"index": 0, "delta": {"content": word}}]})
            while "slowly" in said:
                yield event({"choices": [{"index": 0, "delta": {"content": "and "}}]})
                await asyncio.sleep(0.02)
            if "fail" in said:
                yield event({"error": {"message": "The server ran out of memory."}})
                return
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            usage = {"completion_tokens": len(words)}
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        finally:
            self.ended += 1


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value)}\n\n"
