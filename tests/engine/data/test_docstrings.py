"""Rows out of the standard library: enough, always the same, and nothing of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.dataset import load_rows
from engine.data.docstrings import docstring_pairs, split_by_module, write_docstrings
from engine.data.rows import Row
from engine.errors import DataError


@pytest.fixture(scope="module")
def pairs() -> list[Row]:
    return docstring_pairs()


def name(row: Row) -> str:
    return str(row.messages[0]["content"]).split("`")[1]


def answer(row: Row) -> str:
    return str(row.messages[1]["content"])


def test_there_are_more_than_a_thousand_rows_of_every_kind(pairs: list[Row]) -> None:
    assert len(pairs) > 1000
    assert {row.category for row in pairs} == {"function", "class", "method"}
    names = {name(row) for row in pairs}
    assert {"shutil.rmtree", "math.hypot", "collections.defaultdict"} <= names
    row = next(row for row in pairs if name(row) == "textwrap.dedent")
    assert row.messages[0]["content"] == "What does the Python function `textwrap.dedent` do?"
    assert answer(row).startswith("Remove any common leading whitespace")
    assert (row.rating, row.file) == (5, "textwrap.py")


def test_names_are_public_and_modules_with_side_effects_are_left_out(pairs: list[Row]) -> None:
    for row in pairs:
        parts = name(row).split(".")
        assert not any(part.startswith("_") for part in parts), row
        assert parts[0] not in {"antigravity", "this", "idlelib", "test", "tkinter", "turtle"}


def test_rows_differ_and_have_a_sensible_length(pairs: list[Row]) -> None:
    starts = [" ".join(answer(row).casefold().split())[:100] for row in pairs]
    assert len(set(starts)) == len(starts)
    assert all(60 <= len(answer(row)) <= 1200 for row in pairs)


def test_nothing_of_this_machine_is_in_the_rows(pairs: list[Row]) -> None:
    text = "\n".join(answer(row) + row.file for row in pairs)
    for private in (sys.prefix, sys.base_prefix, str(Path.home()), os.getcwd()):  # noqa: PTH109
        assert len(private) < 4 or private not in text


def test_the_order_is_the_same_in_another_process(pairs: list[Row]) -> None:
    code = (
        "from engine.data.docstrings import docstring_pairs\n"
        "print(*[row.messages[0]['content'] for row in docstring_pairs(40)], sep='\\n')"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONHASHSEED": "99"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=root, env=environment,
    )  # fmt: skip
    assert done.stdout.splitlines() == [row.messages[0]["content"] for row in pairs[:40]]


def test_no_module_is_on_both_sides_and_no_held_out_text_was_seen(pairs: list[Row]) -> None:
    train, heldout_rows = split_by_module(pairs, 0.15)
    modules = [{name(row).split(".")[0] for row in part} for part in (train, heldout_rows)]
    assert not modules[0] & modules[1]
    assert 0.05 < len(heldout_rows) / len(pairs) < 0.3
    seen = {line.strip() for row in train for line in answer(row).splitlines()}
    copied = [
        row for row in heldout_rows
        if all(line.strip() in seen for line in answer(row).splitlines() if line.strip())
    ]  # fmt: skip
    assert len(copied) <= 0.02 * len(heldout_rows)


def test_held_out_rows_that_repeat_a_training_text_are_left_out() -> None:
    def row(module: str, text: str) -> Row:
        question = {"role": "user", "content": f"What does the Python function `{module}.f` do?"}
        return Row([question, {"role": "assistant", "content": text}], 1, module)

    body = "open the file that has this name and return a new descriptor for it"
    same = [row(f"m{n}", f"Variant {n}: {body}") for n in range(40)]
    own = [row(f"m{n}", " ".join(f"word{n}x{i}" for i in range(12))) for n in range(40)]
    train, heldout_rows = split_by_module([*same, *own], 0.3)
    assert 20 < len([item for item in train if item in same]) < 40
    assert heldout_rows
    assert not [item for item in heldout_rows if item in same]


def test_the_files_are_read_back_as_rows(tmp_path: Path) -> None:
    train, trained, heldout, count = write_docstrings(tmp_path / "new" / "folder", limit=200)
    rows = load_rows([train, heldout], min_rating=5)
    assert len(rows) == trained + count <= 200
    assert count > 0
    assert rows[0].schema_version == "docstrings-1"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be made"):
        write_docstrings(tmp_path / "file" / "sub", limit=10)
