"""A run that has ended."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.verbs.train import train
from tests.support.small_runs import small_run


@pytest.fixture
def ended(tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path) -> Path:
    """The directory of a run of 6 steps; beside it `other.jsonl`, whose rows are of no kind."""
    train(small_run(tiny_model, write_rows(9), tmp_path / "run"), console=False)
    (tmp_path / "other.jsonl").write_text('{"left": 1}\n')
    return tmp_path / "run"
