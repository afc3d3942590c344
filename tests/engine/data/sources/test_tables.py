"""Tables: encodings, quotes, empty cells, types, columns of one name."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from engine.data.dataset import RowChoice, load_rows, read_chosen, read_rows
from engine.errors import DataError


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_cells_become_what_rows_hold(tmp_path: Path) -> None:
    text = (
        "prompt,response,rating,category,system,messages\r\n"
        '"a\r\nb","x, ""y""",4,,Be kind.,\r\n'
        "\r\n"
        "7,2026-01-31,5.0,dates,,\n"
    )
    rows = load_rows(write(tmp_path / "d.csv", text))
    assert [row.messages[-2]["content"] for row in rows] == ["a\r\nb", "7"]
    assert [row.messages[-1]["content"] for row in rows] == ['x, "y"', "2026-01-31"]
    assert [(row.rating, row.category) for row in rows] == [(4, None), (5, "dates")]
    assert [row.line for row in rows] == [2, 5]
    assert rows[0].messages[0] == {"role": "system", "content": "Be kind."}


def test_conversations_stand_in_cells_as_json(tmp_path: Path) -> None:
    talk = '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'
    cell = talk.replace('"', '""')
    row = load_rows(write(tmp_path / "d.csv", f'messages,id\n"{cell}",1\n'))[0]
    assert [message["content"] for message in row.messages] == ["Q", "A"]
    assert row.unused == ("id",)


BAD = [
    ("prompt,response\na,b\nc\nd,e\n", "d.csv:3:1: found 1 cells where the table has 2"),
    ("prompt,response\na,b\nc,d,e\n", "d.csv:3:1: found 3 cells"),
    (b"prompt,response\na,b\nc,\xe9t\xe9\n", "d.csv:3:1: found the byte 0xe9"),
    ('prompt,response\n"a"b,c\nd,e\n', "d.csv:2:1: found broken CSV"),
    ('prompt,response\na,b\n"c,d\ne,f\n', "d.csv:3:1: found broken CSV"),
    ("prompt,response\n,\na,\n", "'response' is empty"),
]


@pytest.mark.parametrize(("text", "words"), BAD, ids=range(len(BAD)))
def test_bad_rows_are_named_and_the_others_are_read(
    text: str | bytes, words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "d.csv", text)
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        load_rows(path)
    good = b"prompt,response" not in path.read_bytes().replace(b"a,b", b"")
    if b"a,b" in path.read_bytes() or good:
        rows, report = read_rows(path, bad_lines="skip")
        assert len(report.skipped) == 1
        assert rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,response,prompt\na,b,c\n", "several columns are called 'prompt'"),
        ("", "the data set is empty"),
        ("\n\n", "the data set is empty"),
        ("prompt,response\n", "the data set is empty"),
        ("first,second\na,b\n", "--map names columns otherwise"),
        ("prompt,response\na,b\n".encode("utf-16"), "this is a UTF-16 file"),
    ],
    ids=range(6),
)
def test_tables_that_cannot_be_read_say_why(text: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        load_rows(write(tmp_path / "d.csv", text))


def test_a_quote_that_is_never_closed_costs_one_row_and_little_memory(tmp_path: Path) -> None:
    text = 'prompt,response\na,b\n"c,d\n' + f"e,{'f' * 8000}\n" * 4_000
    rows, report = read_rows(write(tmp_path / "d.csv", text), bad_lines="skip")
    assert len(report.skipped) == 1
    assert "longer than 16 MiB" in report.skipped[0]
    assert len(rows) > 1_000


def test_types_of_parquet_become_text_and_nested_nulls_vanish(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    other = {"function": {"name": "g", "arguments": {"day": 3}}}
    rows: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": None, "tool_calls": [one]},
                {"role": "tool", "content": "ok"},
                {"role": "assistant", "content": "A"},
            ]
        }
        for one in (call, other)
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "talk.parquet")
    read = load_rows(tmp_path / "talk.parquet")
    calls = [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in read]
    assert calls == [{"city": "Rome"}, {"day": 3}]
    values = {
        "question": [datetime.date(2026, 1, 31), None],
        "answer": [decimal.Decimal("1.50"), decimal.Decimal("2.00")],
        "rating": [5.0, 3.0],
        "raw": [b"x", None],
    }
    pyarrow.parquet.write_table(pa.table(values), tmp_path / "types.parquet")
    with pytest.raises(DataError, match="the column 'raw' holds bytes"):
        load_rows(tmp_path / "types.parquet")
    values.pop("raw")
    pyarrow.parquet.write_table(pa.table(values), tmp_path / "types.parquet")
    rows_read, report = read_rows(tmp_path / "types.parquet", bad_lines="skip")
    assert [m["content"] for m in rows_read[0].messages] == ["2026-01-31", "1.50"]
    assert rows_read[0].rating == 5
    assert "types.parquet:2:1: found" in report.skipped[0]


def test_damaged_and_repeated_parquet_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cut.parquet", b"PAR1\x15\x04 and no end")
    with pytest.raises(DataError, match="Parquet file cannot be read"):
        load_rows(tmp_path / "cut.parquet")
    twice = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="several columns are called 'prompt'"):
        load_rows(tmp_path / "twice.parquet")


@pytest.mark.parametrize(
    ("columns", "content"),
    [
        ({"prompt": "q", "response": "a"}, ["one", "two"]),
        ({"prompt": "a", "response": "meta.text"}, ["two", "three"]),
        ({"prompt": "question", "response": "answer", "system": "q"}, ["one", "x", "y"]),
        ({"text": "q"}, []),
    ],
    ids=range(4),
)
def test_a_map_names_columns_and_wins_over_what_would_be_recognised(
    columns: dict[str, str], content: list[str], tmp_path: Path
) -> None:
    row = '{"q":"one","a":"two","meta":{"text":"three"},"question":"x","answer":"y","rating":5}'
    rows, report = read_chosen(
        write(tmp_path / "d.jsonl", row), RowChoice(columns=columns, min_rating=5)
    )
    assert [message["content"] for message in rows[0].messages] == content
    assert rows[0].text == ("one" if "text" in columns else None)
    named = {column.partition(".")[0] for column in columns.values()}
    assert set(report.unused) == {"q", "a", "meta", "question", "answer"} - named
    with pytest.raises(DataError, match="no column 'missing'"):
        read_chosen(tmp_path / "d.jsonl", RowChoice(columns={"text": "missing"}))
