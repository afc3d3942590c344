"""Preference rows: two answers, or one that is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.data.rows.fields import RowFault, json_name

Messages = list[dict[str, Any]]

LABEL_KEY = "label"
_LABELS = {"true": True, "false": False, "1": True, "0": False}


def split_pair(
    raw: Mapping[str, Any], messages_of: Callable[[str], Messages]
) -> tuple[Messages, Messages]:
    """The conversations with the chosen and with the rejected answer.

    Both end in an assistant message, and the first message in which they differ is an assistant's;
    one of them may be the answer alone where the row has a prompt. Raises `RowFault` where they are
    no pair.
    """
    chosen, rejected = messages_of("chosen"), messages_of("rejected")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise RowFault(f"'{side}' ends with a message of role {messages[-1]['role']!r}")
        if len(messages) < 2:
            raise RowFault(f"'{side}' is an answer without a prompt")
    if chosen == rejected:
        raise RowFault("'chosen' and 'rejected' are equal, so the pair prefers nothing")
    shared = shared_messages(chosen, rejected)
    if not shared or any(side[shared]["role"] != "assistant" for side in (chosen, rejected)):
        raise RowFault(
            "'chosen' and 'rejected' answer different prompts: they differ in message "
            f"{shared + 1}, which is no assistant's in both"
        )
    return chosen, rejected


def shared_messages(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many messages two conversations have in common, at least one of each left."""
    most = min(len(chosen), len(rejected)) - 1
    same = (index for index in range(most) if chosen[index] != rejected[index])
    return next(same, most)


def split_texts(chosen: str, rejected: str) -> int:
    """The characters of the prompt that two texts begin with: whole words that they share.

    Raises `RowFault` where they begin differently, or are no pair.
    """
    if chosen == rejected:
        raise RowFault("'chosen' and 'rejected' are equal, so the pair prefers nothing")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    # The space before the first word that differs belongs to the answer, as tokenizers have it.
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    while shared and chosen[shared - 1] == " ":
        shared -= 1
    if not chosen[:shared].strip():
        raise RowFault(
            "'chosen' and 'rejected' are texts, no prompt stands beside them, and they have no "
            "beginning in common that could be one"
        )
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[shared:].strip():
            raise RowFault(f"'{side}' says nothing after the prompt that both texts begin with")
    return shared


def judgement(raw: Mapping[str, Any]) -> bool | None:
    """What a row's `label` says of its answer: true for good, false for bad; None without one.

    Raises `RowFault` where it is neither.
    """
    value = raw.get(LABEL_KEY)
    if value is None or isinstance(value, bool):
        return value
    known = _LABELS.get(str(value).strip().lower()) if isinstance(value, int | str) else None
    if known is None:
        raise RowFault(
            f"'{LABEL_KEY}' is {json_name(value)}, {str(value)[:40]!r}, where true (a good answer) "
            "or false (a bad one) was expected"
        )
    return known
