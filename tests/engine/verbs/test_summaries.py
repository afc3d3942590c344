"""Every verb that writes a model says what it did, and `engine status` reads it."""

import contextlib
import importlib.util
import json
import shlex
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import main as cli
from engine.errors import ConfigError, EngineError
from engine.verbs.models.forge import forge
from engine.verbs.models.merge import merge
from engine.verbs.models.prune import prune
from engine.verbs.training.status import describe_status, find_run, read_status
from engine.verbs.training.train import train
from tests.support.small_runs import small_run, snapshot

Rows = Callable[..., Path]


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def shown(folder: Path) -> str:
    return "\n".join(describe_status(read_status(find_run(str(folder), folder.parent))))


def test_a_merged_model_says_how_it_was_made(ended: Path, tiny_model: Path) -> None:
    output = ended.parent / "merged"
    merge(tiny_model, ended / "adapter", output)
    answer = summary(output)
    assert (answer["verb"], answer["status"]) == ("merge", "Success")
    assert answer["output_path"] == str(output)
    assert answer["metrics"]["merged"] == 14
    assert "merge" in shown(output)
    assert "finished" in shown(output)


def test_a_pruned_model_says_how_it_was_made(tiny_model: Path, tmp_path: Path) -> None:
    prune(tiny_model, tmp_path / "pruned", fraction=0.25)
    answer = summary(tmp_path / "pruned")
    assert (answer["verb"], answer["status"]) == ("prune", "Success")
    assert answer["metrics"]["heads"]["removed"] == 2
    assert "removed 2" in shown(tmp_path / "pruned")
    (tmp_path / "pruned" / "summary.json").unlink()  # as earlier versions wrote it
    assert read_status(tmp_path / "pruned")["state"] == "finished"


def job(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "fraction": 0.25,
        "metric": "l2",
        "max_steps": 1,
        "batch_size": 2,
        "max_length": 64,
        "device": "cpu",
        "samples": 0,
        "plot": False,
    }
    given = {"model": str(model), "data": str(rows), "output_dir": output}
    return plain | given | changes


def test_a_job_of_forge_has_a_summary_and_a_status(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    forge(**job(tiny_model, write_rows(9), tmp_path / "job"))
    answer = summary(tmp_path / "job")
    assert (answer["verb"], answer["status"]) == ("forge", "Success")
    assert len(answer["metrics"]["perplexities_trained"]) == 1
    text = shown(tmp_path / "job")
    assert "cycle-1-train" in text
    assert "finished" in text


def test_a_job_that_fails_says_why(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConfigError("the cutter is blunt")

    monkeypatch.setattr("engine.verbs.models.forge.prune", fail)
    with pytest.raises(ConfigError):
        forge(**job(tiny_model, write_rows(9), tmp_path / "job"))
    assert summary(tmp_path / "job")["status"] == "Failure"
    assert "the cutter is blunt" in shown(tmp_path / "job")
    assert read_status(tmp_path / "job")["state"] == "failed"


WRONG: dict[str, dict[str, Any]] = {
    "model": {"model": "nope"},
    "data": {"data": "nope.jsonl"},
    "held-out rows": {"eval_data": "nope.jsonl"},
    "target": {"target_modules": "v_prj"},
    "policy": {"gradient_checkpointing": "full:99"},
    "domain": {"data": (), "domain": "nope"},
    "tracker": {"report_to": "wandb"},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_job_that_is_refused_leaves_nothing(
    name: str, tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether this environment has wandb is not what is tried.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError):
        forge(**(job(tiny_model, write_rows(9), tmp_path / "job") | WRONG[name]))
    assert not (tmp_path / "job").exists()


def test_a_job_never_writes_over_rows_of_others(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    rows = write_rows(9).rename(tmp_path / "data" / "train.jsonl")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="stands where the job would write"):
        forge(**job(tiny_model, rows, tmp_path))
    other = write_rows(8, "other.jsonl")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="stands where the job would write"):
        forge(**job(tiny_model, other, tmp_path))
    assert snapshot(tmp_path) == before


def test_refused_outputs_of_merge_and_prune_stay_as_they_are(ended: Path, tiny_model: Path) -> None:
    output = ended.parent / "output"
    output.mkdir()
    (output / "mine").write_text("precious")
    for attempt in (
        lambda: merge(tiny_model, ended / "adapter", output),
        lambda: prune(tiny_model, output, fraction=0.25),
    ):
        with pytest.raises(ConfigError, match="not an empty folder"):
            attempt()
    assert list(output.iterdir()) == [output / "mine"]
    left = [path.name for path in ended.parent.iterdir() if path.name.startswith(".tmp")]
    assert left == []


def test_what_a_killed_merge_left_is_cleared_by_the_next(ended: Path, tiny_model: Path) -> None:
    leftover = ended.parent / ".tmp-merged-999999999-0123abcd"
    leftover.mkdir()
    (leftover / "model.safetensors").write_text("half")
    merge(tiny_model, ended / "adapter", ended.parent / "merged")
    assert not leftover.exists()


def test_the_settings_of_a_training_make_a_job(
    ended: Path, tiny_model: Path, write_rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    """`heldout: 0` and `resume: null` of a training's file are not those of the job."""
    file = ended.parent / "train.yaml"
    text = (ended / "config.yaml").read_text() + "resume: auto\nheldout: 0\n"
    own = ("output_dir", "heldout: 0.0")
    lines = [line for line in text.splitlines() if not line.startswith(own)]
    file.write_text("\n".join(lines) + "\n")
    output = ended.parent / "job"
    words = ["--output-dir", str(output), "--fraction", "0.25", "--metric", "l2"]
    words += ["--max-steps", "1"]
    assert cli.main(["forge", str(file), *words, "--samples", "0"]) == 0, capsys.readouterr().err
    assert summary(output)["parameters"]["heldout"] == 0.1
    assert summary(output)["parameters"]["training"]["max_steps"] == 1


def test_next_commands_are_there_and_work(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(12)
    settings = small_run(
        tiny_model, rows, tmp_path / "a run", heldout=0.25, system_prompt="Be brief.", max_steps=2
    )
    result = train(settings, console=False)
    assert [line.split()[1] for line in result.next] == ["eval", "generate", "merge"]
    for line in result.next:
        assert cli.main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    capsys.readouterr()
    repeat = summary(tmp_path / "a run")["repeat_heldout"]
    assert cli.main([*shlex.split(repeat)[1:], "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == result.metrics["heldout_loss"]
    assert figures["perplexity"] == result.metrics["heldout_perplexity"]


@pytest.mark.parametrize("heldout", [0.0, 0.25])
def test_next_commands_read_a_database_as_the_run_did(
    heldout: float, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db")) as database:
        database.execute("create table tickets (q text, a text, good int)")
        rows = [(f"Word {n}?", f"{'abc' * (n % 3 + 1)}{n}.", n % 3) for n in range(18)]
        database.executemany("insert into tickets values (?, ?, ?)", rows)
        database.commit()
    settings = small_run(
        tiny_model,
        f"sqlite:///{tmp_path / 'app.db'}",
        tmp_path / "run",
        query="select q, a from tickets where good > 0",
        map="prompt=q,response=a",
        bad_lines="skip",
        train_on="last",
        heldout=heldout,
        max_steps=2,
    )
    result = train(settings, console=False)
    evaluated = result.next[0]
    assert cli.main([*shlex.split(evaluated)[1:], "--json"]) == 0, capsys.readouterr().err
    figures = json.loads(capsys.readouterr().out)
    assert figures["rows"] == (3 if heldout else 12)
    if heldout:
        assert figures["loss"] == result.metrics["heldout_loss"]
