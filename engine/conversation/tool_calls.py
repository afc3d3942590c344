"""Read tool calls out of an answer while it comes.

Three spellings are read:

- `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` of Hermes and Qwen 2.5 and 3;
- `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` of Qwen3-Coder
  and Qwen3.5, whose values are text or JSON as the tool's schema says;
- an answer that is nothing but `{"name": ..., "parameters": {...}}`, or a list or several of these,
  as Llama 3.1 and Mistral write it.

What looks like a call and cannot be read stays in the text: nothing of an answer is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.storage import strict_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)(?:\n?</parameter>|(?=\n?<parameter=)|\Z)", re.DOTALL
)
_BARE = ("{", "[")
_BETWEEN = re.compile(r"[\s;,]*")


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is a JSON object as text, as OpenAI's interface has it."""

    name: str
    arguments: str


def forced_call(template: str, name: str | None) -> str:
    """How an answer begins that calls the tool `name`, or any where it is None.

    It is put behind the prompt. Raises `ConfigError` for a chat template whose calls are written in
    none of the spellings.
    """
    if OPEN in template and "<function=" in template:
        return f"{OPEN}\n<function=" + (f"{name}>" if name else "")
    spelled = '{"name": ' + (f"{json.dumps(name, ensure_ascii=False)}, " if name else '"')
    if OPEN in template:
        return f"{OPEN}\n{spelled}"
    if '"parameters": ' in template and '{"name": ' in template:
        return spelled
    raise ConfigError(
        "This model's chat template does not show how it writes a call of a tool, so an answer "
        "cannot be made to begin with one: leave tool_choice at auto, or use a model whose "
        "template has tools"
    )


class ToolCallStream:
    """Parts the calls from the text of one answer, piece by piece.

    Args:
        tools: what may be called, as OpenAI's interface has it; without any, all is text.
        begun: the beginning of the answer that was put behind the prompt.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], begun: str = "") -> None:
        self._schemas = {str(t["function"]["name"]): t["function"] for t in tools}
        self._waiting = begun
        self._first = True
        self._fresh = False  # White space after a call belongs to it.
        self.calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        """Text and calls that are certain after one more piece."""
        if not self._schemas:
            return [text] if text else []
        self._waiting += text
        if self._first and self._waiting.lstrip()[:1] in ("", *_BARE):
            return []  # It may be a call without a mark: only its end tells.
        self._first = False
        return self._marked(final=False)

    def finish(self) -> list[str | ToolCall]:
        """What is left when the answer has ended."""
        if self._first and self._schemas:
            calls = self._bare_calls(self._waiting)
            if calls:
                self._waiting = ""
                self.calls += len(calls)
                return list(calls)
        return self._marked(final=True)

    def _marked(self, final: bool) -> list[str | ToolCall]:
        """Parts of the waiting text up to a call that is not whole yet."""
        parts: list[str | ToolCall] = []
        while OPEN in self._waiting:
            before, _, after = self._waiting.partition(OPEN)
            body, closed, rest = after.partition(CLOSE)
            call = self._call(body) if closed or final else None
            if not closed and not final:
                parts += [before] if before.strip() else []
                self._waiting = OPEN + after
                return parts
            if call is None:
                parts.append(before + OPEN + body + closed)
            else:
                self.calls += 1
                parts += [*([before.rstrip()] if before.strip() else []), call]
            self._fresh, self._waiting = call is not None, rest
        if self._fresh:
            self._waiting = self._waiting.lstrip()
            self._fresh = not self._waiting
        uncertain = 0 if final else _partial(self._waiting)
        shown = self._waiting[: len(self._waiting) - uncertain]
        self._waiting = self._waiting[len(shown) :]
        return [*parts, shown] if shown else parts

    def _call(self, body: str) -> ToolCall | None:
        """The call inside a pair of marks, or None."""
        function = _FUNCTION.fullmatch(body)
        if function is not None:
            return self._of_parameters(function[1].strip(), function[2])
        try:
            return _of_json(strict_json.loads(body.strip()))
        except strict_json.JSONFault:
            return None

    def _of_parameters(self, name: str, text: str) -> ToolCall:
        known = self._schemas.get(name, {}).get("parameters")
        properties = known.get("properties") if isinstance(known, dict) else None
        properties = properties if isinstance(properties, dict) else {}
        values = {
            match[1].strip(): _typed(match[2], properties.get(match[1].strip()))
            for match in _PARAMETER.finditer(text)
        }
        return ToolCall(name, json.dumps(values, ensure_ascii=False))

    def _bare_calls(self, text: str) -> list[ToolCall]:
        """The calls of an answer that is nothing else, all of known tools; else none."""
        calls: list[ToolCall] = []
        at = _end_of_gap(text, 0)
        while at < len(text):
            try:
                value, at = strict_json.decode(text, at)
            except strict_json.JSONFault:
                return []
            for item in value if isinstance(value, list) else [value]:
                call = _of_json(item)
                if call is None or call.name not in self._schemas:
                    return []
                calls.append(call)
            at = _end_of_gap(text, at)
        return calls


def _of_json(value: Any) -> ToolCall | None:
    """`{"name": ..., "arguments" or "parameters": ...}` as a call, or None."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    value = inner if isinstance(inner, dict) else value
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = strict_json.loads(arguments)
        except strict_json.JSONFault:
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _typed(text: str, schema: Any) -> Any:
    """A parameter's value: text where its schema says so, else JSON where it is some."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    try:
        return strict_json.loads(text)
    except strict_json.JSONFault:
        words = {"true": True, "false": False, "none": None, "null": None}
        return words.get(text.strip().lower(), text) if kind is not None else text


def _end_of_gap(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    return match.end() if match is not None else at


def _partial(text: str) -> int:
    """How many characters at the end may be the beginning of a mark, with the space before it."""
    longest = min(len(OPEN) - 1, len(text))
    size = next((n for n in range(longest, 0, -1) if text.endswith(OPEN[:n])), 0)
    head = text[: len(text) - size]
    return len(text) - len(head.rstrip())
