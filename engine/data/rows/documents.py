"""Rows that are no conversation: a document, or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.data.rows.fields import RowFault, from_text, json_name

IGNORED = -100
"""The label of a token that is not trained, as Hugging Face has it."""
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class TokenIds:
    """A row that is tokenised already: ids, and which of them are trained."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


def document_text(value: Any, key: str) -> str:
    """The text of a document. Raises `RowFault` for something else, or nothing."""
    if not isinstance(value, str):
        raise RowFault(f"'{key}' is {json_name(value)} where text was expected")
    if not value.strip():
        raise RowFault(f"'{key}' is empty, so the row has nothing to learn from")
    return value


def token_ids(raw: Mapping[str, Any]) -> TokenIds:
    """`input_ids`, with `labels` (-100: not trained) and `attention_mask` (0: padding, left out).

    Labels are unshifted: each is the id at its own position, or -100. Without labels every token is
    trained. Raises `RowFault`.
    """
    ids = _numbers(raw["input_ids"], "input_ids", 0)
    labels, mask = raw.get("labels"), raw.get("attention_mask")
    targets = ids if labels is None else _numbers(labels, "labels", IGNORED)
    shown = [1] * len(ids) if mask is None else _numbers(mask, "attention_mask", 0)
    for key, values in (("labels", targets), ("attention_mask", shown)):
        if len(values) != len(ids):
            raise RowFault(f"'{key}' has {len(values)} numbers and 'input_ids' {len(ids)}")
    pairs = enumerate(zip(ids, targets, strict=True))
    other = next((at for at, (index, to) in pairs if to not in (index, IGNORED)), None)
    if other is not None:
        raise RowFault(
            f"labels[{other}] is {targets[other]} where the id is {ids[other]}; a label is the id "
            "at its own position, or -100 where it is not trained (they are shifted here)"
        )
    rows = [
        (index, to != IGNORED)
        for index, to, here in zip(ids, targets, shown, strict=True)
        if here != 0
    ]
    if not any(trained for _, trained in rows[1:]):
        raise RowFault("no token of 'input_ids' is trained, so the row has nothing to learn from")
    return TokenIds(tuple(index for index, _ in rows), tuple(trained for _, trained in rows))


def _numbers(value: Any, key: str, least: int) -> list[int]:
    value = from_text(value, f"'{key}'")
    if not isinstance(value, list) or not value:
        raise RowFault(f"'{key}' is {json_name(value)} where a list of numbers was expected")
    for index, item in enumerate(value):
        if type(item) is not int or not least <= item <= _LARGEST or -100 < item < 0:
            raise RowFault(f"{key}[{index}] is {item!r} where a whole number was expected")
    return list(value)
