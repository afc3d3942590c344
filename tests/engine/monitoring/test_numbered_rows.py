"""Rows by number are the rows that a run trains on and holds out, and none of them in memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config.train_config import TrainConfig
from engine.errors import DataError
from engine.monitoring.numbered_rows import NumberedRows, rows_by_part
from engine.training.row_set import rows_of_run
from engine.training.streamed import open_stream
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Rows of two categories, some with equal questions, a blank line and a bad row among them."""
    lines = [
        json.dumps({"prompt": f"Word {n % 25}?", "response": f"{n}.", "category": "xy"[n % 2]})
        for n in range(40)
    ]
    lines[7:7] = ["", '{"prompt": "no answer"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "rows.jsonl")


def sources(rows: NumberedRows) -> list[str]:
    return [row.source for row in rows.rows(0, len(rows))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"heldout": 0.2},
        {"heldout": 0.2, "seed": 7, "category": "y"},
        {"heldout": 0.3, "limit_rows": 11},
        {"eval_data": True},
    ],
)
def test_they_are_those_of_the_run(data: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    if changes.get("eval_data"):
        other = tmp_path / "other.csv"
        other.write_text("prompt,response\nOne?,1\nTwo?,2\n")
        changes = {"eval_data": str(other)}
    config = TrainConfig(model="m", data=data, bad_lines="skip", **changes)
    train, heldout, _, _ = rows_of_run(config)
    parts = rows_by_part(config)
    assert sources(parts["train"]) == [row.source for row in train]
    assert sources(parts["heldout"]) == [row.source for row in heldout]
    assert [row.messages for row in parts["train"].rows(2, 3)] == [r.messages for r in train[2:5]]
    assert parts["train"].rows(len(train), 5) == []
    with pytest.raises(DataError, match=r"rows\.jsonl:9"):
        rows_by_part(config.model_copy(update={"bad_lines": "fail"}))


def test_of_a_stream_they_are_what_it_holds_out(data: str, tmp_path: Path) -> None:
    from engine.model_sources.open import describe_model
    from engine.tokenization.tokenizer import load_tokenizer

    model = write_tiny_model(tmp_path / "model")
    config = TrainConfig(
        model=str(model), data=data, bad_lines="skip", heldout=0.2, streaming="on", max_length=64
    )
    described = describe_model(str(model))
    tokenizer = load_tokenizer(described)
    stream = open_stream(config, tokenizer, described.config.vocab_size)
    assert stream is not None
    parts = rows_by_part(config)
    assert sources(parts["heldout"]) == [row.source for row in stream.stream.heldout_rows()]
    assert not set(sources(parts["train"])) & set(sources(parts["heldout"]))
    assert len(sources(parts["train"])) + len(sources(parts["heldout"])) == 40
