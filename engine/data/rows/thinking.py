"""What becomes of the reasoning in a conversation: --thinking."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from engine.tokenization.markers import REASONING_TAG, closes_reasoning
from engine.tokenization.messages import REASONING_KEYS

OPEN, CLOSE = "<think>", "</think>"
Messages = list[dict[str, Any]]


def without_reasoning(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """The conversation without what assistants thought, in keys and in content."""
    return [_changed(message, lambda text: _split(text)[1]) for message in messages]


def with_empty_blocks(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """The conversation with an empty block of reasoning before every answer."""
    return [
        _changed(message, lambda text: f"{OPEN}\n\n{CLOSE}\n\n{_split(text)[1]}")
        for message in messages
    ]


def with_written_reasoning(
    messages: Sequence[Mapping[str, Any]], indices: Collection[int], tags: tuple[str, str]
) -> Messages:
    """The conversation with the reasoning of some messages in their content, between `tags`."""
    result: Messages = []
    for index, message in enumerate(messages):
        given = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
        thought, answer = _split(str(message.get("content") or ""))
        thought = given if given is not None else thought
        if index not in indices or not thought.strip():
            result.append(dict(message))
            continue
        text = f"{tags[0]}\n{thought.strip()}\n{tags[1]}\n\n{answer}"
        result.append({**_changed(message, lambda answer: answer), "content": text})
    return result


def _changed(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """An assistant's message without reasoning keys and with other content; others as they are."""
    if message["role"] != "assistant":
        return dict(message)
    result = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    if isinstance(result.get("content"), str):
        result["content"] = change(result["content"])
    return result


def _split(text: str) -> tuple[str, str]:
    """Reasoning and answer of a text in which tags part them; without tags all is answer."""
    end, close = 0, None
    for tag in REASONING_TAG.finditer(text):
        if closes_reasoning(tag.group()):
            end, close = tag.end(), tag
    if close is None:
        return "", text
    thought = REASONING_TAG.sub("", text[: close.start()])
    return thought, text[end:].lstrip("\n")
