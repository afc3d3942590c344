"""Parse one message of a row, in OpenAI's or in ShareGPT's form.

What other programs write in several ways is brought into one: arguments of tool calls become JSON
objects, a list of text parts becomes a text, a single old-style function call becomes a list of
calls. What is not text is refused by name.
"""

import json
from collections.abc import Mapping
from typing import Any

from engine.data.rows.fields import RowFault, from_text, json_name, listed
from engine.tokenization.messages import LOSS_FLAGS, REASONING_KEYS, ConversationError, loss_flag

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
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")
"""Speakers whose value is a tool call, or a list of them."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
RESULT_ROLES = ("tool", "function", "ipython")

_ARGUMENTS = ("arguments", "parameters", "input", "args", "kwargs")
"""What programs call the arguments of a tool call; OpenAI's name comes first."""

_AROUND_CALL = ("id", "type", "index", "function")
"""Keys beside a call, in forms that write its name and arguments beside them."""

_OTHER_FLAGS = (
    "mask", "masked", "loss_mask", "ignore", "ignore_loss", "no_loss", "compute_loss", "trainable",
    "training", "train_on_turn", "train_detail",
)  # fmt: skip
"""Keys by which other programs leave messages, or parts of them, out of the loss."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text, in OpenAI's two programming interfaces."""

_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_USED = {
    "role", "content", "name", "tool_calls", "function_call", "tool_call_id",
    *REASONING_KEYS, *LOSS_FLAGS,
}  # fmt: skip
_USED_SHAREGPT = {"from", "value", *REASONING_KEYS, *LOSS_FLAGS}


def parse_message(item: Any, where: str, unused: set[str]) -> dict[str, Any]:
    """One message as templates take it.

    Args:
        item: the message.
        where: what errors call it.
        unused: keys that nothing reads are added here.

    Raises:
        RowFault: it is no message, or says what cannot be trained.
    """
    if not isinstance(item, dict):
        raise RowFault(f"{where} is {json_name(item)} where a message (an object) was expected")
    item = _one_form(item)
    if "role" not in item and "from" in item:
        message = _sharegpt_message(item, where, unused)
    else:
        message = _openai_message(item, where, unused)
    _refuse_other_flags(item, where)
    _check_flags(message, where, unused)
    return message


def _one_form(item: dict[str, Any]) -> dict[str, Any]:
    """A message in one of the two forms, where it mixes them: `role` and `value`, say."""
    if "role" in item and "content" not in item and "value" in item:
        return {"content" if key == "value" else key: inner for key, inner in item.items()}
    if "from" in item and "role" not in item and "value" not in item and "content" in item:
        return {"value" if key == "content" else key: inner for key, inner in item.items()}
    return item


def _openai_message(item: Mapping[str, Any], where: str, unused: set[str]) -> dict[str, Any]:
    role = item.get("role")
    role = _ROLE_ALIASES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowFault(f"{where}.role is {item.get('role')!r}; expected one of {listed(ROLES)}")
    message = {**item, "role": role}
    unused |= _unused(item, _USED, where)
    calls = _tool_calls(message, where, unused)
    if calls:
        message["tool_calls"] = calls
    if "content" in item or not calls:
        if "content" not in item and role != "assistant":
            raise RowFault(f"{where} has no 'content', only the keys {listed(item)}")
        message["content"] = _content(item.get("content"), role, f"{where}.content")
    for key in REASONING_KEYS:
        if message.get(key) is not None and not isinstance(message[key], str):
            raise RowFault(f"{where}.{key} is {json_name(message[key])} where text was expected")
    return message


def _content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str) or (content is None and role == "assistant"):
        return content
    if isinstance(content, list) and (
        role not in RESULT_ROLES or all(_is_part(part) for part in content)
    ):
        return "".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))
    if role in RESULT_ROLES and isinstance(content, list | dict):
        return json.dumps(content, ensure_ascii=False)
    raise RowFault(f"{where} is {json_name(content)} where text was expected")


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type"), str))


