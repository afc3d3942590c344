"""`engine forge` on the command line: what it refuses, in one paragraph."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli import main as cli


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "one of them"),
        (["--data", "rows.jsonl", "--domain", "docstrings"], "one of them"),
        (["--data", "rows.jsonl", "max_step=3"], "max_steps"),
        (["--data", "rows.jsonl", "three"], "neither a configuration file"),
        (["--data", "rows.jsonl", "--protect", "first"], "no list of layer numbers"),
        (["--data", "rows.jsonl", "--cycles", "0"], "--cycles"),
        (["--data", "rows.jsonl"], "no such data file"),
        (["--domain", "docstrings"], "no-such-model"),
    ],
)
def test_what_cannot_be_forged_is_refused_in_one_paragraph(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--model", str(tmp_path / "no-such-model"), "--output-dir", str(tmp_path / "job")]
    assert cli.main(["forge", *paths, "--fraction", "0.1", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error.replace("\n", " ")
    assert "\n\n" not in error
    assert not (tmp_path / "job").exists()
