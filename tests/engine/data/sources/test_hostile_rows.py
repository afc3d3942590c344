"""Rows that are made to take time and memory end soon, by name, and large files are streamed."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.data.dataset import RowChoice, read_chosen, read_rows
from engine.data.sources.streams.json_cursor import JsonCursor
from engine.data.sources.streams.json_lines import read_json
from engine.data.sources.streams.located import BadLine, Located, RowLimit
from engine.errors import DataError
from engine.storage import strict_json

PAIR = {"prompt": "q", "response": "a"}
MEBIBYTE = 2**20


def repeated(piece: str, size: int) -> str:
    return piece * (size // len(piece))


def dense(size: int) -> dict[str, str]:
    """Rows of so many bytes, each of the worst kind that is known."""
    keys = ",".join(f'"{i}":0' for i in range(size // 12))
    turns = repeated('{"role":"user","content":"x"},', size)
    return {
        "lists": '{"prompt":"q","x":[' + repeated("[],", size) + "[]]}",
        "objects": '{"prompt":"q","x":[' + repeated("{},", size) + "{}]}",
        "keys": '{"prompt":"q","x":{' + keys + "}}",
        "messages": '{"messages":[' + turns + '{"role":"user","content":"x"}]}',
        "unclosed": '{"prompt":"' + repeated("\\", size),
        "escapes": '{"prompt":"' + repeated("\\\\", size),
        "halves": '{"prompt":"q","response":"' + repeated("\\ud83d", size) + '"}',
        "open": '{"prompt":"q","x":[' + repeated("1,", size),
        "deep": '{"prompt":"q","x":' + repeated("[", size),
    }


@pytest.mark.parametrize("kind", list(dense(0)))
@pytest.mark.parametrize("form", ["line", "array", "inside"])
def test_a_row_of_the_worst_kind_is_named_within_time_and_memory(
    kind: str, form: str, tmp_path: Path
) -> None:
    size, limit = MEBIBYTE // 4, RowLimit(MEBIBYTE // 4)
    row = dense(size - 100)[kind]
    around = {"line": "%s", "array": "[%s]", "inside": '{"data":[{"prompt":"q"},%s]}'}[form]
    path = tmp_path / "d.json"
    path.write_text(around % row + "\n")
    tracemalloc.start()
    started = time.process_time()
    try:
        values = list(read_json(path, "d", lambda raw: "prompt" in raw or "messages" in raw, limit))
        bad = [str(value) for value in values if isinstance(value, BadLine)]
    except DataError as error:
        bad = [str(error)]
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(bad) == 1
    assert bad[0].startswith("d:1:")
    assert len(bad[0]) < 500
    assert seconds < 3
    assert peak < 12 * MEBIBYTE


def test_a_row_may_be_as_large_as_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(PAIR | {"response": "a" * n}) + "\n" for n in (900, 1200)))
    allowed, report = read_chosen(path, RowChoice(bad_lines="skip", limit=RowLimit(1024)))
    assert (len(allowed), report.skipped) == (
        1,
        [
            f"{path}:2:1: the row is longer than 1,024 bytes. Split or shorten the row, or allow "
            "larger ones with --max-row-bytes."
        ],
    )
    assert len(read_chosen(path, RowChoice(limit=RowLimit(2048)))[0]) == 2


@pytest.mark.parametrize(
    ("name", "pack"),
    [("d.jsonl.gz", gzip.compress), ("d.jsonl.bz2", bz2.compress), ("d.jsonl.xz", lzma.compress)],
)
def test_a_compressed_file_does_not_unpack_without_end(
    name: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(pack(b" " * (34 * MEBIBYTE)))
    with pytest.raises(DataError, match="unpacks to more than 32 MiB, over 100 times its size"):
        read_json_count(path)
    path.write_bytes(pack(b" " * (30 * MEBIBYTE) + json.dumps(PAIR).encode()))
    assert read_json_count(path) == 1


def read_json_count(path: Path) -> int:
    return sum(1 for _ in read_json(path, "d", lambda raw: "prompt" in raw))


@pytest.mark.parametrize(
    "around",
    ["[%s]", '{"version": [1, 2], "data": [%s], "license": {"a": "]"}}', "%s"],
    ids=["array", "inside", "values over lines"],
)
def test_rows_of_a_large_file_are_read_one_by_one(around: str, tmp_path: Path) -> None:
    row = json.dumps(PAIR | {"response": 'a "]}\\' * 30}, indent=1)
    count = 6 * MEBIBYTE // len(row)
    path = tmp_path / "d.json.gz"
    path.write_bytes(
        gzip.compress((around % (", " if around != "%s" else "\n").join([row] * count)).encode())
    )
    tracemalloc.start()
    first = tracemalloc.get_traced_memory()[0]
    values = read_json(path, "d", lambda raw: "prompt" in raw, RowLimit(MEBIBYTE))
    lines = [value.position.line for value in values if isinstance(value, Located)]
    peak = tracemalloc.get_traced_memory()[1] - first
    tracemalloc.stop()
    assert len(lines) == count
    assert lines[:3] == [1, 4, 7] if around != "%s" else [1, 5, 9]
    assert peak < 11 * MEBIBYTE


def values_of(text: bytes, most: int) -> list[Any]:
    cursor = JsonCursor(io.BytesIO(text), "d", RowLimit(most), "")
    values, mark = [], cursor.peek()
    assert mark == "["
    mark = cursor.step()
    while mark != "]":
        item = cursor.value()
        values.append((item.position.line, item.position.column, item))
        mark = cursor.peek()
        mark = cursor.step() if mark == "," else mark
    return values


def odd_values(chance: random.Random) -> Iterator[Any]:
    texts = ("", '"', "\\", '\\"', "[", "]}", "\u00e9\U0001f600", "\n", "a" * 700)
    while True:
        text = "".join(chance.choices(texts, k=3))
        yield chance.choice([text, {text: [text]}, [[], {}, text], 12, -1.5e3, True, None, {}])


def test_values_are_those_of_the_whole_text_wherever_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chance = random.Random(3)
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr("engine.data.sources.streams.json_cursor._CHUNK", chunk)
        wanted = list(itertools.islice(odd_values(chance), 40))
        text = json.dumps(wanted, indent=chance.choice([None, 1]), ensure_ascii=chunk == 2)
        read = values_of(text.encode(), 600)
        assert len(read) == len(wanted)
        for value, (_, _, item) in zip(wanted, read, strict=True):
            if isinstance(item, Located):
                assert item.value == value
            else:
                assert len(json.dumps(value, ensure_ascii=False)) > 600 // 32


def test_a_text_that_is_cut_off_asks_for_more_and_a_broken_one_does_not() -> None:
    whole = '{"a": [1, "\\u00e9\\ud83d\\ude00", true], "b": {"c": null}}'
    for end in range(1, len(whole)):
        assert strict_json.begin(whole[:end], 0) is None
    with pytest.raises(strict_json.JSONFault):
        strict_json.begin('{"a": nope' + " " * 100, 0)
    with pytest.raises(strict_json.JSONFault):
        strict_json.begin('{"a": 1, "a": 2}', 0)


def test_bad_rows_of_a_text_over_several_lines_do_not_hide_those_after_them(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    rows = [json.dumps(PAIR, indent=1), '{"prompt": nope}', json.dumps(PAIR), json.dumps(PAIR)]
    path.write_text("\n".join(rows))
    read, report = read_rows(path, bad_lines="skip")
    assert [row.line for row in read] == [1, 6, 7]
    assert [told.split(":")[1] for told in report.skipped] == ["5"]
