"""Training on rows that are streamed: chosen by size, resumed to the same bytes, in any source."""

import json
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.data.batches.loader import SHUFFLE
from engine.data.origins import Origin, write_origins
from engine.data.sources.resolve import RowFile
from engine.data.streaming import batch_stream
from engine.data.streaming.order import ShuffledOrder
from engine.errors import DataError
from engine.training import streamed
from engine.training.streamed import STREAMED_FROM, is_streamed
from engine.verbs.training.train import train
from tests.support.small_runs import small_run
from tests.support.source_files import question_rows, write_sqlite
from tests.support.tiny_model import write_tiny_model

ROWS = question_rows(40)
QUERY = "select question, answer from asked order by id"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def trained(tiny: Path, rows: Any, run: Path, **changes: Any) -> bytes:
    given: dict[str, Any] = {"lr_schedule": "constant", "streaming": "on"}
    train(small_run(tiny, rows, run, **(given | changes)), console=False)
    return adapter(run)


@pytest.mark.parametrize("packing", [False, True])
def test_a_streamed_run_goes_on_to_the_same_bytes(
    packing: bool, tiny: Path, rows: Path, tmp_path: Path
) -> None:
    whole = trained(tiny, rows, tmp_path / "whole", max_steps=12, packing=packing)
    trained(tiny, rows, tmp_path / "parts", max_steps=5, packing=packing)
    engine.resume(tmp_path / "parts", max_steps=12, console=False)
    assert adapter(tmp_path / "parts") == whole
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [line["step"] for line in steps] == list(range(1, 13))
    epochs = [line["epoch"] for line in steps]
    assert epochs == sorted(epochs)
    if not packing:
        assert epochs[-1] == pytest.approx(12 * 2 / 40)


def test_a_database_streams_to_the_same_bytes_as_its_file(
    tiny: Path, rows: Path, tmp_path: Path
) -> None:
    write_sqlite(tmp_path / "app.db", ROWS)
    url = f"sqlite:///{tmp_path}/app.db"
    by_file = trained(tiny, rows, tmp_path / "file")
    small = small_run(tiny, rows, tmp_path / "base", lr_schedule="constant", streaming="on")
    engine.train(small.model_copy(update={"data": (url,), "query": QUERY}), console=False)
    assert adapter(tmp_path / "base") == by_file


def test_a_changed_file_is_refused_on_resume(tiny: Path, rows: Path, tmp_path: Path) -> None:
    trained(tiny, rows, tmp_path / "run", max_steps=3)
    rows.write_text(rows.read_text().replace("What is 3 ", "What is 33 "))
    with pytest.raises(engine.CheckpointError, match="rows of"):
        engine.resume(tmp_path / "run", max_steps=6, console=False)


def test_large_files_are_streamed_and_settings_win(tiny: Path, tmp_path: Path) -> None:
    large, small = tmp_path / "large.jsonl", tmp_path / "small.jsonl"
    small.write_text("{}")
    with large.open("wb") as file:
        file.truncate(STREAMED_FROM)
    chosen = {
        (path.name, setting): is_streamed(
            small_run(tiny, path, tmp_path / "x", streaming=setting), [RowFile(path, path.name)]
        )
        for path in (large, small)
        for setting in ("auto", "on", "off", True)
    }
    assert {key for key, value in chosen.items() if value} == {
        ("large.jsonl", "auto"),
        ("large.jsonl", "on"),
        ("large.jsonl", True),
        ("small.jsonl", "on"),
        ("small.jsonl", True),
    }
    assert streamed.STREAMED_FROM < 1 << 30


def test_a_bad_row_leaves_a_fresh_checkpoint_and_the_run_goes_on_without_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_stream, "SAMPLE", 32)  # the bad row comes later
    plain = question_rows(64)
    bad = int(ShuffledOrder(64, 42, SHUFFLE, 0).at(40))
    path, run = tmp_path / "d.jsonl", tmp_path / "run"
    lines = [json.dumps(row) for row in plain]
    lines[bad] = '{"prompt": 1}'
    path.write_text("\n".join(lines))
    settings: dict[str, Any] = {"batch_size": 16, "max_steps": 3, "checkpoint_every": 0}
    told = rf"d\.jsonl:{bad + 1}:1: .*A checkpoint of step 2 of 3 is written: `engine resume"
    with pytest.raises(DataError, match=told):
        trained(tiny, path, run, **settings)
    assert (run / "checkpoint-2").is_dir()
    assert json.loads((run / "summary.json").read_text())["status"] == "Failure"
    engine.resume(run, bad_lines="skip", console=False)
    assert adapter(run) == trained(tiny, path, tmp_path / "b", bad_lines="skip", **settings)


def test_a_stale_corpus_is_told_where_rows_are_streamed(
    tiny: Path, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = tmp_path / "made.jsonl"
    made.write_bytes(rows.read_bytes())
    write_origins(made, "convert", {}, [Origin.of_path(rows)], {})
    with rows.open("a") as handle:
        handle.write(json.dumps(ROWS[0]) + "\n")
    trained(tiny, made, tmp_path / "run", max_steps=1)
    assert f"{made} is stale: its source {rows} has changed" in caplog.text
