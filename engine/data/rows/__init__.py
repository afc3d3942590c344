"""Parse one row of a data set into messages.

Accepted: `messages` (OpenAI's form), `conversations` or `conversation` (ShareGPT's form, `from`
and `value`), and a prompt with its response under any of their usual names, with `input`, `context`
and `history` where a row has them. With every form: `system` (or `system_prompt`), `tools` or
`functions`, `category`, `rating` (1 to 5), `schema_version`. Every form becomes a list of messages.
A key that is not used is noted, and never dropped without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from engine.data.rows import fields
from engine.data.rows.fields import RowFault, json_name, listed, only_key, optional_text
from engine.data.rows.turns import parse_message
from engine.tokenization.messages import contributes_to_loss, has_text

PROMPT_KEYS = ("prompt", "instruction", "question")
RESPONSE_KEYS = ("response", "output", "completion", "answer")
CHAT_KEYS = ("messages", "conversations", "conversation")

_SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")
_TOOL_KEYS = ("tools", "functions")
_CONTEXT_KEYS = ("input", "context")
_RARE_PROMPT_KEYS = ("query", "problem", "input")
_RARE_RESPONSE_KEYS = ("solution",)
"""Names that mean a prompt or a response where a row has none of the usual ones."""

_ALWAYS_USED = {*_SYSTEM_KEYS, *_TOOL_KEYS, "category", "rating", "schema_version"}
_KNOWN = {
    *CHAT_KEYS, *PROMPT_KEYS, *RESPONSE_KEYS, *_RARE_PROMPT_KEYS, *_RARE_RESPONSE_KEYS,
    *_CONTEXT_KEYS, "history", *_ALWAYS_USED,
}  # fmt: skip

_HINTS = {
    "text": "'text' alone does not say what is a prompt and what a response; split it into both",
    "chosen": "of preference pairs the answer to learn is 'chosen'; rename it to 'response'",
    "input_ids": "rows of token ids cannot be read; give the text, which is tokenised here",
    "answers": "'answers' are several or have a form of their own; give one text as 'answer'",
    "user": "rename 'user' to 'prompt' and what answers it to 'response'",
    "parts": "these are Gemini's messages; give a list 'messages' with 'role' and 'content'",
    "train": "it holds several data sets; write each as a file of its own",
    "role": "this is a message; a row is an object with the list of them under 'messages'",
    "dialogue": "rename 'dialogue' to 'messages', a list of objects with 'role' and 'content'",
    "dialog": "rename 'dialog' to 'messages', a list of objects with 'role' and 'content'",
    "turns": "rename 'turns' to 'messages', a list of objects with 'role' and 'content'",
}


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        messages: at least one of them an assistant message with something to learn.
        line: 1-based line in the file on which the row starts.
        file: path as it was given.
        category, rating, schema_version: as the row has them, or None.
        tools: JSON schemas of callable tools, handed to the chat template, or None.
        unused: keys of the row that nothing reads; those of messages as `messages[].key`.
    """

    messages: list[dict[str, Any]]
    line: int
    file: str
    category: str | None = None
    rating: int | None = None
    schema_version: str | int | None = None
    tools: list[dict[str, Any]] | None = field(default=None)
    unused: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Where the row stands, as `file:line`."""
        return f"{self.file}:{self.line}"


def parse_row(raw: Any, file: str, line: int) -> Row:
    """Turn one JSON value into a row.

    Raises:
        RowFault: it is not an object, has no known form, or a field has the wrong type.
    """
    if not isinstance(raw, dict):
        raise RowFault(f"{json_name(raw)} where an object was expected")
    raw = _known_spelling(raw)
    used = set(_ALWAYS_USED)
    unused: set[str] = set()
    messages = _with_system(raw, _messages(raw, used, unused))
    _require_answer(messages)
    unused |= {key for key, value in raw.items() if key not in used and value is not None}
    tool_key = only_key(raw, _TOOL_KEYS)
    return Row(
        messages=messages,
        line=line,
        file=file,
        category=optional_text(raw, "category"),
        rating=fields.rating(raw.get("rating")),
        schema_version=fields.schema_version(raw.get("schema_version")),
        tools=fields.tools(raw[tool_key], tool_key) if tool_key is not None else None,
        unused=tuple(sorted(unused)),
    )


def is_row(raw: Mapping[str, Any]) -> bool:
    """Whether an object has a key that rows have."""
    return any(key.lower() in _KNOWN - _ALWAYS_USED for key in raw)


def _known_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """The row with known keys in lower case, where that is the only difference."""
    return {
        key.lower() if key.lower() in _KNOWN and key.lower() not in raw else key: value
        for key, value in raw.items()
    }


def _messages(raw: Mapping[str, Any], used: set[str], unused: set[str]) -> list[dict[str, Any]]:
    chat_key = only_key(raw, CHAT_KEYS)
    if chat_key is not None:
        used |= set(CHAT_KEYS)
        return _chat_messages(raw[chat_key], chat_key, unused)
    prompt_key = only_key(raw, PROMPT_KEYS) or _first(raw, _RARE_PROMPT_KEYS)
    response_key = only_key(raw, RESPONSE_KEYS) or _first(raw, _RARE_RESPONSE_KEYS)
    if prompt_key is not None and response_key is not None:
        used |= {prompt_key, response_key, *_CONTEXT_KEYS, "history"}
        return _pair_messages(raw, prompt_key, response_key, unused)
    raise RowFault(
        f"an object with the keys {listed(raw)}, where 'messages', 'conversations', or a "
        f"prompt ({listed(PROMPT_KEYS)}) with a response ({listed(RESPONSE_KEYS)}) was expected"
        f"{_hint(raw)}"
    )


def _hint(raw: Mapping[str, Any]) -> str:
    """What probably is wrong with a row that has no known form."""
    for key, hint in _HINTS.items():
        if raw.get(key) is not None:
            return f"; {hint}"
    names = (*CHAT_KEYS, *PROMPT_KEYS, *RESPONSE_KEYS)
    for name in names:
        if name in raw and raw[name] is None:
            return f"; '{name}' is null"
    for key in raw:
        likely = get_close_matches(key.lower(), names, n=1, cutoff=0.8)
        if likely and key not in names:
            return f"; did you mean '{likely[0]}' by '{key}'?"
    inner = next(
        (key for key in ("body", "row", "data", "item") if isinstance(raw.get(key), dict)), None
    )
    return f"; the row itself seems to stand inside '{inner}'" if inner is not None else ""


def _first(raw: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if raw.get(name) is not None), None)


def _chat_messages(value: Any, key: str, unused: set[str]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowFault(f"'{key}' is {json_name(value)} where a list of messages was expected")
    return [parse_message(item, f"{key}[{index}]", unused) for index, item in enumerate(value)]


def _with_system(raw: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after the system prompt that stands beside them."""
    key = only_key(raw, _SYSTEM_KEYS)
    system = optional_text(raw, key)
    if not system:
        return messages
    own = [message for message in messages if message["role"] in ("system", "developer")]
    if not own:
        return [{"role": "system", "content": system}, *messages]
    if own[0]["content"] != system:
        raise RowFault(f"both '{key}' and a system message that says something else; keep one")
    return messages


