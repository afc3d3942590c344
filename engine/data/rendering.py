"""Render rows in the spelling that the chat template wants.

Templates disagree about small things: whether the arguments of a tool call are an object or JSON
text, whether a message with tool calls may lack its content, whether call ids have nine
characters, whether content is a text or a list of parts, which roles there are. A row that the
template refuses as it stands, or of which it leaves out a role, is tried in the others' spelling; a
row that it accepts whole is never changed.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Self

from engine.config.row_settings import RowSettings
from engine.data.rows import Row
from engine.data.rows.thinking import (
    CLOSE,
    OPEN,
    with_empty_blocks,
    with_written_reasoning,
    without_reasoning,
)
from engine.data.rows.turns import RESULT_ROLES
from engine.tokenization.chat_template import ChatTemplate
from engine.tokenization.loss_spans import LocatedTurns
from engine.tokenization.messages import (
    LOSS_FLAGS,
    ConversationError,
    LimitError,
    contributes_to_loss,
    loss_weight,
)
from engine.tokenization.turn_edges import Span

Messages = list[dict[str, Any]]

_USUAL_ROLES = {"developer": "system", **dict.fromkeys(RESULT_ROLES, "tool")}

_ID_LENGTH = 9
"""Characters of a call id in Mistral's templates."""


@dataclass(frozen=True)
class Learning:
    """What of a conversation is trained: `--train-on` and `--thinking`.

    Attributes:
        train_on: 'all' answers, the 'last', or a text after which everything is.
        thinking: 'auto', 'keep', 'strip' or 'empty'.
    """

    train_on: str = "all"
    thinking: str = "auto"

    @property
    def marker(self) -> str | None:
        """The text after which everything is trained, if one was given."""
        return None if self.train_on in ("all", "last") else self.train_on

    @classmethod
    def of(cls, settings: RowSettings) -> Self:
        """What a table of settings says."""
        return cls(settings.train_on, settings.thinking)


EVERYTHING = Learning()


def render_row(
    row: Row,
    template: ChatTemplate,
    kwargs: Mapping[str, Any],
    learning: Learning = Learning(),
) -> LocatedTurns:
    """Render one row and find what is trained in it.

    Where the template passes over messages of a role, the role's usual name is tried too.

    Raises:
        ConversationError: the template refuses the row in every spelling; the error is that of
            the row as it stands.
        DataError: the template is not valid or tried to leave its sandbox.
    """
    row = replace(row, messages=_with_learning(row.messages, learning))
    if learning.marker is not None:
        return _located_after(row, template, kwargs, learning.marker)
    located = _render_usual(row, template, kwargs)
    hidden = {index for index, kinds in located.left_out.items() if "reasoning" in kinds}
    if learning.thinking != "keep" or not hidden:
        return located
    return _with_reasoning_shown(row, template, kwargs, hidden)


def render_known(
    rows: Sequence[Row],
    template: ChatTemplate,
    kwargs: Mapping[str, Any],
    learning: Learning = Learning(),
) -> list[LocatedTurns | None]:
    """What `render_row` gives of rows whose shape the template was seen to render; else None."""
    plain = learning.marker is None and learning.thinking in ("auto", "strip", "empty")
    messages = [
        _with_learning(row.messages, learning)
        if plain and row.messages and not row.tools and not row.is_pair
        else []
        for row in rows
    ]
    return template.locate_known(messages, **kwargs)


def weighted_spans(
    row: Row,
    text: str,
    template: ChatTemplate,
    kwargs: Mapping[str, Any],
    learning: Learning = Learning(),
) -> list[tuple[float, list[Span]]]:
    """The factors of a row's messages, each with the spans in `text` of those that have it.

    Nothing where every message counts once. The row is rendered once for each factor.

    Raises:
        ConversationError: what is trained does not go by messages, or the template writes another
            text.
    """
    weights = [loss_weight(m) for m in row.messages if contributes_to_loss(m)]
    if learning.train_on == "last":
        weights = weights[-1:]
    if set(weights) <= {1.0}:
        return []
    if learning.marker is not None:
        raise ConversationError(
            "Its messages have weights, and --train-on trains what follows a text, whatever "
            "message it is in. Leave out one or the other."
        )
    result: list[tuple[float, list[Span]]] = []
    for weight in sorted(set(weights)):
        messages = [
            message if len(weights) == 1 else _trained_if(message, weight)
            for message in row.messages
        ]
        part = render_row(replace(row, messages=messages), template, kwargs, learning)
        if part.text != text:
            raise ConversationError(
                "Its messages have weights, and the chat template reads them. Give the row a "
                "weight of its own instead."
            )
        result.append((weight, part.spans))
    return result


def _trained_if(message: dict[str, Any], weight: float) -> dict[str, Any]:
    """The message, contributing to the loss where its factor is `weight` alone."""
    if message["role"] != "assistant":
        return message
    trained = contributes_to_loss(message) and loss_weight(message) == weight
    return {**{k: v for k, v in message.items() if k not in LOSS_FLAGS}, "train": trained}


def _with_learning(messages: Messages, learning: Learning) -> Messages:
    if learning.thinking == "strip":
        messages = without_reasoning(messages)
    elif learning.thinking == "empty":
        messages = with_empty_blocks(messages)
    if learning.train_on != "last":
        return messages
    last = max(index for index, message in enumerate(messages) if contributes_to_loss(message))
    return [
        {**{k: v for k, v in message.items() if k not in LOSS_FLAGS}, "train": index == last}
        if message["role"] == "assistant"
        else message
        for index, message in enumerate(messages)
    ]


def _located_after(
    row: Row, template: ChatTemplate, kwargs: Mapping[str, Any], marker: str
) -> LocatedTurns:
    try:
        return template.locate_after(row.messages, marker, tools=row.tools, **kwargs)
    except ConversationError as error:
        for messages in spellings(row.messages):
            try:
                return template.locate_after(messages, marker, tools=row.tools, **kwargs)
            except ConversationError:
                continue
        raise error


def _with_reasoning_shown(
    row: Row, template: ChatTemplate, kwargs: Mapping[str, Any], hidden: set[int]
) -> LocatedTurns:
    """The row with reasoning that the template leaves out written into the answers.

    It stands between words that the template does not know, which become tags in the result.
    """
    said = json.dumps(row.messages, ensure_ascii=False)
    stem = next(word for word in map("qthink{}q".format, count()) if word not in said)
    words = f"{stem}a", f"{stem}b"
    messages = with_written_reasoning(row.messages, hidden, words)
    located = _render_usual(replace(row, messages=messages), template, kwargs)
    if any("reasoning" in kinds for kinds in located.left_out.values()):
        raise ConversationError(
            f"The chat template leaves out the reasoning of messages[{min(hidden)}], however it is "
            "given. --thinking auto trains the row without it."
        )
    text, spans, tags = located.text, located.spans, dict(zip(words, (OPEN, CLOSE), strict=True))
    while match := re.search("|".join(words), text):
        tag = tags[match.group()]
        shift = len(tag) - len(match.group())
        text = text[: match.start()] + tag + text[match.end() :]
        spans = [
            (a + shift * (a > match.start()), b + shift * (b > match.start())) for a, b in spans
        ]
    return replace(located, text=text, spans=spans)


def _render_usual(row: Row, template: ChatTemplate, kwargs: Mapping[str, Any]) -> LocatedTurns:
    """The row in the first spelling that the template accepts, roles by their usual names."""
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
