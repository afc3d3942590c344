"""Damage to files: random bytes, and values of kinds that nobody expects."""

import copy
import random
from typing import Any

JSON_PIECES = (
    b"9", b"-", b'"', b"{", b"}", b"[", b"]", b",", b"\0", b"1e999", b"null", b"true", b"\\ud800",
    b"[]", b"{}", b"NaN", b"\xff", b"\xef\xbb\xbf",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e308, 2**63, 10**200, "", "\ud800", "x" * 300, [], {}, [[]],
    {"a": 1}, "\x1b[31m", [None], ["a", 1],
)  # fmt: skip


def damaged(
    data: bytes, chance: random.Random, pieces: tuple[bytes, ...] = JSON_PIECES, first: int = 0
) -> bytes:
    """`data` with one to four changes: bits, bytes, pieces; with `first`, among so many bytes."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not result:
            break
        at = chance.randrange(min(len(result), first or len(result)))
        match chance.randrange(5):
            case 0:
                result[at] = chance.randrange(256)
            case 1:
                result[at] ^= 1 << chance.randrange(8)
            case 2:
                del result[at : at + chance.randint(1, 9)]
            case 3:
                result[at:at] = chance.choice(pieces)
            case _:
                result[at:at] = result[at : at + chance.randint(1, 40)]
    return bytes(result)


def with_odd_value(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value in which one value, or one key, is of another kind than expected."""
    whole = copy.deepcopy(value)
    node = whole
    while isinstance(node, dict | list) and node:
        key = chance.choice([*node] if isinstance(node, dict) else range(len(node)))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
            node = inner
            continue
        if isinstance(node, dict) and chance.random() < 0.15:
            node[chance.choice(["", "\ud800", "a\0b", "x" * 600])] = node.pop(key)
        else:
            node[key] = copy.deepcopy(chance.choice(ODD_VALUES))
        break
    return whole
