"""Secrets reach neither what a run writes nor what a command prints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cli.main import main
from tests.support.small_runs import quick_words

CANARY = "canary-4f1d9b"
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_KEY",
    "ENGINE_API_KEY", "DB_PASSWORD", "SSH_AUTH_SOCK", "MY_SECRET",
)  # fmt: skip
URL = f"postgresql://me:{CANARY}-url@127.0.0.1:9/rows?sslmode=disable&token={CANARY}-query"


def with_canary(folder: Path) -> list[str]:
    """Files that hold the canary."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def test_no_secret_reaches_a_log_a_record_a_tracker_or_the_terminal(
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    words, rows = quick_words(tiny_model, Path("run")), str(write_rows(4))
    assert main(["train", *words, "--data", rows, "--report-to", "tensorboard"]) == 0
    assert (work / "run" / "tensorboard").exists()
    for number, data in enumerate((URL, "postgresql://me:${MY_SECRET}@127.0.0.1:9/rows")):
        # Without a query, then with one: refused by the settings, and by the database.
        for more in ((), ("--query", "select * from rows")):
            refused = quick_words(tiny_model, Path(f"run-{number}-{len(more)}"))
            assert main(["train", *refused, "--data", data, *more]) == 2
    told = "".join(capfd.readouterr())
    assert "engine:" in told
    assert CANARY not in told
    assert with_canary(work) == []


def test_the_search_for_the_canary_finds_one(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "log").write_text(f"x {CANARY} y")
    assert with_canary(tmp_path) == ["deep/log"]
