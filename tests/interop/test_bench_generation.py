"""The generation benchmark gives both sides the same work, and writes what it measured."""

import json
from pathlib import Path

import pytest

from bench.cpu import generation

pytestmark = pytest.mark.interop


def test_both_sides_make_the_same_tokens_and_a_row_is_written(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    asked = "--quick --rounds 1 --tokens 6 --prompt 8 --kinds float32 nf4-kept --batches 2"
    generation.main([*asked.split(), "--results", str(results)])
    (row,) = map(json.loads, results.read_text().splitlines())
    assert [(r["kind"], r["batch"]) for r in row["medians"]] == [("float32", 2), ("nf4-kept", 2)]
    assert row["medians"][0]["same_start"] == 1.0
    for median in row["medians"]:
        assert median["ours"]["tokens_per_second"] > 0
        assert median["peers"]["first_token_seconds"] > 0


def test_the_same_start_ends_with_the_first_difference() -> None:
    assert (
        generation.same_start([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 9, 3, 4], [5, 6, 7, 8]]) == 5 / 8
    )
