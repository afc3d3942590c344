"""Reading data sets: the forms that are accepted, the filters, and errors with their place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.row_settings import MAX_ROW_BYTES
from engine.data.dataset import BadLines, load_rows, read_rows
from engine.errors import ConfigError, DataError

PAIR = {"prompt": "Q", "response": "A"}
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"messages": TURNS},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {"question": "Q", "answer": "A"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversation": [{"from": "user", "value": "Q"}, {"from": "model", "value": "A"}]},
    ],
)
def test_every_form_becomes_the_same_messages(row: dict[str, Any], tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "d.jsonl", row))[0].messages == TURNS


def test_alpaca_input_system_and_history_are_kept_in_order(tmp_path: Path) -> None:
    row = {
        "system": "S", "history": [["q1", "a1"]], "instruction": "Do", "input": "this",
        "output": "done",
    }  # fmt: skip
    messages = load_rows(write(tmp_path / "d.jsonl", row))[0].messages
    assert [message["role"] for message in messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert messages[3]["content"] == "Do\nthis"


def test_sharegpt_function_calls_become_tool_calls(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3"},
        ],
        "tools": '[{"name": "add"}]',
    }
    loaded = load_rows(write(tmp_path / "d.jsonl", row))[0]
    assert loaded.messages[1]["tool_calls"][0]["function"]["name"] == "add"
    assert loaded.messages[2]["role"] == "tool"
    assert loaded.tools == [{"name": "add"}]


def test_metadata_and_place_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", PAIR, {**PAIR, "category": "c", "rating": 4})
    with path.open("a") as file:
        file.write("\n\n" + json.dumps({**PAIR, "schema_version": "v1"}) + "\n")
    rows = load_rows(path)
    assert [row.line for row in rows] == [1, 2, 5]
    assert rows[2].source == f"{path}:5"
    assert (rows[1].category, rows[1].rating, rows[2].schema_version) == ("c", 4, "v1")


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.json.gz"])
def test_arrays_are_recognised_by_content_and_know_their_lines(name: str, tmp_path: Path) -> None:
    data = ("\ufeff \n[\n" + json.dumps(PAIR, indent=1) + ",\n" + json.dumps(PAIR) + "]\n").encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row.line for row in load_rows(path)] == [3, 7]


def test_gzipped_lines_with_carriage_returns_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    line = json.dumps(PAIR)
    path.write_bytes(gzip.compress(f"\ufeff{line}\r\n{line}".encode()))
    assert len(load_rows(path)) == 2


def test_ratings_and_categories_filter_and_are_counted(tmp_path: Path) -> None:
    rows = [{**PAIR, "rating": n, "category": "ab"[n % 2]} for n in range(1, 6)] + [PAIR]
    path = write(tmp_path / "d.jsonl", *rows)
    rows_left, report = read_rows(path, min_rating=3)
    assert [row.rating for row in rows_left] == [3, 4, 5]
    assert (report.read, report.below_rating, report.unrated) == (6, 2, 1)
    rows_left, report = read_rows(path, category=["a"])
    assert [row.rating for row in rows_left] == [2, 4]
    assert report.other_category == 4


BAD_ROWS = [
    (b'{"prompt": "\xc3\xa9", "response": }', ":2:29:", "expecting value"),
    (b'{"prompt": "a', ":2:12:", "unterminated"),
    (b'{"prompt": "\xc3\xa9\xff"}', ":2:14:", "not UTF-8"),
    (b'{"prompt": NaN, "response": "a"}', ":2:12:", "NaN"),
    (b'{"prompt": "a", "prompt": "b"}', ":2:17:", "second time"),
    (b'["a"]', ":2:1:", "object was expected"),
    (b'"text"', ":2:1:", "a text where an object was expected"),
    (b'{"words": "a"}', ":2:1:", "'messages'"),
    (b'{"prompt": 1, "response": "a"}', ":2:1:", "'prompt' is a number"),
    (b'{"prompt": "q", "response": null}', ":2:1:", "was expected"),
    (b'{"prompt": "q", "response": " "}', ":2:1:", "empty"),
    (b'{"prompt": "q", "question": "q", "response": "a"}', ":2:1:", "mean the same"),
    (b'{"prompt": "q", "response": "a", "rating": 6}', ":2:1:", "'rating' is 6"),
    (b'{"prompt": "q", "response": "a", "rating": true}', ":2:1:", "'rating' is True"),
    (b'{"messages": []}', ":2:1:", "list of messages"),
    (b'{"messages": [{"role": "user", "content": "q"}]}', ":2:1:", "nothing to learn"),
    (b'{"messages": [{"role": "boss", "content": "q"}]}', ":2:1:", "messages[0].role"),
    (b'{"messages": [{"role": "user"}]}', ":2:1:", "messages[0] has no 'content'"),
    (b'{"conversations": [{"from": "x", "value": "q"}]}', ":2:1:", "conversations[0].from"),
]


@pytest.mark.parametrize(("line", "position", "words"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_stops_the_load_with_file_line_and_column(
    line: bytes, position: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    message = str(caught.value)
    assert f"{path}{position}" in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        (
            '[\n{"prompt": "q", "response": "a"},\n  {"prompt": nope}\n]',
            ":3:14:",
            "expecting value",
        ),
        ('[\n{"prompt": "q", "response": "a"}\n  {"a": 1}]', ":3:3:", "expected ','"),
        ('[{"prompt": "q", "response": "a"}', ":1:34:", "expected ','"),
        ('[{"prompt": "q", "response": "a"}]\n\n7', ":3:1:", "follows the end"),
        ('[\n{"prompt": "q",\n "response": "a", "x": Infinity}]', ":3:24:", "Infinity"),
    ],
)
def test_a_broken_array_is_refused_with_its_place_even_when_bad_rows_are_skipped(
    text: str, position: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        load_rows(path, bad_lines="skip")
    assert f"{path}{position}" in str(caught.value)


def test_bad_rows_can_be_skipped_and_are_counted_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(PAIR) + "\n{broken\n" + json.dumps({"a": 1}) + "\n")
    rows, report = read_rows(path, bad_lines="skip")
    assert len(rows) == 1
    assert report.read == 3
    assert [entry.split(":")[1] for entry in report.skipped] == ["2", "3"]
    with pytest.raises(DataError, match="2 of 3 rows are bad, more than the 50 %"):
        read_rows(path, bad_lines="skip:50%")


def test_a_line_over_sixteen_mebibytes_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "' + b"x" * (MAX_ROW_BYTES + 10) + b'"}\n')
        file.write(json.dumps(PAIR).encode() + b"\n")
    rows, report = read_rows(path, bad_lines="skip")
    assert [row.line for row in rows] == [2]
    assert "16 MiB" in report.skipped[0]


@pytest.mark.parametrize("content", ["", "\n \n", "[]", " [ ] "])
def test_an_empty_data_set_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="empty"):
        load_rows(path)


def test_a_data_set_whose_rows_are_all_filtered_out_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {**PAIR, "rating": 1}, PAIR)
    with pytest.raises(DataError, match="none of 2 rows is left: 0 bad, 1 rated below"):
        load_rows(path, min_rating=2)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    fake = tmp_path / "d.jsonl.gz"
    fake.write_bytes(b'{"prompt": "q"}')
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(PAIR).encode() * 100)[:40])
    for path in (fake, cut, tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(DataError, match=path.name):
            load_rows(path)


def test_a_folder_means_its_train_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PAIR)
    write(tmp_path / "heldout.jsonl", PAIR, PAIR)
    assert len(load_rows(tmp_path)) == 1
    assert len(load_rows([tmp_path, tmp_path / "heldout.jsonl"])) == 3


@pytest.mark.parametrize(
    "text", ["sometimes", "skip:", "skip:200%", "skip:5", "fail:5%", "skip:٥%"]
)
def test_an_unknown_policy_for_bad_lines_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="skip:5%"):
        BadLines.parse(text)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "d.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n" + data)
    try:
        rows, report = read_rows(path, bad_lines="skip")
    except DataError:
        return
    assert len(rows) + len(report.skipped) == report.read
