"""Every source in examples/sources trains, and databases to the same bytes as their file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import main
from engine.config.sources import load_config
from engine.config.train_config import TrainConfig
from examples import rows_from_python
from tests.support.small_runs import quick_words
from tests.support.source_files import (
    Rows,
    lines,
    question_rows,
    table,
    write_parquet,
    write_sqlite,
)
from tests.support.tiny_model import write_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "sources"
FILES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
ROWS = question_rows(12)


def write_texts(path: Path, rows: Rows) -> None:
    path.mkdir()
    for number, row in enumerate(rows):
        (path / f"{number}.md").write_text(f"# {row['question']}\n\n{row['answer']}\n")


def write_tickets(path: Path, rows: Rows) -> None:
    renamed = [{"subject": row["question"], "reply": row["answer"]} for row in rows]
    path.write_bytes(table(renamed, ","))


def write_base(path: Path, rows: Rows) -> None:
    import sqlite3

    write_sqlite(path, rows)
    with sqlite3.connect(path) as base:
        base.execute("alter table asked rename to tickets")
        base.execute("alter table tickets add column rating integer default 5")
    base.close()


NEEDED: dict[str, dict[str, Callable[[Path, Rows], object]]] = {
    "jsonl.yaml": {"rows.jsonl": lambda path, rows: path.write_bytes(lines(rows))},
    "csv.yaml": {"tickets.csv": write_tickets},
    "parquet.yaml": {"train-0.parquet": write_parquet, "train-1.parquet": write_parquet},
    "text.yaml": {"texts": write_texts},
    "sqlite.yaml": {"app.db": write_base},
    "several.yaml": {
        "general.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
        "ours.jsonl": lambda path, rows: path.write_bytes(lines(rows[:3])),
    },
}
ELSEWHERE = {
    "hub.yaml": "tests/engine/data/sources/test_formats.py reads a cache of the hub",
    "standard_input.yaml": "test_rows_come_through_a_pipe",
    "postgres.yaml": "tests/examples/test_postgres.py, where Debian's `postgresql` is installed",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def test_every_example_is_run_by_a_test() -> None:
    assert {*NEEDED, *ELSEWHERE} == set(FILES)
    for file in FILES:
        assert isinstance(load_config(EXAMPLES / file), TrainConfig)


@pytest.mark.parametrize("file", NEEDED)
def test_an_example_trains(file: str, tiny: Path, work: Path) -> None:
    for name, write in NEEDED[file].items():
        write(work / "data" / name, ROWS)
    output = work / "run"
    assert main(["train", "--config", str(EXAMPLES / file), *quick_words(tiny, output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    rows = {"parquet.yaml": 24, "several.yaml": 15}.get(file, 12)
    assert summary["metrics"]["rows_read"] == rows
    if file == "several.yaml":
        assert summary["metrics"]["rows_trained"] == 6 + 6


def test_rows_come_through_a_pipe(tiny: Path, work: Path) -> None:
    file = EXAMPLES / "standard_input.yaml"
    words = ["train", "--config", str(file), *quick_words(tiny, work / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words],
        input=lines(ROWS),
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1])},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    summary = json.loads((work / "run" / "summary.json").read_text())
    assert summary["metrics"]["rows_read"] == 12


def test_rows_from_python_train(tiny: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_from_python.main(["--model", str(tiny), "--output", str(work / "run"), "--steps", "2"])
    assert "200 rows" in capsys.readouterr().out
