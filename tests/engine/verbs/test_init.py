"""A proposed configuration fits the machine, the rows, and is read by `engine train`."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import main as cli
from engine.config.sources import load_config
from engine.config.tasks.workflow import InitSettings
from engine.errors import DataError, MemoryPlanError
from engine.verbs.training.init import propose
from engine.verbs.training.plan import find_target
from engine.verbs.training.train import dry_run
from tests.support.source_tree import ROOT

GIB = 2**30


def rows_of(folder: Path, *lengths: int) -> tuple[str, ...]:
    """A file with a row for each number of words in its answer."""
    file = folder / "rows.jsonl"
    rows = ({"prompt": f"Q{i}?", "response": "word " * n} for i, n in enumerate(lengths))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (str(file),)


@pytest.mark.parametrize(("memory", "words"), [(2, 1500), (12, 40)])
def test_a_proposal_fits_the_gpu(tmp_path: Path, memory: int, words: int) -> None:
    settings = InitSettings(
        model="smollm2-135m", data=rows_of(tmp_path, *[words] * 100), memory=memory * GIB
    )
    proposal = propose(settings)
    file = tmp_path / "train.yaml"
    file.write_text(proposal.text(file))
    config = load_config(file)
    assert find_target(config).plan(config).total <= memory * GIB
    assert config.batch_size * config.accumulate == 12
    assert config.max_length >= words
    assert config.max_length % 64 == 0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    data = rows_of(tmp_path, 10, 20)
    with pytest.raises(MemoryPlanError):
        propose(InitSettings(model="smollm2-135m", data=data, memory=GIB // 8))
    with pytest.raises(DataError, match="no such data file"):
        propose(InitSettings(model="smollm2-135m", data=("nowhere.jsonl",)))


def test_rows_are_counted_by_the_model_s_tokenizer(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    settings = InitSettings(
        model=str(tiny_model), data=(str(write_rows(80)),), output_dir=tmp_path / "run"
    )
    proposal = propose(settings)
    file = tmp_path / "train.yaml"
    file.write_text(proposal.text(file))
    config = load_config(file)
    assert config.max_length == 64
    assert config.heldout == 0.1
    assert f"{proposal.steps} steps of" in dry_run(config)
    assert "as far as their characters tell" not in file.read_text()


def test_a_few_very_long_rows_do_not_set_the_length(tmp_path: Path) -> None:
    data = rows_of(tmp_path, *[40] * 400, 6000)
    proposal = propose(InitSettings(model="smollm2-135m", data=data, memory=24 * GIB))
    assert proposal.config.max_length < 500
    assert "1 are cut" in proposal.reasons["max_length"]


def test_the_command_writes_once_and_names_what_comes_next(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "new.yaml"
    words = ["init", "--model", str(tiny_model), "--data", str(write_rows(20))]
    assert cli.main([*words, "--output", str(target)]) == 0
    out = capsys.readouterr().out
    assert f"engine train --config {target} --dry-run" in out
    before = target.read_bytes()
    assert cli.main([*words, "--output", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert cli.main(["init"]) == 2
    assert "`model` is missing (--model: " in capsys.readouterr().err


def test_a_terminal_is_asked(tiny_model: Path, write_rows: Callable[..., Path]) -> None:
    rows = write_rows(20)
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "init"], cwd=rows.parent, stdin=terminal,
        stdout=terminal, stderr=terminal, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.write(master, f"{tiny_model}\n{rows}\n\n".encode())
    os.close(terminal)
    said = b""
    while chunk := _read(master):
        said += chunk
    assert process.wait(60) == 0, said.decode()
    assert b"Model (a Hugging Face directory" in said
    assert load_config(rows.parent / "train.yaml").model == str(tiny_model)


def _read(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # what a terminal says when nobody has its other end any more
        return b""
