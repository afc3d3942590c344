"""Mark what messages say, to recognise it in a rendered conversation.

A marker is a short word of letters and digits that occurs nowhere in the conversation. Everything
that an assistant message says (content, reasoning, names and string arguments of tool calls) gets
markers of its own at both ends, and so does a system prompt; what others say gets one pair that all
of them share, because some templates compare messages with each other. Markers stand inside the
white space around a text and inside its reasoning tags, so that a template which strips or splits a
text does so as before.
Whether the markers changed anything else is seen by removing them: the rest must be the plain text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from engine.tokenization.messages import REASONING_KEYS

Kind = Literal["content", "reasoning", "name", "argument", "system"]

REASONING_TAG = re.compile(
    r"</?(?:think|thinking|thought|reasoning|seed:think)>|\[/?THINK\]"
    r"|<\|(?:START|END)_THINKING\|>|<\|?channel\|?>|◁/?think▷"
)
"""Texts that templates split an answer on, to part the reasoning from it."""


def closes_reasoning(tag: str) -> bool:
    """Whether a match of `REASONING_TAG` ends a reasoning."""
    return re.match(r"</|\[/|◁/|<\|END|<channel\|", tag) is not None


class Marking(IntEnum):
    """How much is marked; a template that changes its mind about one may accept the next."""

    FULL = 0
    FILLED = 1
    """Only texts that are not empty."""
    MIDDLE = 2
    """Of those, what others say is marked in its middle, so that its ends are as they were."""
    ANSWERS = 3
    """What others say is not marked."""
    SPARSE = 4
    """What assistants say is marked in its middle, too."""


@dataclass(frozen=True)
class MarkedPart:
    """One marked text of an assistant message.

    Attributes:
        message: index of the message.
        kind: what the text is.
        markers: how many markers it has.
        behind: what of the text follows its last marker, white space aside.
    """

    message: int
    kind: Kind
    markers: int = 2
    behind: str = ""


@dataclass
class MarkedConversation:
    """Messages with markers, and what each marker marks.

    Attributes:
        messages: the marked messages.
        pattern: matches every marker; group 1 is its number, empty for what others say.
        probe: a word that is no marker and that the conversation does not hold either.
        parts: the marked text of each number.
    """

    messages: list[dict[str, Any]]
    pattern: re.Pattern[str]
    probe: str
    parts: list[MarkedPart] = field(default_factory=list)


def mark(messages: Sequence[Mapping[str, Any]], marking: Marking) -> MarkedConversation:
    """Mark a conversation.

    Args:
        messages: as templates get them (see `plain_messages`).
        marking: how much to mark.
    """
    stem = _unused_stem(json.dumps(messages, ensure_ascii=False))
    marked = MarkedConversation([], re.compile(f"{stem}([0-9]*)z"), f"{stem}probe")
    writer = _Writer(stem, marking, marked.parts)
    marked.messages = [writer.message(index, message) for index, message in enumerate(messages)]
    return marked


def _unused_stem(text: str) -> str:
    number = 0
    while (stem := f"qmk{number}q") in text:
        number += 1
    return stem


class _Writer:
    """Writes markers into messages and notes what they mark."""

    def __init__(self, stem: str, marking: Marking, parts: list[MarkedPart]) -> None:
        self._stem, self._marking, self._parts = stem, marking, parts

    def message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] != "assistant":
            if self._marking >= Marking.ANSWERS or "content" not in message:
                return dict(message)
            system = message["role"] in ("system", "developer")
            change = self._system(index) if system else self._other
            return {**message, "content": _each_text(message["content"], change)}
        result = dict(message)
        reasoning = {key: message[key] for key in REASONING_KEYS if key in message}
        for text in dict.fromkeys(str(value) for value in reasoning.values()):
            shown = self._own(text, index, "reasoning")
            same = [key for key, value in reasoning.items() if value == text]
            result.update(dict.fromkeys(same, shown))
        calls = message.get("tool_calls")
        if "content" in message and (message["content"] or not (calls or reasoning)):
            result["content"] = _each_text(message["content"], lambda t: self._answer(t, index))
        if isinstance(calls, list):
            result["tool_calls"] = [self._call(call, index) for call in calls]
        return result

    def _answer(self, text: str, index: int) -> str:
        """An answer, with reasoning and the rest marked apart."""
        pieces: list[str] = []
        kind: Kind = "content"
        end = 0
        for tag in REASONING_TAG.finditer(text):
            closes = closes_reasoning(tag.group())
            inside: Kind = "reasoning" if closes else kind
            pieces += [self._own(text[end : tag.start()], index, inside, True), tag.group()]
            kind, end = ("content" if closes else "reasoning"), tag.end()
        pieces.append(self._own(text[end:], index, kind, inner=bool(pieces)))
        return "".join(pieces)

    def _call(self, call: Any, index: int) -> Any:
        if not isinstance(call, dict):
            return call
        inner = "function" if isinstance(call.get("function"), dict) else None
        function = dict(call[inner] if inner else call)
        if isinstance(function.get("name"), str):
            function["name"] = self._own(function["name"], index, "name")
        if "arguments" in function:
            function["arguments"] = _each_string(
                function["arguments"], lambda text: self._own(text, index, "argument", True)
            )
        return {**call, inner: function} if inner else function

    def _own(self, text: str, index: int, kind: Kind, inner: bool = False) -> str:
        """A text of an assistant's; an empty one gets a marker only where nothing tests for it."""
        sparse = self._marking == Marking.SPARSE
        core = text.strip()
        if not core and (inner or self._marking >= Marking.FILLED):
            return text
        marker = f"{self._stem}{len(self._parts)}z"
        if not core:
            self._parts.append(MarkedPart(index, kind, 1))
            return text + marker
        behind = core[len(core) // 2 :]
        self._parts.append(
            MarkedPart(index, kind, 1, behind) if sparse else MarkedPart(index, kind)
        )
        return _marked(text, core, marker, sparse)

    def _system(self, index: int) -> Callable[[str], str]:
        """Marks a system prompt with a number of its own, so that its absence is seen."""

        def change(text: str) -> str:
            if not text.strip():
                return text
            marker = f"{self._stem}{len(self._parts)}z"
            count = 1 if self._marking == Marking.MIDDLE else 2
            self._parts.append(MarkedPart(index, "system", count))
            return self._around(text, marker)

        return change

    def _other(self, text: str) -> str:
        return self._around(text, f"{self._stem}z")

    def _around(self, text: str, marker: str) -> str:
        core = text.strip()
        if not core:
            return text + marker if self._marking == Marking.FULL else text
        return _marked(text, core, marker, self._marking == Marking.MIDDLE)


def _marked(text: str, core: str, marker: str, in_middle: bool) -> str:
    """`text` with a marker at both ends of `core`, its part without white space, or inside it."""
    start = text.find(core)
    before, after = text[:start], text[start + len(core) :]
    if in_middle:
        middle = len(core) // 2
        return f"{before}{core[:middle]}{marker}{core[middle:]}{after}"
    return f"{before}{marker}{core}{marker}{after}"


def _each_text(content: Any, change: Any) -> Any:
    """Content with its text changed: a text, or the texts of a list of parts."""
    if isinstance(content, str):
        return change(content)
    if not isinstance(content, list):
        return content
    return [
        {**part, "text": change(part["text"])}
        if isinstance(part, dict) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]


def _each_string(value: Any, change: Any) -> Any:
    """A JSON value with every text in it changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each_string(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _each_string(item, change) for key, item in value.items()}
    return value
