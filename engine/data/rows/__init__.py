"""Parse one row of a data set, in any of its forms.

Accepted: `messages` (OpenAI's form), `conversations` or `conversation` (ShareGPT's form, `from`
and `value`), and a prompt with its response under any of their usual names, with `input`, `context`
and `history` where a row has them; these become a list of messages. `chosen` with `rejected` is a
preference pair, `text` a document, `input_ids` a row that is tokenised already. With every form:
`system` (or `system_prompt`), `tools` or `functions`, `category`, `rating` (1 to 5), `weight`,
`schema_version`. A key that is not used is noted, and never dropped without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import Any

from engine.data.rows import fields
from engine.data.rows.columns import with_columns
from engine.data.rows.documents import TokenIds, document_text, token_ids
from engine.data.rows.fields import (
    RowFault,
    from_text,
    json_name,
    listed,
    only_key,
    optional_text,
)
from engine.data.rows.preference import LABEL_KEY, judgement, split_pair, split_texts
from engine.data.rows.turns import parse_message
from engine.tokenization.messages import contributes_to_loss, has_text

PROMPT_KEYS = ("prompt", "instruction", "question")
RESPONSE_KEYS = ("response", "output", "completion", "answer")
CHAT_KEYS = ("messages", "conversations", "conversation")

_LOOKED_AT = 64
"""Keys of a row without a known form that are compared with those it should have."""
_SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")
_TOOL_KEYS = ("tools", "functions")
_CONTEXT_KEYS = ("input", "context")
_RARE_PROMPT_KEYS = ("query", "problem", "input")
_RARE_RESPONSE_KEYS = ("solution",)
"""Names that mean a prompt or a response where a row has none of the usual ones."""

TEXT_KEY, IDS_KEY = "text", "input_ids"
PAIR_KEYS = ("chosen", "rejected")

ABOUT_KEYS = ("tags", "constructs", "difficulty", "source")
"""What `engine data` says of a row beside the rest; training has no use for it."""

_ALWAYS_USED = {
    *_SYSTEM_KEYS, *_TOOL_KEYS, "category", "rating", "weight", "schema_version", *ABOUT_KEYS,
}  # fmt: skip
_KNOWN = {
    *CHAT_KEYS, *PROMPT_KEYS, *RESPONSE_KEYS, *_RARE_PROMPT_KEYS, *_RARE_RESPONSE_KEYS,
    *_CONTEXT_KEYS, "history", TEXT_KEY, IDS_KEY, *PAIR_KEYS, *_ALWAYS_USED,
}  # fmt: skip

_HINTS = {
    "chosen": "a pair has 'rejected' too; to learn 'chosen' alone: --map response=chosen",
    "answers": "'answers' are several or have a form of their own; give one text as 'answer'",
    "user": "rename 'user' to 'prompt' and what answers it to 'response'",
    "parts": "these are Gemini's messages; give a list 'messages' with 'role' and 'content'",
    "train": "it holds several data sets; write each as a file of its own",
    "role": "this is a message; a row is an object with the list of them under 'messages'",
    "content": "if 'content' is a document to learn from: --map text=content",
    "dialogue": "rename 'dialogue' to 'messages', a list of objects with 'role' and 'content'",
    "dialog": "rename 'dialog' to 'messages', a list of objects with 'role' and 'content'",
    "turns": "rename 'turns' to 'messages', a list of objects with 'role' and 'content'",
}


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        messages: at least one of them an assistant message with something to learn; empty for a
            document and for token ids.
        line: 1-based line in the file on which the row starts.
        file: path as it was given.
        category, rating, schema_version: as the row has them, or None.
        weight: how much the row counts in a step's loss; None for 1.
        tools: JSON schemas of callable tools, handed to the chat template, or None.
        unused: keys of the row that nothing reads; those of messages as `messages[].key`.
        form: what was recognised, in words.
        text: of a document, all of it to be learnt.
        ids: of a row that is tokenised already.
        rejected: of a preference pair, the conversation with the worse answer; `messages` has the
            better one.
        rejected_text: of a pair of texts, the worse one; `text` has the better one.
        label: whether the answer is a good one, where the row says so and is asked for it.
        origin: which of the data names the row belongs to, from 0, and that one's weight.
    """

    messages: list[dict[str, Any]]
    line: int
    file: str
    category: str | None = None
    rating: int | None = None
    schema_version: str | int | None = None
    tools: list[dict[str, Any]] | None = field(default=None)
    unused: tuple[str, ...] = ()
    form: str = "messages"
    text: str | None = None
    ids: TokenIds | None = None
    rejected: list[dict[str, Any]] | None = None
    rejected_text: str | None = None
    label: bool | None = None
    origin: tuple[int, float] = (0, 1.0)
    weight: float | None = None

    @property
    def source(self) -> str:
        """Where the row stands, as `file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def is_pair(self) -> bool:
        """Whether the row has a better and a worse answer."""
        return self.rejected is not None or self.rejected_text is not None


def parse_row(
    raw: Any,
    file: str,
    line: int,
    columns: Mapping[str, str] | None = None,
    judged: bool = False,
) -> Row:
    """Turn one JSON value into a row.

    `columns` says which key of the value a field of the row is, where they are named otherwise.
    With `judged` its `label` is read: whether the answer is a good one.

    Raises:
        RowFault: it is not an object, has no known form, or a field has the wrong type.
    """
    if not isinstance(raw, dict):
        raise RowFault(f"{json_name(raw)} where an object was expected")
    unused: set[str] = set()
    raw = with_columns(raw, columns, unused) if columns else _known_spelling(raw)
    used = _ALWAYS_USED | ({LABEL_KEY} if judged else set())
    content = _content_of(raw, used, unused)
    unused |= {key for key, value in raw.items() if key not in used and value is not None}
    tool_key = only_key(raw, _TOOL_KEYS)
    return Row(
        line=line,
        file=file,
        category=optional_text(raw, "category"),
        rating=fields.rating(raw.get("rating")),
        weight=fields.weight(raw.get("weight")),
        schema_version=fields.schema_version(raw.get("schema_version")),
        tools=fields.tools(raw[tool_key], tool_key) if tool_key is not None else None,
        unused=tuple(sorted(unused)),
        label=judgement(raw) if judged else None,
        **content,
    )


def _content_of(raw: Mapping[str, Any], used: set[str], unused: set[str]) -> dict[str, Any]:
    """What a row holds: its form, and the fields of `Row` that the form fills."""
    if all(raw.get(key) is not None for key in PAIR_KEYS):
        used |= {*PAIR_KEYS, *PROMPT_KEYS, *_CONTEXT_KEYS, "history"}
        if _are_texts(raw):
            split_texts(raw["chosen"], raw["rejected"])
            return {
                "form": "preference pairs",
                "messages": [],
                "text": raw["chosen"],
                "rejected_text": raw["rejected"],
            }
        chosen, rejected = split_pair(raw, lambda side: _side_messages(raw, side, unused))
        return {
            "form": "preference pairs",
            "messages": _with_system(raw, chosen),
            "rejected": _with_system(raw, rejected),
        }
    if raw.get(IDS_KEY) is not None:
        used |= {IDS_KEY, "labels", "attention_mask"}
        return {"form": "token ids", "messages": [], "ids": token_ids(raw)}
    if raw.get(TEXT_KEY) is not None and not _has_answer(raw):
        used.add(TEXT_KEY)
        unused |= {key for key in (*_SYSTEM_KEYS, *_TOOL_KEYS) if raw.get(key)}
        return {"form": "text", "messages": [], "text": document_text(raw[TEXT_KEY], TEXT_KEY)}
    form, messages = _messages(raw, used, unused)
    messages = _with_system(raw, messages)
    _require_answer(messages)
    return {"form": form, "messages": messages}


def _are_texts(raw: Mapping[str, Any]) -> bool:
    """Whether a pair is two whole texts, without a prompt beside them."""
    prompt = only_key(raw, PROMPT_KEYS) or _first(raw, _RARE_PROMPT_KEYS)
    sides = [raw[side] for side in PAIR_KEYS]
    return prompt is None and all(isinstance(s, str) and not _is_list(s) for s in sides)


def _has_answer(raw: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation, or a prompt with its response."""
    keys = (*PROMPT_KEYS, *_RARE_PROMPT_KEYS), (*RESPONSE_KEYS, *_RARE_RESPONSE_KEYS)
    return _first(raw, CHAT_KEYS) is not None or all(_first(raw, some) for some in keys)


