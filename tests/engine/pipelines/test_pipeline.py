"""Stages of a pipeline run in order, each once, and say how they ended."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import main as cli
from engine.errors import CheckpointError, ConfigError
from engine.pipelines.recipe import VERBS, Stage, read_recipe
from engine.pipelines.records import StageRecord


def recipe_file(tmp_path: Path, *stages: dict[str, Any]) -> Path:
    file = tmp_path / "pipeline.yaml"
    file.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "stages": list(stages)}))
    return file


def convert(rows: Path, name: str = "rows", target: str = "${out}/rows.jsonl") -> dict[str, Any]:
    return {"name": name, "run": "data convert", "with": {"data": str(rows), "output": target}}


def events(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str | None]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["event"], line.get("stage")) for line in lines]


def test_data_training_and_gates_run_once_and_a_failed_gate_ends_with_its_status(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    gates = tmp_path / "gates.yaml"
    gates.write_text("{checker: regex, pattern: '^', coverage: none, max_new_tokens: 2}")
    train = {"model": str(tiny_model), "data": "${out}/rows.jsonl", "output_dir": "${out}/run",
             "max_steps": 2, "method": "lora", "device": "cpu", "plot": False}  # fmt: skip
    judge = {"model": str(tiny_model), "adapter": "${out}/run/adapter", "device": "cpu",
             "data": "${out}/rows.jsonl", "gates": str(gates), "strict": True,
             "output_dir": "${out}/eval"}  # fmt: skip
    file = recipe_file(
        tmp_path,
        convert(write_rows(4)),
        {"run": "train", "with": train},
        {"name": "gates", "run": "engine eval", "with": judge},
    )
    out = tmp_path / "out"
    assert cli.main(["pipeline", str(file), "--events", "jsonl"]) == 0
    each = [("stage_begins", "x"), ("stage_ends", "x")]
    assert events(capsys) == [
        ("pipeline_begins", None),
        *[(kind, stage) for stage in ("rows", "train", "gates") for kind, _ in each],
        ("pipeline_ends", None),
    ]
    for stage in ("rows", "train", "gates"):
        facts = json.loads((out / "stages" / stage / "summary.json").read_text())
        assert (facts["status"], facts["exit_status"]) == ("Success", 0)
    assert (out / "run" / "adapter").is_dir()
    before = (out / "run" / "summary.json").stat().st_mtime_ns

    assert cli.main(["pipeline", str(file)]) == 0
    assert capsys.readouterr().out.count("done before") == 3
    assert (out / "run" / "summary.json").stat().st_mtime_ns == before

    gates.write_text("{checker: json, coverage: none, max_new_tokens: 2}")
    assert cli.main(["pipeline", str(file), "--again", "gates"]) == 3
    facts = json.loads((out / "stages" / "gates" / "summary.json").read_text())
    assert (facts["status"], facts["exit_status"]) == ("Failure", 3)
    assert (out / "eval" / "eval_gate_failed.json").exists()
    assert json.loads((out / "summary.json").read_text())["status"] == "Failure"


def test_a_stage_whose_settings_changed_is_done_anew_with_those_after_it(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, more = write_rows(2), write_rows(3, "more.jsonl")
    last = {"name": "last", "run": "data convert",
            "with": {"data": "${out}/rows.jsonl", "output": "${out}/last.jsonl"}}  # fmt: skip
    assert cli.main(["pipeline", str(recipe_file(tmp_path, convert(rows), last))]) == 0
    assert cli.main(["pipeline", str(recipe_file(tmp_path, convert(more), last))]) == 0
    out = tmp_path / "out"
    assert len((out / "last.jsonl").read_text().splitlines()) == 3
    assert not (out / "stages" / "rows" / "replaced").exists()
    capsys.readouterr()


def test_a_stage_that_is_killed_ends_with_the_status_that_shells_give(
    write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    assert cli.main(["pipeline", str(recipe_file(tmp_path, convert(write_rows(2))))]) == 137
    summary = json.loads((tmp_path / "out" / "stages" / "rows" / "summary.json").read_text())
    assert summary["exit_status"] == 137
    assert summary["error_message"] == "was ended by signal 9 (Killed)"
    capsys.readouterr()


@pytest.mark.parametrize("name", ["rows.jsonl", "out/rows.jsonl"])
def test_a_file_that_changed_since_its_stage_was_done_is_named(
    name: str, write_rows: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    command = ["pipeline", str(recipe_file(tmp_path, convert(write_rows(3))))]
    assert cli.main(command) == 0
    assert cli.main(command) == 0
    assert "changed since" not in caplog.text
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    (tmp_path / name).write_text("".join(lines[:-1]))
    assert cli.main(command) == 0
    assert f"stage rows is done, and {tmp_path / name} changed since" in caplog.text
    caplog.clear()
    assert cli.main([*command, "--again", "rows"]) == 0
    assert cli.main(command) == 0
    assert "changed since" not in caplog.text
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == (
        2 if name == "rows.jsonl" else 3
    )
    capsys.readouterr()


def test_a_failed_stage_says_why_and_keeps_what_stood_before_it(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(2)
    assert cli.main(["pipeline", str(recipe_file(tmp_path, convert(rows)))]) == 0
    bad = recipe_file(tmp_path, convert(tmp_path / "absent.jsonl"))
    assert cli.main(["pipeline", str(bad)]) == 2
    folder = tmp_path / "out" / "stages" / "rows"
    assert "absent.jsonl" in json.loads((folder / "summary.json").read_text())["error_message"]
    assert len((folder / "replaced" / "0" / "rows.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()


class Killed(BaseException):
    """Ends a start where a kill would."""


@pytest.mark.parametrize("across", [False, True])
def test_nothing_that_is_set_aside_is_lost_wherever_a_kill_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across: bool
) -> None:
    def begin(folder: Path, kill_at: int) -> bool:
        """Begin a finished stage anew, killed before one of its renames; whether it was."""
        outputs = {"output": folder / "rows.jsonl", "report": folder / "report.json"}
        record = StageRecord(
            folder, Stage("s", "data split", {k: str(p) for k, p in outputs.items()})
        )
        if not record.folder.exists():
            record.begin()
            for path in outputs.values():
                path.write_text(path.name)
            record.end(0, 1.0, None)
        real, seen = Path.rename, [0]

        def rename(path: Path, target: Path) -> Path:
            seen[0] += 1
            if seen[0] == kill_at:
                raise Killed
            if across and path.parent == folder:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return real(path, target)

        monkeypatch.setattr(Path, "replace", rename)
        try:
            record.begin()
        except Killed:
            return True
        finally:
            monkeypatch.setattr(Path, "replace", real)
        return False

    kills = 0
    for at in range(1, 20):
        folder = tmp_path / str(at)
        folder.mkdir()
        killed = begin(folder, at)
        kills += killed
        for name in ("rows.jsonl", "report.json"):
            assert name in {path.read_text() for path in folder.rglob(name)}
        assert not begin(folder, 0)
        replaced = folder / "stages" / "s" / "replaced"
        left = sorted(str(p.relative_to(replaced)) for p in replaced.rglob("*.json*"))
        assert left == ["0/rows.jsonl", "1/report.json"] and not list(folder.glob("*.json*"))
        assert not (replaced.parent / "moving").exists()
    assert kills >= 3


def test_what_was_set_aside_goes_where_a_kill_kept_it_past_the_stages_end(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    file = recipe_file(tmp_path, convert(write_rows(2)))
    assert cli.main(["pipeline", str(file)]) == 0
    replaced = tmp_path / "out" / "stages" / "rows" / "replaced"
    replaced.mkdir()
    assert cli.main(["pipeline", str(file)]) == 0
    assert not replaced.exists()


def test_what_an_unfinished_stage_left_is_removed_and_what_was_there_before_is_not(
    tmp_path: Path,
) -> None:
    mine, theirs = tmp_path / "mine.jsonl", tmp_path / "theirs.jsonl"
    theirs.write_text("rows")
    stage = Stage("s", "data split", {"output": str(mine), "report": str(theirs)})
    record = StageRecord(tmp_path / "out", stage)
    record.begin()
    mine.write_text("half")
    assert record.begin() == ()
    assert not mine.exists()
    assert theirs.read_text() == "rows"
    train = StageRecord(tmp_path / "out", Stage("t", "train", {"output_dir": str(mine)}))
    assert train.begin() == ()
    mine.mkdir()
    assert train.begin() == ("--resume", "auto")
    asked = Stage("t", "train", {"output_dir": str(mine), "resume": "none"})
    assert StageRecord(tmp_path / "out", asked).begin() == ()


@pytest.mark.parametrize("text", ["5", "{}", '{"absent": 5}', '{"absent": [[]]}', "[" * 9999])
def test_a_note_of_what_stood_before_that_is_damaged_is_named(text: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    record = StageRecord(tmp_path, Stage("s", "data split", {"output": str(mine)}))
    record.begin()
    mine.write_text("half")
    (record.folder / "begun.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"what the stage s may replace.*delete .*begun.json"):
        record.begin()
    assert mine.exists()


def test_what_somebody_put_where_a_failed_stage_would_write_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    record = StageRecord(tmp_path / "out", Stage("s", "data convert", {"output": str(target)}))
    record.begin()
    record.end(2, 1.0, "there are no rows")
    target.write_text("mine")
    record.begin()
    assert target.read_text() == "mine"


def test_files_of_the_same_names_elsewhere_are_no_outputs_of_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    record = StageRecord(tmp_path / "out", Stage("s", "data convert", {"output": "rows.jsonl"}))
    monkeypatch.chdir(tmp_path / "first")
    record.begin()
    Path("rows.jsonl").write_text("rows")
    record.end(0, 1.0, None)
    assert record.is_done()
    monkeypatch.chdir(tmp_path / "second")
    Path("rows.jsonl").write_text("mine")
    assert not record.is_done()
    record.begin()
    record.end(2, 1.0, "rows.jsonl exists already")
    assert Path("rows.jsonl").read_text() == "mine"
    assert (tmp_path / "first" / "rows.jsonl").read_text() == "rows"


@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)]
)
def test_an_interrupted_pipeline_goes_on_where_it_was(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path,
    number: signal.Signals, send: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Told to the group as a terminal does it, or to the pipeline alone, whose stage saves too."""
    rows = write_rows(4)
    train = {"model": str(tiny_model), "data": "${out}/rows.jsonl", "output_dir": "${out}/run",
             "max_steps": 60, "method": "lora", "device": "cpu", "plot": False,
             "checkpoint_every": 1, "lr_schedule": "constant"}  # fmt: skip
    file = recipe_file(tmp_path, convert(rows), {"run": "train", "with": train})
    command = [sys.executable, "-m", "engine", "pipeline", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    run, end = tmp_path / "out" / "run", time.monotonic() + 120
    while not list(run.glob("checkpoint-*")) and time.monotonic() < end:
        time.sleep(0.05)
    send(process.pid, number)
    assert process.wait(120) == 128 + number
    assert json.loads((run / "summary.json").read_text())["stopped"]["signal"] == number.name
    assert cli.main(["pipeline", str(file)]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"stages": []}, "is to be a list"),
        ({"stages": [{"run": "serve"}]}, "no verb that a pipeline runs"),
        ({"stages": [{"run": "trian"}]}, "Did you mean 'train'"),
        ({"stages": [{"name": "../x", "run": "train"}]}, "is named"),
        ({"stages": [{"run": "train"}, {"run": "train"}]}, "two stages"),
        ({"stages": [{"run": "train", "model": "m"}]}, "stand under `with`"),
        ({"stages": [{"run": "train", "with": [1]}]}, "is to be a mapping"),
        ({"steps": []}, "there is also steps"),
        (
            {"stages": [{"run": "train", "with": {"model": "${base}"}}]},
            "variable; known: out",
        ),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named(
    tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        read_recipe(file)


def test_names_within_settings_are_texts_whatever_yaml_makes_of_them(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    inner = "{1: 0.5, b: 2, !!timestamp 2020-01-01: 1, ? !!binary aGk= : 1}"
    file.write_text(f"stages:\n- {{run: eval, with: {{gates: {inner}, data: [{inner}]}}}}\n")
    (stage,) = read_recipe(file).stages
    assert all(isinstance(key, str) for key in stage.settings["gates"])
    assert len(stage.identity) == 64


def test_variables_are_filled_in_and_may_be_given_anew(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    stage = {"run": "train", "with": {"model": "${base}", "data": ["${out}/a", "$b", "${base}x"]}}
    file.write_text(json.dumps({"variables": {"base": "m"}, "stages": [stage]}))
    settings = read_recipe(file, tmp_path).stages[0].settings
    assert settings == {"model": "m", "data": [f"{tmp_path}/a", "$b", "mx"]}
    assert read_recipe(file, tmp_path, ["base=other=1"]).stages[0].settings["model"] == "other=1"
    with pytest.raises(ConfigError, match="one of: base"):
        read_recipe(file, tmp_path, ["bass=x"])


def test_every_verb_of_a_stage_is_one_of_the_command_line() -> None:
    from cli.main import VERBS as KNOWN

    assert {verb.split()[0] for verb in VERBS} <= set(KNOWN)
