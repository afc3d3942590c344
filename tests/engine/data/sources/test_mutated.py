"""Mutated rows in files of lines and tables: no crash, and every bad row is named."""

import json
import random
from contextlib import suppress
from pathlib import Path

import pytest

from engine.data.dataset import read_rows
from engine.errors import DataError

PAIR = json.dumps({"prompt": "What is 1 + 1?", "response": "It is 2, or so they say."}).encode()
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo", "tool_calls": [CALL]},
]
TALK = json.dumps({"messages": TURNS, "tools": [{"type": "function"}]}).encode()
PIECES = (b'"', b"{", b"}", b"null", b"[", b"\\u", b"1e999", b"\xef\xbb\xbf", b"\x00", b",", b";")


def mutated(line: bytes, chance: random.Random) -> bytes:
    """A line with some bytes changed, removed, repeated or put in; it stays one line."""
    data = bytearray(line)
    for _ in range(chance.randint(1, 4)):
        at, kind = chance.randrange(len(data) + 1), chance.randrange(4)
        if kind == 0:
            data[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            del data[at : at + chance.randint(1, 6)]
        elif kind == 2:
            data[at:at] = data[at : at + chance.randint(1, 9)]
        else:
            data[at:at] = chance.choice(PIECES)
    return bytes(data).replace(b"\n", b" ").replace(b"\r", b" ") + b"."


@pytest.mark.parametrize(
    ("name", "first", "lines"),
    [("d.jsonl", PAIR, (PAIR, TALK)), ("d.csv", b"prompt,response,rating", (b'"a, b",c d,4',))],
    ids=["jsonl", "csv"],
)
def test_every_bad_row_is_named_and_nothing_crashes(
    name: str, first: bytes, lines: tuple[bytes, ...], tmp_path: Path
) -> None:
    chance = random.Random(7)
    rows = [mutated(chance.choice(lines), chance) for _ in range(5000)]
    path = tmp_path / name
    good = PAIR if name.endswith("l") else b"a,b,3"
    path.write_bytes(b"\n".join([first, good, *rows]) + b"\n")
    read, report = read_rows(path, bad_lines="skip")
    assert read
    assert len(read) + len(report.skipped) == report.read
    assert len(report.skipped) > 1000
    for told in report.skipped:
        line = int(told.removeprefix(f"{path}:").split(":")[0])
        assert 2 <= line <= 5002


FORMS = (
    b'[{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]',
    b'{"prompt": "a",\n"response": "b"}\n{"prompt": "c",\n"response": "d"}\n',
    b'{"rows": [{"prompt": "a", "response": "b"}]}',
    b'{"prompt": ["a", "b"], "response": ["c", "d"]}',
)


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("odd", [b"\xd6", b"\xff", b"\xf0\x9f\x98"])
def test_a_byte_that_is_no_text_is_named_wherever_it_stands(
    form: int, odd: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    for at in range(len(FORMS[form]) + 1):
        for rest in (b"", FORMS[form][at:]):
            path.write_bytes(FORMS[form][:at] + odd + rest)
            with suppress(DataError):
                read_rows(path, bad_lines="skip")
