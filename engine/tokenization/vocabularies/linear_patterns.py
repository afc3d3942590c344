r"""Tell which regular expressions cut text in linear time.

An expression that scans a run of characters and then fails, as `[a-z]+\d` does on letters, scans
the rest of the run again from each of its characters: the square of its length. Tokenizers of real
models hold such parts, and take no harm, since another alternative then takes the whole run:
`\s*[\r\n]+|\s+(?!\S)|\s+`. What is asked of each alternative here:

- it scans without a bound only at its end, where nothing after that can fail; or
- it scans once and may then fail, and the alternatives right behind it scan the same characters,
  up to one that takes them all and cannot fail.

Where an expression holds anything else, such as repeated groups, the answer is no.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from engine.patterns import COUNT, PARTS

_MOST_WORK = 20_000
"""What the bounded parts of an expression may do for one character of a text."""

_ESCAPES = re.compile(r"\\(?:[sSdDwWhHpPrntfvxuAzZbB0]|[^a-zA-Z0-9])")
_OPENING = re.compile(r"\((?:\?(?:i?:|[=!]|<[=!]))?")
_ODD_CLASS = re.compile(r"&&|(?<!\\)(?:\\\\)*\[(?!:)")


class _UnknownSyntaxError(ValueError):
    """An expression holds what is not judged here."""


@dataclass(frozen=True)
class _Item:
    """An atom and how often it may stand: at least, at most (None: without a bound)."""

    atom: str
    least: int = 1
    most: int | None = 1
    greedy: bool = True

    @property
    def may_fail(self) -> bool:
        """Whether the match may end here."""
        return self.least > 0

    @property
    def work(self) -> int:
        """Steps of a bounded item."""
        return (self.most or self.least) * len(self.atom)


_Alternative = tuple[_Item, ...]


@lru_cache(maxsize=1024)
def takes_linear_time(pattern: str) -> bool:
    """Whether a search takes a time in proportion to the text; False where in doubt."""
    try:
        alternatives = _alternatives(pattern)
    except _UnknownSyntaxError:
        return False
    if sum(map(_work, alternatives)) > _MOST_WORK:
        return False
    return all(
        _rescued(_scanned(alternative), alternatives[number + 1 :])
        for number, alternative in enumerate(alternatives)
    )


def _work(alternative: _Alternative) -> int:
    """Steps that an alternative takes at one character, without what it scans."""
    choices = 1
    for item in alternative:
        if item.most is not None:
            choices *= item.most - item.least + 1
    return choices * sum(item.work for item in alternative)


def _scanned(alternative: _Alternative) -> list[str]:
    """Atoms without a bound that stand before something that may fail."""
    last = max((n for n, item in enumerate(alternative) if item.may_fail), default=0)
    return [item.atom for item in alternative[:last] if item.most is None]


def _rescued(atoms: list[str], later: list[_Alternative]) -> bool:
    """Whether nothing is scanned in vain, or the alternatives behind take the run that was.

    They scan the same atom from the beginning, up to one that takes all of a run.
    """
    if not atoms:
        return True
    for alternative in later if len(atoms) == 1 else ():
        number = next((n for n, item in enumerate(alternative) if item.most is None), None)
        if number is None or any(item.may_fail for item in alternative[:number]):
            return False
        item, rest = alternative[number], alternative[number + 1 :]
        if item.atom != atoms[0] or not item.greedy or item.least > 1:
            return False
        if item.least == 1 and not any(after.may_fail for after in rest):
            return True
        if _scanned(alternative) != atoms or number:
            return False
    return False


def _alternatives(pattern: str) -> list[_Alternative]:
    """The alternatives of an expression, as items. Raises `_UnknownSyntaxError`."""
    made: list[_Alternative] = []
    items: list[_Item] = []
    parts = list(_atoms(pattern))
    for number, part in enumerate(parts):
        if part == ")":
            raise _UnknownSyntaxError(pattern)
        if part == "|":
            made.append(tuple(items))
            items = []
        elif not _is_quantifier(part):
            items.append(_Item(part))
        elif number and not _is_quantifier(parts[number - 1]) and items:
            items[-1] = _quantified(items[-1].atom, part)
        elif part in "?+" and number > 1 and _is_quantifier(parts[number - 1]) and items:
            last = items[-1]
            items[-1] = _Item(last.atom, last.least, last.most, greedy=part == "+")
        else:
            raise _UnknownSyntaxError(pattern)
    return [*made, tuple(items)]


def _is_quantifier(part: str) -> bool:
    return part in ("*", "+", "?") or (part != "{}" and COUNT.fullmatch(part) is not None)


def _quantified(atom: str, quantifier: str) -> _Item:
    bounds: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if quantifier in bounds:
        return _Item(atom, *bounds[quantifier])
    low, comma, high = quantifier[1:-1].partition(",")
    least = int(low or 0)
    return _Item(atom, least, least if not comma else int(high) if high else None)


def _atoms(pattern: str) -> Iterator[str]:
    """Atoms, quantifiers and bars, each group as one atom. Raises `_UnknownSyntaxError`."""
    waiting = iter([piece for part in PARTS.findall(pattern) for piece in _pieces(part)])
    for part in waiting:
        yield _group(part, waiting) if part.startswith("(") else part


def _pieces(part: str) -> Iterable[str]:
    """A part as its pieces: letters one by one, since a quantifier is for the last of them."""
    if part.startswith("("):
        opening = _OPENING.match(part)
        if opening is None or part[opening.end() :].startswith("?"):
            raise _UnknownSyntaxError(part)
        return [opening[0], *part[opening.end() :]]
    if len(part) > 1 and part.startswith("["):
        known, pieces = not _ODD_CLASS.search(part[1:-1]), [part]
    elif part.startswith("\\"):
        known, pieces = _ESCAPES.match(part) is not None, [part]
    elif part in ("|", ".", ")") or _is_quantifier(part):
        known, pieces = True, [part]
    else:
        known, pieces = part not in ("[", "]", "{", "}"), list(part)
    if not known:
        raise _UnknownSyntaxError(part)
    return pieces


def _group(opening: str, waiting: Iterator[str]) -> str:
    """The text of a group whose opening was read; nothing in it may be without a bound."""
    texts, depth = [opening], 1
    while depth:
        part = next(waiting, None)
        if part is None or (_is_quantifier(part) and part != "?"):
            raise _UnknownSyntaxError(opening)
        depth += part.startswith("(") - (part == ")")
        texts.append(part)
    return "".join(texts)
