"""Numbers of settings, in the forms that they come in.

A setting is written in a file, typed, or passed by a program, which has numbers of NumPy and of
`decimal` too. Whatever they are, a switch is no number, and no count is past what a float holds
exactly: a greater one fits into no tensor, file or loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

MOST = 1 << 53
"""The largest whole number of a setting that names no limit of its own."""

MOST_SECONDS = 1_000_000
"""The longest time of a setting, over eleven days: clocks of the system take no 1e300."""

_LONGEST = 400
_OTHER_KINDS = frozenset(
    {"ndarray", "Tensor", "bool", "bool_"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
    | {f"float{bits}" for bits in (16, 32, 64)}
)


def or_most(value: Any) -> Any:
    """`value`, and `MOST` for a greater whole number, where more of something means all of it."""
    return min(value, MOST) if type(value) is int and value < 10**_LONGEST else value


def is_count(text: str) -> bool:
    """Whether `text` is a whole number in the digits 0 to 9, and short enough to be a count."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def takes_numbers(annotation: Any) -> bool:
    """Whether a field is a number, or none, or one of some words; and neither switch nor text.

    So is one of several numbers, as a tuple or the values of a mapping.
    """
    kinds, waiting = set[Any](), [annotation]
    while waiting:
        kind = waiting.pop()
        outer = get_origin(kind)
        inner = get_args(kind)
        if outer in (Union, UnionType, tuple):
            waiting += inner
        elif outer is dict:
            waiting.append(inner[1])
        elif outer is Annotated:
            waiting.append(inner[0])
        else:
            kinds.add(kind)
    return not kinds.isdisjoint({int, float}) and kinds.isdisjoint({bool, str, Any})


def plain_number(value: Any, annotation: Any, deep: int = 2) -> Any:
    """`value` with numbers as Python has them, and a switch that came for a number as a word.

    Lists and mappings are looked into, `deep` of them in one another.

    Raises:
        ValueError: a number of more than 400 digits.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if type(value).__name__ in _OTHER_KINDS and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, int):
        if abs(value) >= 10**_LONGEST:
            raise ValueError(f"a number of over {_LONGEST} digits is out of every range")
        switch = isinstance(value, bool) and takes_numbers(annotation)
        return str(value).lower() if switch else value
    if isinstance(value, Decimal):
        if value.is_finite() and abs(value.adjusted()) > _LONGEST:
            raise ValueError(f"a number of over {_LONGEST} digits is out of every range")
        return value if value.is_finite() else str(value)
    if type(value) not in (list, tuple, dict) or not deep or not takes_numbers(annotation):
        return value
    if type(value) is dict:
        return {key: plain_number(item, annotation, deep - 1) for key, item in value.items()}
    return type(value)(plain_number(item, annotation, deep - 1) for item in value)


def in_range(value: Any, limits: Iterable[Any]) -> Any:
    """`value` unless it is, or holds, a whole number past `MOST` and no limit of its own is higher.

    Raises `ValueError` that names the limit.
    """
    if type(value) is int and abs(value) > MOST:
        if not any(hasattr(limit, "lt") or hasattr(limit, "le") for limit in limits):
            raise ValueError(f"should be at most {MOST:,}")
    elif type(value) is tuple:
        for item in value:
            in_range(item, ())
    elif isinstance(value, Mapping):
        in_range((*value.keys(), *value.values()), ())
    return value
