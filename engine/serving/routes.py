"""The routes that generate: chats and continuations of texts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from engine.conversation.reasoning import ReasoningStream
from engine.conversation.tool_calls import ToolCallStream
from engine.serving.guards import json_bytes
from engine.serving.model_thread import ScoredPrompt
from engine.serving.openai.answers import AnswerPiece
from engine.serving.openai.api_errors import ApiError, Notes
from engine.serving.openai.requests import read_chat, read_completion
from engine.serving.openai.responses import ChatChoice, CompletionChoice, Envelope
from engine.serving.service import Answers, Service

log = logging.getLogger(__name__)

Choices = Sequence[ChatChoice | CompletionChoice]


async def answer_chat(service: Service, body: Mapping[str, Any], notes: Notes) -> Response:
    """The response to a request of `/v1/chat/completions`. Raises `ApiError`."""
    request = read_chat(body, notes)
    model = service.model(request.model)
    prompt, begun = await asyncio.to_thread(service.chat_prompt, request, notes)
    decoding = request.decoding
    tools = request.tools if request.tool_choice.kind != "none" else None
    choices = [
        ChatChoice(
            index,
            service.texts,
            decoding.logprobs is not None,
            ReasoningStream(prompt.opened, enabled=service.reasons and not begun),
            ToolCallStream(tools or (), begun),
            request.several_calls,
        )
        for index in range(decoding.choices)
    ]
    answers = service.begin(model, [prompt.ids], decoding)
    kind = "chat.completion.chunk" if decoding.stream else "chat.completion"
    envelope = Envelope("chatcmpl", kind, model.name)
    if decoding.stream:
        return StreamedAnswers(answers, choices, envelope, notes, decoding.include_usage)
    return WholeAnswers(answers, choices, envelope, notes)


async def answer_completion(service: Service, body: Mapping[str, Any], notes: Notes) -> Response:
    """The response to a request of `/v1/completions`. Raises `ApiError`."""
    request = read_completion(body, notes)
    model, decoding = service.model(request.model), request.decoding
    prompts = await asyncio.to_thread(service.completion_prompts, request)
    choices = [
        CompletionChoice(
            index,
            service.texts,
            decoding.logprobs is not None,
            _prompt_text(service, request.prompts[index // decoding.choices])
            if request.echo
            else "",
        )
        for index in range(len(prompts) * decoding.choices)
    ]
    answers = service.begin(model, prompts, decoding, echo=request.echo)
    envelope = Envelope("cmpl", "text_completion", model.name)
    if decoding.stream:
        return StreamedAnswers(answers, choices, envelope, notes, decoding.include_usage)
    return WholeAnswers(answers, choices, envelope, notes)


def _prompt_text(service: Service, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)


class WholeAnswers(Response):
    """All answers of a request in one JSON object, once they are whole."""

    def __init__(
        self, answers: Answers, choices: Choices, envelope: Envelope, notes: Notes
    ) -> None:
        super().__init__()
        self._answers, self._choices = answers, choices
        self._envelope, self._notes = envelope, notes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(scope, receive, send))
        finally:
            self._answers.close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[list[AnswerPiece]] = [[] for _ in self._choices]
        async for index, item in self._answers.pieces():
            if isinstance(item, ScoredPrompt):
                note_prompt(self._choices[index], item)
            else:
                pieces[index].append(item)
        choices = [choice.whole(own) for choice, own in zip(self._choices, pieces, strict=True)]
        body = self._envelope.around(choices, usage=self._answers.usage())
        await JSONResponse(body, headers=self._notes.headers())(scope, receive, send)


class StreamedAnswers(Response):
    """The answers of a request as server-sent events, piece by piece.

    The status is decided with the first piece, so that a request which cannot be done is refused as
    any other; an error after that is an event of the stream.
    """

    def __init__(
        self,
        answers: Answers,
        choices: Choices,
        envelope: Envelope,
        notes: Notes,
        include_usage: bool,
    ) -> None:
        super().__init__()
        self._answers, self._choices = answers, choices
        self._envelope, self._notes, self._usage = envelope, notes, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        finally:
            self._answers.close()

    async def _send(self, send: Send) -> None:
        items = self._answers.pieces()
        first = await anext(items)
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no", **self._notes.headers()}  # fmt: skip
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        try:
            await self._tell(send, *first)
            async for index, item in items:
                await self._tell(send, index, item)
            if self._usage:
                whole = self._envelope.around([], usage=self._answers.usage())
                await _event(send, json_bytes(whole))
        except ApiError as error:
            await _event(send, json_bytes(error.body()))
        await _event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b""})

    async def _tell(self, send: Send, index: int, item: AnswerPiece | ScoredPrompt) -> None:
        """Send what one more piece of an answer makes certain, if anything."""
        choice = self._choices[index]
        if isinstance(item, ScoredPrompt):
            note_prompt(choice, item)
            return
        more = {"usage": None} if self._usage else {}
        for delta in choice.deltas(item):
            await _event(send, json_bytes(self._envelope.around([delta], **more)))


def note_prompt(choice: ChatChoice | CompletionChoice, prompt: ScoredPrompt) -> None:
    """Let a completion tell the log-probabilities of its prompt."""
    if isinstance(choice, CompletionChoice):
        choice.echoed_tokens = prompt.tokens


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, or leave it when the client leaves. Raises what the work raises."""
    task, watch = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _event(send: Send, data: bytes) -> None:
    body = b"data: " + data + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
