"""The JSON objects that the interface answers with, whole and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.conversation.reasoning import ReasoningStream
from engine.conversation.tool_calls import ToolCall, ToolCallStream
from engine.serving.openai.answers import AnswerPiece, ChosenToken, TextPosition, TokenTexts


class Envelope:
    """What is the same in all pieces of one answer: its id, time, model and kind."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self._body = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def around(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The object that holds `choices`."""
        return {**self._body, "choices": choices, **more}


@dataclass
class CompletionChoice:
    """One choice of a completion; `echoed` are text and tokens of the prompt, where it is asked."""

    index: int
    texts: TokenTexts
    logprobs: bool
    echoed: str = ""
    echoed_tokens: Sequence[ChosenToken] = ()
    _position: TextPosition = field(default_factory=TextPosition)

    def deltas(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """The choice as a piece of a stream has it, unless it has nothing to say."""
        silent = not (piece.text or piece.tokens or piece.finish or self.echoed)
        return [] if silent else [self.whole([piece])]

    def whole(self, pieces: Sequence[AnswerPiece]) -> dict[str, Any]:
        """The choice of an answer that is sent in one; the first piece brings what is echoed."""
        piece = joined(pieces)
        text, tokens = self.echoed + piece.text, [*self.echoed_tokens, *piece.tokens]
        self.echoed, self.echoed_tokens = "", ()
        told = None
        if self.logprobs:
            told = self.texts.completion(tokens, self._position)
        return {"index": self.index, "text": text, "logprobs": told, "finish_reason": piece.finish}


@dataclass
class ChatChoice:
    """One choice of a chat: its text is parted into reasoning, content and calls of tools.

    Where `several_calls` is not wanted, calls after the first are left out.
    """

    index: int
    texts: TokenTexts
    logprobs: bool
    reasoning: ReasoningStream
    calls: ToolCallStream
    several_calls: bool = True
    _begun: bool = False
    _called: int = 0

    def deltas(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """The choice as pieces of a stream have it; none where nothing is certain yet."""
        changes: list[dict[str, Any]] = (
            [] if self._begun else [{"role": "assistant", "content": ""}]
        )
        self._begun = True
        for key, value in self._parts(piece):
            if isinstance(value, ToolCall):
                call = {"index": self._called - 1, **_call(value)}
                changes.append({"tool_calls": [call]})
            else:
                changes.append({key: value})
        finish, tokens = self._finish(piece), self.logprobs and piece.tokens
        if finish is not None or (tokens and not changes):
            changes.append({})  # The last piece has nothing but the reason, as clients expect.
        result: list[dict[str, Any]] = [
            {"index": self.index, "delta": change, "logprobs": None, "finish_reason": None}
            for change in changes
        ]
        if result and tokens:
            result[0]["logprobs"] = self.texts.chat(piece.tokens)
        if result:
            result[-1]["finish_reason"] = finish
        return result

    def whole(self, pieces: Sequence[AnswerPiece]) -> dict[str, Any]:
        """The choice of an answer that is sent in one."""
        piece = joined(pieces)
        texts = {"content": "", "reasoning_content": ""}
        calls: list[dict[str, Any]] = []
        for key, value in self._parts(piece):
            if isinstance(value, ToolCall):
                calls.append(_call(value))
            else:
                texts[key] += value
        message: dict[str, Any] = {
            "role": "assistant",
            "content": texts["content"],
            "refusal": None,
        }
        if texts["reasoning_content"]:
            message["reasoning_content"] = texts["reasoning_content"]
        if calls:
            message |= {"tool_calls": calls, "content": texts["content"] or None}
        return {
            "index": self.index,
            "message": message,
            "logprobs": self.texts.chat(piece.tokens) if self.logprobs else None,
            "finish_reason": self._finish(piece),
        }

    def _parts(self, piece: AnswerPiece) -> Iterator[tuple[str, str | ToolCall]]:
        """The parts of a piece, under the names of their keys."""
        parts = self.reasoning.push(piece.text)
        if piece.finish is not None:
            parts += self.reasoning.finish()
        for part in parts:
            if part.part == "reasoning":
                yield "reasoning_content", part.text
            else:
                yield from self._wanted(self.calls.push(part.text))
        if piece.finish is not None:
            yield from self._wanted(self.calls.finish())

    def _wanted(self, values: Sequence[str | ToolCall]) -> Iterator[tuple[str, str | ToolCall]]:
        for value in values:
            if isinstance(value, ToolCall):
                self._called += 1
            if self._called <= 1 or self.several_calls:
                yield "content", value

    def _finish(self, piece: AnswerPiece) -> str | None:
        return "tool_calls" if piece.finish == "stop" and self._called else piece.finish


def _call(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI's interface has it, with an id of its own."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def joined(pieces: Sequence[AnswerPiece]) -> AnswerPiece:
    """All pieces of one answer as one."""
    return AnswerPiece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        pieces[-1].finish,
        pieces[-1].completion_tokens,
    )
