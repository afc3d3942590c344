"""Separate a model's reasoning from its answer while the text comes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from engine.tokenization.markers import REASONING_TAG, closes_reasoning

Part = Literal["reasoning", "content"]

_PAIRS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning")),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
_CLOSING = dict(_PAIRS)
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class TextPart:
    """A piece of an answer, and what it is part of."""

    part: Part
    text: str


def opened_by(prompt: str) -> str | None:
    """The tag with which a rendered prompt begins the answer's reasoning, or None."""
    end = prompt.rstrip()
    return next((tag for tag in _CLOSING if end.endswith(tag)), None)


def reasons(template: str) -> bool:
    """Whether a chat template knows reasoning: it writes or looks for the end of one."""
    return any(closes_reasoning(tag.group()) for tag in REASONING_TAG.finditer(template))


def with_reasoning(message: dict[str, str], reasoning: str) -> dict[str, str]:
    """A message with its reasoning; the template decides whether a later prompt shows it."""
    return {**message, "reasoning_content": reasoning} if reasoning else message


class ReasoningStream:
    """Divides the pieces of one answer at the tags around its reasoning, which are left out.

    A reasoning stands at the beginning of an answer or nowhere: in the middle a tag is text. White
    space next to the tags belongs to neither side. What may be the beginning of a tag stays back
    until it is whole.

    Args:
        opened: the tag that the prompt ended with, where it began the reasoning.
        enabled: whether the model reasons at all; else everything is content.
    """

    def __init__(self, opened: str | None = None, *, enabled: bool = True) -> None:
        self._closing = _CLOSING[opened] if opened else None
        self._undecided = enabled and opened is None
        self._fresh = opened is not None  # White space at the beginning of a part is dropped.
        self._waiting = ""

    def push(self, text: str) -> list[TextPart]:
        """What is certain after one more piece."""
        self._waiting += text
        if self._undecided and not self._begin():
            return []
        if self._closing is None:
            return self._content()
        return self._reasoning()

    def finish(self) -> list[TextPart]:
        """What is left when the answer has ended."""
        part: Part = "content" if self._closing is None else "reasoning"
        rest, self._waiting = self._waiting, ""
        rest = rest.strip() if part == "reasoning" else rest
        rest = rest.lstrip() if self._fresh else rest
        return [TextPart(part, rest)] if rest else []

    def _begin(self) -> bool:
        """Whether it is known what the answer begins with."""
        start = self._waiting.lstrip()
        tag = next((tag for tag in _CLOSING if start.startswith(tag)), None)
        if tag is not None:
            self._closing, self._fresh = _CLOSING[tag], True
            self._waiting = start[len(tag) :]
        elif any(tag.startswith(start) for tag in _CLOSING):
            return False
        self._undecided = False
        return True

    def _reasoning(self) -> list[TextPart]:
        assert self._closing is not None
        inner, tag, after = self._waiting.partition(self._closing)
        if tag:
            whole = self._without_lead(inner).rstrip()
            parts = [TextPart("reasoning", whole)] if whole else []
            self._closing, self._fresh, self._waiting = None, True, after
            return parts + self._content()
        text = self._without_lead(self._waiting)
        end = len(text) - _partial(text, self._closing)
        end = len(text[:end].rstrip())  # It may be the space before the closing tag.
        self._waiting = text[end:]
        return self._shown("reasoning", text[:end])

    def _content(self) -> list[TextPart]:
        text, self._waiting = self._without_lead(self._waiting), ""
        return self._shown("content", text)

    def _shown(self, part: Part, text: str) -> list[TextPart]:
        if not text:
            return []
        self._fresh = False
        return [TextPart(part, text)]

    def _without_lead(self, text: str) -> str:
        match = _SPACE.match(text)
        return text[match.end() :] if self._fresh and match is not None else text


def _partial(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    longest = min(len(tag) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