def _side_messages(raw: Mapping[str, Any], side: str, unused: set[str]) -> list[dict[str, Any]]:
    """The conversation with one of a pair's two answers."""
    answer = from_text(raw[side], f"'{side}'") if _is_list(raw[side]) else raw[side]
    prompt_key = only_key(raw, PROMPT_KEYS) or _first(raw, _RARE_PROMPT_KEYS)
    whole = isinstance(answer, list) and len(answer) > 1
    if prompt_key is not None and not whole:
        return _pair_messages({**raw, side: answer}, prompt_key, side, unused)
    if not isinstance(answer, list):
        raise RowFault(f"'{side}' is {json_name(answer)} and no prompt stands beside it")
    return _chat_messages(answer, side, unused)


def _is_list(value: Any) -> bool:
    """Whether a value is text that holds a list of messages."""
    return isinstance(value, str) and value.lstrip().startswith("[{")


def is_row(raw: Mapping[str, Any]) -> bool:
    """Whether an object has a key that rows have."""
    return any(key.lower() in _KNOWN - _ALWAYS_USED for key in raw)


def _known_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    """The row with known keys in lower case, where that is the only difference."""
    return {
        key.lower() if key.lower() in _KNOWN and key.lower() not in raw else key: value
        for key, value in raw.items()
    }


def _messages(
    raw: Mapping[str, Any], used: set[str], unused: set[str]
) -> tuple[str, list[dict[str, Any]]]:
    """The form of a conversation in words, and its messages."""
    chat_key = only_key(raw, CHAT_KEYS)
    if chat_key is not None:
        used |= set(CHAT_KEYS)
        return chat_key, _chat_messages(raw[chat_key], chat_key, unused)
    prompt_key = only_key(raw, PROMPT_KEYS) or _first(raw, _RARE_PROMPT_KEYS)
    response_key = only_key(raw, RESPONSE_KEYS) or _first(raw, _RARE_RESPONSE_KEYS)
    if prompt_key is not None and response_key is not None:
        used |= {prompt_key, response_key, *_CONTEXT_KEYS, "history"}
        messages = _pair_messages(raw, prompt_key, response_key, unused)
        return f"{prompt_key}/{response_key}", messages
    raise RowFault(
        f"an object with the keys {listed(raw)}, where 'messages', 'conversations', a "
        f"prompt ({listed(PROMPT_KEYS)}) with a response ({listed(RESPONSE_KEYS)}), 'chosen' with "
        f"'rejected', 'text' or 'input_ids' was expected (--map names columns otherwise)"
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
    for key in islice(raw, _LOOKED_AT):
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
    value = from_text(value, f"'{key}'") if _is_list(value) else value
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else json_name(value)
        raise RowFault(f"'{key}' is {what} where a list of messages was expected")
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
