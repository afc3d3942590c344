"""Preference pairs: one prompt, a better and a worse answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.data.rows.fields import RowFault

Messages = list[dict[str, Any]]


def split_pair(
    raw: Mapping[str, Any], messages_of: Callable[[str], Messages]
) -> tuple[Messages, Messages]:
    """The conversations with the chosen and with the rejected answer.

    Both end in an assistant message and are equal before it; one of them may be the answer alone
    where the row has a prompt. Raises `RowFault` where they are no pair.
    """
    chosen, rejected = messages_of("chosen"), messages_of("rejected")
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise RowFault(f"'{side}' ends with a message of role {messages[-1]['role']!r}")
        if len(messages) < 2:
            raise RowFault(f"'{side}' is an answer without a prompt")
    if chosen == rejected:
        raise RowFault("'chosen' and 'rejected' are equal, so the pair prefers nothing")
    if chosen[:1] != rejected[:1]:
        raise RowFault("'chosen' and 'rejected' answer different prompts")
    return chosen, rejected
