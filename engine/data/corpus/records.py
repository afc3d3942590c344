"""The schema of rows that `engine data` writes, and other shapes.

    prompt, response, system, tools, category, tags, difficulty, rating, source, schema_version

A conversation of several turns has `messages` for prompt and response, a document `text`, a
preference pair `chosen` and `rejected`. Keys that nothing knows stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.data.rows import Row
from engine.data.rows.fields import RowFault

SCHEMA_VERSION = "engine-1"
Record = dict[str, Any]
_PLAIN = {"role", "content"}
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def record_of(raw: Mapping[str, Any], row: Row) -> Record:
    """A row in the schema. `raw` is what it was read from."""
    return {**_content(row, raw), **_about(raw, row)}


def shaped(raw: Mapping[str, Any], row: Row, shape: str) -> Record:
    """A row in another shape: one of `engine.config.choices.RowShape`.

    Raises `RowFault` where that shape cannot say what the row says.
    """
    if shape == "auto":
        return record_of(raw, row)
    return {**_SHAPES[shape](row), **_about(raw, row)}


def new_record(prompt: str, response: str, **about: Any) -> Record:
    """A row that a tool makes; of `about` what is None or empty is left out."""
    record: Record = {"prompt": prompt, "response": response}
    record |= {key: value for key, value in about.items() if value not in (None, [], "")}
    return {**record, "schema_version": SCHEMA_VERSION}


def texts_of(row: Row) -> tuple[str, str]:
    """What a row asks and what it answers, as texts; of a document only the second."""
    if row.text is not None:
        return "", row.text
    if row.ids is not None:
        return "", " ".join(map(str, row.ids.ids))
    asked = [_text(message) for message in row.messages if message["role"] == "user"]
    answers = [_text(message) for message in row.messages if message["role"] == "assistant"]
    return "\n".join(asked), "\n".join(answers)


def _text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return f"{message.get('content') or ''}{f' {calls}' if calls else ''}"


def _about(raw: Mapping[str, Any], row: Row) -> Record:
    """All that stands beside what a row teaches."""
    tags = [*_listed(raw.get("tags")), *_listed(raw.get("constructs"))]
    rest = {key: raw[key] for key in row.unused if key in raw and raw[key] is not None}
    told = {
        "tools": row.tools,
        "category": row.category,
        "tags": list(dict.fromkeys(tags)) or None,
        "difficulty": raw.get("difficulty"),
        "rating": row.rating,
        "source": raw.get("source") or row.source,
        "schema_version": row.schema_version or SCHEMA_VERSION,
        **rest,
    }
    return {key: value for key, value in told.items() if value is not None}


def _listed(value: Any) -> list[str]:
    """Tags as they come: a list, or one text."""
    if value is None or value == "":
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _content(row: Row, raw: Mapping[str, Any]) -> Record:
    if row.is_pair:
        return _preference(row)
    if row.text is not None:
        return {"text": row.text}
    if row.ids is not None:
        keys = ("input_ids", "labels", "attention_mask")
        return {key: raw[key] for key in keys if raw.get(key) is not None}
    try:
        return _pair(row, "prompt", "response")
    except RowFault:
        return {"messages": row.messages}


def _pair(row: Row, prompt: str, response: str) -> Record:
    """A single question and its answer under these keys."""
    _require_conversation(row)
    messages = row.messages
    system = messages[0] if messages[0]["role"] == "system" else None
    turns = messages[1:] if system else messages
    if [message["role"] for message in turns] != ["user", "assistant"]:
        raise RowFault("a conversation that is not one question with its answer")
    if not all(_is_plain(message) for message in messages):
        raise RowFault("messages with more than a role and a text")
    told = {prompt: turns[0]["content"], response: turns[1]["content"]}
    return {**told, "system": system["content"]} if system else told


def _alpaca(row: Row) -> Record:
    told = _pair(row, "instruction", "output")
    return {"instruction": told.pop("instruction"), "input": "", **told}


def _messages(row: Row) -> Record:
    _require_conversation(row)
    return {"messages": row.messages}


def _sharegpt(row: Row) -> Record:
    _require_conversation(row)
    other = next((m["role"] for m in row.messages if m["role"] not in _SPEAKERS), None)
    if other or not all(_is_plain(message) for message in row.messages):
        raise RowFault(
            f"a message of role {other!r}" if other else "messages with more than role and text"
        )
    turns = [{"from": _SPEAKERS[m["role"]], "value": m["content"]} for m in row.messages]
    return {"conversations": turns}


def _document(row: Row) -> Record:
    if row.is_pair:
        raise RowFault("a preference pair, whose 'rejected' answer would be lost")
    if row.text is None:
        raise RowFault("a conversation, whose text depends on a model's chat template")
    return {"text": row.text}


def _preference(row: Row) -> Record:
    if row.rejected_text is not None:
        return {"chosen": row.text, "rejected": row.rejected_text}
    if row.rejected is None:
        raise RowFault("no 'rejected' answer")
    chosen, rejected = row.messages, row.rejected
    if chosen[:-1] == rejected[:-1] and len(chosen) == 2 and _is_plain(chosen[0]):
        last = chosen[-1], rejected[-1]
        if all(_is_plain(message) for message in last):
            answers = [message["content"] for message in last]
            return {"prompt": chosen[0]["content"], "chosen": answers[0], "rejected": answers[1]}
    return {"chosen": chosen, "rejected": rejected}


def _require_conversation(row: Row) -> None:
    """Raise `RowFault` for what has no messages, or two sides."""
    if row.is_pair:
        raise RowFault("a preference pair, whose 'rejected' answer would be lost")
    if not row.messages:
        raise RowFault(f"{row.form}, which has no messages")


def _is_plain(message: Mapping[str, Any]) -> bool:
    return set(message) <= _PLAIN and isinstance(message.get("content"), str)


_SHAPES: dict[str, Callable[[Row], Record]] = {
    "prompt-response": lambda row: _pair(row, "prompt", "response"),
    "prompt-completion": lambda row: _pair(row, "prompt", "completion"),
    "question-answer": lambda row: _pair(row, "question", "answer"),
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "text": _document,
    "preference": _preference,
}