def _part_text(part: Any, where: str) -> str:
    """The text of one part of a list of parts."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowFault(f"{where} is {json_name(part)} where a part of a message was expected")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise RowFault(
            f"{where} is of type {kind!r}; only parts of text ({listed(TEXT_PARTS)}) are read here"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise RowFault(f"{where}.text is {json_name(text)} where text was expected")
    return text


def _tool_calls(message: dict[str, Any], where: str, unused: set[str]) -> list[dict[str, Any]]:
    """The calls of a message, which lose their keys there."""
    calls, old = message.pop("tool_calls", None), message.pop("function_call", None)
    if old is not None:
        if calls:
            raise RowFault(f"{where} has both tool_calls and function_call; keep one of them")
        calls = [old]
    calls = from_text(calls, f"{where}.tool_calls")
    if isinstance(calls, dict):
        calls = [calls]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise RowFault(f"{where}.tool_calls is {json_name(calls)} where a list was expected")
    if calls and message["role"] != "assistant":
        raise RowFault(f"{where} calls tools, but its role is {message['role']!r}")
    return [_call(call, f"{where}.tool_calls[{i}]", unused) for i, call in enumerate(calls)]


def _call(call: Any, where: str, unused: set[str]) -> dict[str, Any]:
    """One tool call, {"type": "function", "function": {"name", "arguments"}}."""
    if not isinstance(call, dict):
        raise RowFault(f"{where} is {json_name(call)} where a tool call (an object) was expected")
    nested = isinstance(call.get("function"), dict)
    function = call["function"] if nested else call
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowFault(f"{where} has no name of a function; its keys are {listed(call)}")
    given = [key for key in _ARGUMENTS if function.get(key) is not None]
    if len(given) > 1:
        raise RowFault(f"{where} has both '{given[0]}' and '{given[1]}'; keep one of them")
    used = {"name", *_ARGUMENTS, *(() if nested else _AROUND_CALL)}
    unused |= {f"{_list_name(where)}[].tool_calls[].{key}" for key in function if key not in used}
    arguments = function[given[0]] if given else None
    arguments = from_text(arguments, f"{where}: the arguments of {function['name']!r}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowFault(
            f"{where}: the arguments of {function['name']!r} are {json_name(arguments)}, where an "
            "object, or one as JSON text, was expected"
        )
    if nested:
        named = {key: value for key, value in function.items() if key not in _ARGUMENTS}
        return {"type": "function", **call, "function": {**named, "arguments": arguments}}
    inner = {"name": function["name"], "arguments": arguments}
    return {
        **({"id": call["id"]} if isinstance(call.get("id"), str) else {}),
        "type": "function",
        "function": inner,
    }


def _sharegpt_message(item: Mapping[str, Any], where: str, unused: set[str]) -> dict[str, Any]:
    speaker, value = item["from"], item.get("value")
    speaker = speaker.lower() if isinstance(speaker, str) else None
    if speaker not in SHAREGPT_ROLES:
        raise RowFault(
            f"{where}.from is {item['from']!r}; expected one of {listed(SHAREGPT_ROLES)}"
        )
    unused |= _unused(item, _USED_SHAREGPT, where)
    message: dict[str, Any] = {"role": SHAREGPT_ROLES[speaker]}
    message |= {key: item[key] for key in (*REASONING_KEYS, *LOSS_FLAGS) if key in item}
    if speaker in _CALLS:
        message["tool_calls"] = from_text(value, f"{where}.value")
        message["tool_calls"] = _tool_calls(message, where, unused)
        if not message["tool_calls"]:
            raise RowFault(f"{where}.value is {json_name(value)} where a tool call was expected")
        return {**message, "content": ""}
    return {**message, "content": _content(value, message["role"], f"{where}.value")}


def _refuse_other_flags(item: Mapping[str, Any], where: str) -> None:
    other = next((key for key in _OTHER_FLAGS if item.get(key) is not None), None)
    if other is not None:
        raise RowFault(
            f"{where}: '{other}' seems to say what is trained on, and would be ignored; leave a "
            'message out of the loss with "loss": false, and remove the key'
        )


def _check_flags(message: Mapping[str, Any], where: str, unused: set[str]) -> None:
    try:
        flag = loss_flag(message)
    except ConversationError as fault:
        raise RowFault(f"{where}: {fault}") from None
    if message["role"] != "assistant" and flag:
        unused |= {
            f"{_list_name(where)}[].{key} of role {message['role']}"
            for key in LOSS_FLAGS
            if message.get(key) is not None
        }


def _unused(item: Mapping[str, Any], used: set[str], where: str) -> set[str]:
    names = (key for key, value in item.items() if key not in used and value is not None)
    return {f"{_list_name(where)}[].{key}" for key in names}


def _list_name(where: str) -> str:
    return where.partition("[")[0]
