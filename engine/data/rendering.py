"""Render rows in the spelling that the chat template wants.

Templates disagree about small things: whether the arguments of a tool call are an object or JSON
text, whether a message with tool calls may lack its content, whether call ids have nine
characters, whether content is a text or a list of parts. A row that the template refuses as it
stands is tried in the others' spelling; a row that it accepts is never changed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.data.rows import Row
from engine.tokenization.chat_template import ChatTemplate
from engine.tokenization.loss_spans import LocatedTurns
from engine.tokenization.messages import ConversationError, LimitError

Messages = list[dict[str, Any]]

_ID_LENGTH = 9
"""Characters of a call id in Mistral's templates."""


def render_row(row: Row, template: ChatTemplate, kwargs: Mapping[str, Any]) -> LocatedTurns:
    """Render one row and find what is trained in it.

    Raises:
        ConversationError: the template refuses the row in every spelling; the error is that of
            the row as it stands.
        DataError: the template is not valid or tried to leave its sandbox.
    """
    try:
        return template.locate(row.messages, tools=row.tools, **kwargs)
    except LimitError:
        raise
    except ConversationError as error:
        for messages in _spellings(row.messages):
            try:
                return template.locate(messages, tools=row.tools, **kwargs)
            except ConversationError:
                continue
        raise error


def _spellings(messages: Messages) -> Iterator[Messages]:
    """The other spellings of a conversation, each with those before it."""
    for change in (_with_content, _with_short_ids, _with_text_arguments, _with_parts):
        changed = change(messages)
        if changed != messages:
            messages = changed
            yield messages


def _with_content(messages: Messages) -> Messages:
    return [
        {**message, "content": ""} if message.get("content") is None else message
        for message in messages
    ]


def _with_short_ids(messages: Messages) -> Messages:
    """Calls and results with ids of nine letters or digits; results without one are in order."""
    ids: dict[str, str] = {}
    waiting: list[str] = []
    result: Messages = []
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                short = _short_id(call.get("id"), ids)
                waiting.append(short)
                calls.append({**call, "id": short})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            short = ids.get(str(given)) or (waiting[0] if waiting else _short_id(given, ids))
            if short in waiting:
                waiting.remove(short)
            message = {**message, "tool_call_id": short}
        result.append(message)
    return result


def _short_id(given: Any, ids: dict[str, str]) -> str:
    letters = re.sub(r"[^0-9A-Za-z]", "", given) if isinstance(given, str) else ""
    short = letters[-_ID_LENGTH:]
    if len(short) < _ID_LENGTH or short in ids.values():
        short = f"{len(ids):0{_ID_LENGTH}d}"
    ids[given if isinstance(given, str) else f"\0{len(ids)}"] = short
    return short


def _with_text_arguments(messages: Messages) -> Messages:
    return [
        {**message, "tool_calls": [_text_arguments(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _with_parts(messages: Messages) -> Messages:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
