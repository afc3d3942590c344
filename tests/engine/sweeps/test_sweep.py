"""A sweep runs its trials once each, goes on after a stop, and ends with a table and a picture."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import engine
from engine.config.sources import load_config
from engine.errors import ConfigError
from engine.pipelines.recipe import Stage
from engine.verbs.training.status import read_status
from tests.support.small_runs import adapter_bytes

ROOT = Path(__file__).parents[3]


@pytest.fixture
def write(tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``write(parameters)`` writes a sweep of runs of some steps."""

    def make(parameters: dict[str, Any], **settings: Any) -> Path:
        plain = {
            "model": str(tiny_model),
            "data": str(write_rows(9)),
            "heldout": 0.3,
            "max_steps": 2,
            "batch_size": 2,
            "max_length": 96,
            "device": "cpu",
            "plot": False,
        }
        content = {
            "output_dir": str(tmp_path / "sweep"),
            "with": plain | settings,
            "parameters": parameters,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in this process: the test of a killed sweep has real ones."""

    def run(
        stage: Stage, options: Sequence[str], folder: Path, quiet: bool
    ) -> tuple[int, str | None]:
        assert not options
        try:
            engine.train(console=False, **stage.settings)
        except engine.EngineError as error:
            return 2, str(error)
        return 0, None

    monkeypatch.setattr("engine.verbs.training.sweep.run_stage", run)


@pytest.mark.usefixtures("in_process")
def test_trials_are_run_once_ranked_and_told(write: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told: list[tuple[str, str]] = []
    rates = {"learning_rate": [1e-4, 2e-2]}
    result = engine.sweep(write(rates), lambda trial, what: told.append((trial.name, what)))
    folder = tmp_path / "sweep"
    assert result.status == 0
    assert result.best is not None and result.best.trial.name == "trial-002"
    values = [one.value for one in result.trials if one.value is not None]
    assert len(values) == 2 and values[0] < values[1]
    summary = json.loads((folder / "trial-002" / "summary.json").read_text())
    assert result.best.value == summary["metrics"]["heldout_loss"]
    record = json.loads((folder / "sweep.json").read_text())
    assert [one["trial"] for one in record["trials"]] == ["trial-002", "trial-001"]
    assert record["trials"][0]["parameters"] == {"learning_rate": 2e-2}
    lines = (folder / "sweep.md").read_text().splitlines()
    assert lines[2].startswith("| trial-002 | 0.02 |")
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert read_status(folder)["state"] == "finished"
    # What is done is not done again; a further value is another trial.
    before = adapter_bytes(folder / "trial-001")
    told.clear()
    again = engine.sweep(
        write({"learning_rate": [1e-4, 2e-2, 1e-3]}),
        lambda trial, what: told.append((trial.name, what)),
    )
    assert [what for name, what in told if name != "trial-003"] == ["done before"] * 2
    assert len(again.trials) == 3
    assert adapter_bytes(folder / "trial-001") == before
    with pytest.raises(ConfigError, match="holds another sweep: its trial-001"):
        engine.sweep(write({"learning_rate": [3e-4]}))


@pytest.mark.usefixtures("in_process")
def test_a_trial_without_its_summary_is_done_again_and_changed_rows_are_told(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write({"learning_rate": [1e-4, 2e-4]}, max_steps=1)
    first = engine.sweep(path)
    assert "read other inputs" not in caplog.text
    (tmp_path / "sweep" / "trial-001" / "summary.json").write_text('{"status": "Succ')
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("abc", "xyz", 1))
    again = engine.sweep(path)
    assert {one.trial.name for one in again.trials if one.value is not None} == {
        one.trial.name for one in first.trials
    }
    assert "trial-002 read other inputs than trial-001 (data changed" in caplog.text or (
        "trial-001 read other inputs than trial-002 (data changed" in caplog.text
    )


@pytest.mark.usefixtures("in_process")
def test_a_trial_that_fails_stands_last_and_stops_no_other(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    broken = str(tmp_path / "nothing.jsonl")
    rows = str(tmp_path / "rows.jsonl")
    result = engine.sweep(write({"data": [broken, rows]}, max_steps=1))
    assert result.status == 0
    first, last = result.trials
    assert (first.trial.name, first.status) == ("trial-002", "Success")
    assert last.value is None and last.status == "Failure"
    assert "nothing.jsonl" in (last.error or "")
    none = engine.sweep(write({"data": [broken]}), output_dir=str(tmp_path / "other"))
    assert (none.status, none.best) == (2, None)  # as its trial: somebody can put that right
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert summary["error_message"] == "No trial succeeded."


def test_a_sweep_that_was_killed_goes_on_with_the_run_it_was_in(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed with its trial after a checkpoint; the end is that of a sweep left alone."""
    path = write({"lora_rank": [4]}, max_steps=20, checkpoint_every=1, lora_dropout=0.1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", "sweep", str(path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    trial = tmp_path / "sweep" / "trial-001"
    while not list(trial.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (trial / "summary.json").exists()
    assert engine.sweep(path).status == 0
    starts = json.loads((trial / "manifest.json").read_text())["starts"]
    assert [start["resume"] for start in starts] == [None, "auto"]
    settings = load_config(trial / "config.yaml").model_copy(update={"output_dir": tmp_path / "a"})
    whole = engine.train(settings, console=False)
    assert adapter_bytes(trial) == adapter_bytes(whole.run_directory)


def test_a_dry_run_lists_the_trials_and_writes_nothing(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli.main import main

    path = write({"learning_rate": [1e-4, 2e-4], "lora_rank": [4, 8]})
    assert main(["sweep", str(path), "--dry-run"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["trial-001", "0.0001", "4"],
        ["trial-002", "0.0001", "8"],
        ["trial-003", "0.0002", "4"],
        ["trial-004", "0.0002", "8"],
    ]
    assert not (tmp_path / "sweep").exists()


def test_the_example_can_be_run() -> None:
    result = engine.sweep(ROOT / "examples" / "sweep" / "learning_rate.yaml", dry_run=True)
    assert len(result.trials) == 6
