"""Parse one row of a data set into messages.

Accepted: `messages` (OpenAI's form, with `tools`), `conversations` or `conversation` (ShareGPT's
form, `from` and `value`), and a prompt with its response under any of their usual names
(`prompt`, `instruction` with `input`, `question`; `response`, `output`, `completion`, `answer`),
with `system` and `history` where a row has them. Optional with every form: `category`, `rating`
(1 to 5), `schema_version`. Other keys are ignored. Every form becomes a list of messages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.storage import strict_json
from engine.tokenization.messages import contributes_to_loss, has_text

PROMPT_KEYS = ("prompt", "instruction", "question")
RESPONSE_KEYS = ("response", "output", "completion", "answer")
CHAT_KEYS = ("messages", "conversations", "conversation")

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class RowFault(ValueError):
    """A row that is JSON but not a training row; the message says what was found and expected."""


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        messages: at least one of them an assistant message with something to learn.
        line: 1-based line in the file on which the row starts.
        file: path as it was given.
        category, rating, schema_version: as the row has them, or None.
        tools: JSON schemas of callable tools, handed to the chat template, or None.
    """

    messages: list[dict[str, Any]]
    line: int
    file: str
    category: str | None = None
    rating: int | None = None
    schema_version: str | int | None = None
    tools: list[dict[str, Any]] | None = field(default=None)

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
        raise RowFault(f"{_name(raw)} where an object was expected")
    messages = _messages(raw)
    _require_answer(messages)
    return Row(
        messages=messages,
        line=line,
        file=file,
        category=_optional_text(raw, "category"),
        rating=_rating(raw.get("rating")),
        schema_version=_schema_version(raw.get("schema_version")),
        tools=_tools(raw.get("tools")),
    )


def _messages(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    chat_key = _only_key(raw, CHAT_KEYS)
    if chat_key is not None:
        return _chat_messages(raw[chat_key], chat_key)
    prompt_key, response_key = _only_key(raw, PROMPT_KEYS), _only_key(raw, RESPONSE_KEYS)
    if prompt_key is not None and response_key is not None:
        return _pair_messages(raw, prompt_key, response_key)
    raise RowFault(
        f"an object with the keys {_listed(raw)}, where 'messages', 'conversations', or a "
        f"prompt ({_listed(PROMPT_KEYS)}) with a response ({_listed(RESPONSE_KEYS)}) was expected"
    )


def _chat_messages(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RowFault(f"'{key}' is {_name(value)} where a list of messages was expected")
    return [_message(item, f"{key}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RowFault(f"{where} is {_name(item)} where a message (an object) was expected")
    if "role" not in item and "from" in item:
        return _sharegpt_message(item, where)
    role = item.get("role")
    if role not in ROLES:
        raise RowFault(f"{where}.role is {role!r}; expected one of {_listed(ROLES)}")
    content = item.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) for part in content):
            raise RowFault(f"{where}.content is a list that holds something other than objects")
    elif not (isinstance(content, str) or (content is None and role == "assistant")):
        raise RowFault(f"{where}.content is {_name(content)} where text was expected")
    return dict(item)


def _sharegpt_message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    speaker, value = item["from"], item.get("value")
    if speaker not in SHAREGPT_ROLES:
        raise RowFault(f"{where}.from is {speaker!r}; expected one of {_listed(SHAREGPT_ROLES)}")
    if not isinstance(value, str):
        raise RowFault(f"{where}.value is {_name(value)} where text was expected")
    flags = {key: item[key] for key in ("weight", "train") if key in item}
    if speaker == "function_call":
        return {"role": "assistant", **_function_call(value), **flags}
    return {"role": SHAREGPT_ROLES[speaker], "content": value, **flags}


def _function_call(value: str) -> dict[str, Any]:
    """ShareGPT writes a tool call as JSON text; templates want it under `tool_calls`."""
    try:
        call = strict_json.loads(value)
    except strict_json.JSONFault:
        return {"content": value}
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return {"content": value}
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"content": "", "tool_calls": [{"type": "function", "function": function}]}


def _pair_messages(
    raw: Mapping[str, Any], prompt_key: str, response_key: str
) -> list[dict[str, Any]]:
    prompt, response = raw[prompt_key], raw[response_key]
    messages: list[dict[str, Any]] = []
    system = _optional_text(raw, "system")
    if system:
        messages.append({"role": "system", "content": system})
    messages += _history(raw.get("history"))
    if isinstance(prompt, list):
        messages += _chat_messages(prompt, prompt_key)
    elif isinstance(prompt, str):
        extra = _optional_text(raw, "input")
        content = f"{prompt}\n{extra}" if extra else prompt
        messages.append({"role": "user", "content": content})
    else:
        raise RowFault(f"'{prompt_key}' is {_name(prompt)} where text was expected")
    if isinstance(response, list):
        return messages + _chat_messages(response, response_key)
    if not isinstance(response, str):
        raise RowFault(f"'{response_key}' is {_name(response)} where text was expected")
    if not response.strip():
        raise RowFault(f"'{response_key}' is empty, so the row has nothing to learn from")
    return [*messages, {"role": "assistant", "content": response}]


def _history(value: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if value is not None and not isinstance(value, list):
        raise RowFault(f"'history' is {_name(value)} where a list of pairs was expected")
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


def _only_key(raw: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    given = [name for name in names if raw.get(name) is not None]
    if len(given) > 1:
        raise RowFault(f"both '{given[0]}' and '{given[1]}', which mean the same; keep one of them")
    return given[0] if given else None


def _rating(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(1, 6):
        raise RowFault(f"'rating' is {value!r} where a whole number from 1 to 5 was expected")
    return int(value)


def _schema_version(value: Any) -> str | int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise RowFault(f"'schema_version' is {_name(value)} where text or a number was expected")
    return value


def _optional_text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise RowFault(f"'{key}' is {_name(value)} where text was expected")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = strict_json.loads(value)
        except strict_json.JSONFault as fault:
            raise RowFault(f"'tools' is text that is not JSON: {fault.message}") from None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowFault(f"'tools' is {_name(value)} where a list of objects was expected")
    return value or None


def _listed(names: Any) -> str:
    shown = [repr(name) for name in list(names)[:12]]
    return ", ".join(shown) if shown else "(none)"


def _name(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")
