"""Tokenised rows are stored under everything that decides them, and never used for others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from engine.data.dataset import load_rows
from engine.data.examples import ExampleSettings, examples_of
from engine.data.rendering import Learning
from engine.data.rows import Row
from engine.data.token_cache import cache_of, key_of, read_tokens, write_tokens
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.support.source_files import lines, question_rows
from tests.support.tiny_model import write_tokenizer
from tests.support.tokenizer_folder import TokenizerFolder

HOW = ExampleSettings(64)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return load_tokenizer(TokenizerFolder(tmp_path))


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    (tmp_path / "d.jsonl").write_bytes(lines(question_rows(20)) + b'{"text": "a document"}\n')
    return load_rows(tmp_path / "d.jsonl")


def test_what_is_stored_comes_back_whole(
    rows: list[Row], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = examples_of(rows, tokenizer, HOW)
    key = key_of(rows, tokenizer, HOW)
    assert read_tokens(tmp_path, key) is None
    write_tokens(tmp_path, key, made)
    assert read_tokens(tmp_path, key) == made
    assert key_of(list(rows), tokenizer, ExampleSettings(64)) == key


CHANGES: dict[str, Callable[[ExampleSettings], ExampleSettings]] = {
    "length": lambda how: replace(how, max_length=65),
    "kwargs": lambda how: replace(how, template_kwargs={"a": 1}),
    "bad": lambda how: replace(how, bad_rows="skip"),
    "answers": lambda how: replace(how, learning=Learning(train_on="last")),
    "thinking": lambda how: replace(how, learning=Learning(thinking="strip")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_is_in_the_key(name: str, rows: list[Row], tokenizer: Tokenizer) -> None:
    assert key_of(rows, tokenizer, CHANGES[name](HOW)) != key_of(rows, tokenizer, HOW)


def test_rows_tokenizer_and_template_are_in_the_key(
    rows: list[Row], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def backend() -> Any:
        return Backend.from_str(tokenizer.serialised())

    words = tokenizer.special_tokens
    plain = Tokenizer(backend(), words, "{{ messages[0].content }}")
    added = backend()
    added.add_tokens([AddedToken("zzz")])
    others = [
        Tokenizer(backend(), words, "{{ messages[0].content }} "),
        Tokenizer(added, words, "{{ messages[0].content }}"),
        Tokenizer(backend(), words, "{{ messages[0].content }}", add_eos=True),
    ]
    clock = "{{ strftime_now('%Y') }}"
    dated = [Tokenizer(backend(), words, clock, now=f"{year}-01-01") for year in (2025, 2026)]
    keys = [key_of(rows, one, HOW) for one in (plain, *others, *dated)]
    changed = [replace(rows[0], messages=[*rows[0].messages, *rows[1].messages]), *rows[1:]]
    moved = [replace(rows[0], line=99), *rows[1:]]
    with_tools = [replace(rows[0], tools=[{"type": "function"}]), *rows[1:]]
    text = [*rows[:-1], replace(rows[-1], text="another")]
    others_of_rows = (changed, moved, with_tools, text, rows[1:], rows[::-1])
    keys += [key_of(other, plain, HOW) for other in others_of_rows]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", [10, -40, -3])
def test_a_damaged_file_is_as_if_it_were_not_there(
    damage: int, rows: list[Row], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    key = key_of(rows, tokenizer, HOW)
    write_tokens(tmp_path, key, examples_of(rows, tokenizer, HOW))
    path = tmp_path / f"{key}.tokens"
    data = bytearray(path.read_bytes())
    data[damage] ^= 1
    path.write_bytes(data)
    assert read_tokens(tmp_path, key) is None
    path.write_bytes(data[:damage])
    assert read_tokens(tmp_path, key) is None


def test_small_sets_are_not_stored_unless_a_folder_is_named(
    rows: list[Row], tmp_path: Path
) -> None:
    assert cache_of("auto", rows) is None
    assert cache_of("none", rows * 10_000) is None
    assert cache_of(str(tmp_path), rows) == tmp_path
    assert cache_of("auto", rows * 10_000) is not None


def test_a_disk_that_refuses_is_no_failure(
    rows: list[Row], tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    write_tokens(tmp_path / "file", "k", examples_of(rows, tokenizer, HOW))
    assert "was not written" in caplog.text
