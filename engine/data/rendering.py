"""Render rows in the spelling that the chat template wants.

Templates disagree about small things: whether the arguments of a tool call are an object or JSON
text, whether a message with tool calls may lack its content, whether call ids have nine
characters, whether content is a text or a list of parts, which roles there are. A row that the
template refuses as it stands, or of which it leaves out a role, is tried in the others' spelling; a
row that it accepts whole is never changed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from engine.data.rows import Row
from engine.data.rows.turns import RESULT_ROLES
from engine.tokenization.chat_template import ChatTemplate
from engine.tokenization.loss_spans import LocatedTurns
from engine.tokenization.messages import ConversationError, LimitError

Messages = list[dict[str, Any]]

_USUAL_ROLES = {"developer": "system", **dict.fromkeys(RESULT_ROLES, "tool")}

_ID_LENGTH = 9
"""Characters of a call id in Mistral's templates."""


def render_row(row: Row, template: ChatTemplate, kwargs: Mapping[str, Any]) -> LocatedTurns:
    """Render one row and find what is trained in it.

    Where the template passes over messages of a role, the role's usual name is tried too.

    Raises:
        ConversationError: the template refuses the row in every spelling; the error is that of
            the row as it stands.
        DataError: the template is not valid or tried to leave its sandbox.
    """
    messages, located = _first_accepted(row, template, kwargs)
    renamed = _with_usual_roles(messages)
    if located.left_out and renamed != messages:
        try:
            other = _locate(row, renamed, template, kwargs)
        except ConversationError:
            return located  # Refused under its usual name: the row stays as it is.
        return located if other.left_out else other
    return located


def _first_accepted(
    row: Row, template: ChatTemplate, kwargs: Mapping[str, Any]
) -> tuple[Messages, LocatedTurns]:
    try:
        return row.messages, _locate(row, row.messages, template, kwargs)
    except LimitError:
        raise
    except ConversationError as error:
        for messages in spellings(row.messages):
            try:
                return messages, _locate(row, messages, template, kwargs)
            except ConversationError:
                continue
        raise error


def _locate(
    row: Row, messages: Messages, template: ChatTemplate, kwargs: Mapping[str, Any]
) -> LocatedTurns:
    """What `ChatTemplate.locate` finds, and which results of tools the template leaves out."""
    located = template.locate(messages, tools=row.tools, **kwargs)
    left_out = dict(located.left_out)
    for role in {message["role"] for message in messages}.intersection(RESULT_ROLES):
        changed = [
            {**message, "content": f"{message.get('content')} {role}"}
            if message["role"] == role
            else message
            for message in messages
        ]
        try:
            hidden = template.render(changed, tools=row.tools, **kwargs) == located.text
        except ConversationError:
            continue  # It minds what the results say, so it looks at them.
        if hidden:
            own = (index for index, message in enumerate(messages) if message["role"] == role)
            left_out |= {index: {"result"} for index in own}
    return replace(located, left_out=left_out)


def usual_role(role: str) -> str:
    """The role as most templates know it: `system` for `developer`, `tool` for `ipython`."""
    return _USUAL_ROLES.get(role, role)


def spellings(messages: Messages) -> Iterator[Messages]:
    """The other spellings of a conversation, each with those before it."""
    for change in (
        _with_usual_roles,
        _with_content,
        _with_short_ids,
        _with_text_arguments,
        _with_parts,
    ):
        changed = change(messages)
        if changed != messages:
            messages = changed
            yield messages


def _with_usual_roles(messages: Messages) -> Messages:
    """OpenAI's former `function`, Llama's `ipython` and the newer `developer` as most know them."""
    return [{**message, "role": usual_role(message["role"])} for message in messages]


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
