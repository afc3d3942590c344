"""Runs with other optimizers than AdamW: trained, stopped, and gone on with to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.runs.metrics import read_metrics
from engine.verbs.training.train import train
from tests.support.small_runs import small_run, snapshot

FULL = {"method": "full", "checkpoint_every": 4}


@pytest.mark.parametrize(
    "changes",
    [
        FULL | {"optimizer": "muon", "learning_rate": 1e-3},
        FULL
        | {"optimizer": "adafactor", "optimizer_in_backward": True, "max_grad_norm": 0.0}
        | {"learning_rate": 1e-3},
        {"optimizer": "lion8bit", "learning_rate": 1e-3, "loraplus_lr_ratio": 4.0},
    ],
    ids=["muon", "adafactor", "lion8bit"],
)
def test_a_run_with_another_optimizer_goes_on_to_the_same_bits(
    changes: dict[str, Any], tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data, output = write_rows(9), tmp_path / "run"
    settings = small_run(tiny_model, data, output, **changes)
    result = train(settings, console=False)
    assert result.output_path is not None
    losses = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    first = snapshot(Path(result.output_path))
    (output / "checkpoint-6" / "MANIFEST.json").unlink()
    again = train(settings.model_copy(update={"resume": "auto"}), console=False)
    assert again.output_path is not None
    assert snapshot(Path(again.output_path)) == first