def _pair_messages(
    raw: Mapping[str, Any], prompt_key: str, response_key: str, unused: set[str]
) -> list[dict[str, Any]]:
    prompt, response = raw[prompt_key], raw[response_key]
    messages = _history(raw.get("history"))
    if isinstance(prompt, list):
        messages += _chat_messages(prompt, prompt_key, unused)
        unused |= {key for key in _CONTEXT_KEYS if key != prompt_key and raw.get(key)}
    elif isinstance(prompt, str):
        extra = [optional_text(raw, key) for key in _CONTEXT_KEYS if key != prompt_key]
        content = "\n".join([prompt, *(text for text in extra if text)])
        messages.append({"role": "user", "content": content})
    else:
        raise RowFault(f"'{prompt_key}' is {json_name(prompt)} where text was expected")
    if isinstance(response, list):
        return messages + _chat_messages(response, response_key, unused)
    if not isinstance(response, str):
        raise RowFault(f"'{response_key}' is {json_name(response)} where text was expected")
    if not response.strip():
        raise RowFault(f"'{response_key}' is empty, so the row has nothing to learn from")
    return [*messages, {"role": "assistant", "content": response}]


def _history(value: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if value is not None and not isinstance(value, list):
        raise RowFault(f"'history' is {json_name(value)} where a list of pairs was expected")
    for index, pair in enumerate(value or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(x) is str for x in pair)):
            raise RowFault(f"history[{index}] is not a pair of texts [question, answer]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _require_answer(messages: list[dict[str, Any]]) -> None:
    for message in messages:
        if contributes_to_loss(message) and (
            has_text(message.get("content")) or message.get("tool_calls")
        ):
            return
    raise RowFault("no assistant message with any text, so the row has nothing to learn from")
