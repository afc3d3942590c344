"""A checkpoint that an earlier version wrote is gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.train_config import TrainConfig
from engine.storage.manifest import MANIFEST_NAME, write_manifest
from engine.verbs.training.train import train

PRESENT = {earlier_name[1]: earlier_name[0] for earlier_name in TrainConfig.renamed.items()}


def rewrite_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint says of the run, as another version would have written it."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint, 1)


def test_a_checkpoint_with_earlier_names_is_resumed(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = TrainConfig(
        model=str(tiny_model), data=str(write_rows(6)), output_dir=run, max_steps=2, batch_size=2,
        max_length=64, device="cpu", plot=False, checkpoint_every=1, low_memory_decode=True,
    )  # fmt: skip
    train(settings, console=False)
    first = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    checkpoint = run / "checkpoint-1"

    def earlier(state: dict[str, Any]) -> None:
        state["recompute"] = state.pop("checkpointing")
        state["trajectory"] = {PRESENT.get(k, k): v for k, v in state["trajectory"].items()}
        assert "decode_singly" in state["trajectory"]

    rewrite_state(checkpoint, earlier)
    assert json.loads((checkpoint / MANIFEST_NAME).read_text())["engine_version"]
    train(settings.model_copy(update={"resume": str(checkpoint)}), console=False)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == first
    assert json.loads((run / "adapter" / "base.json").read_text())["engine_version"]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_says_if_its_dropout_was_drawn_otherwise(
    dropout: float,
    tiny_model: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    settings = TrainConfig(
        model=str(tiny_model), data=str(write_rows(6)), output_dir=run, max_steps=2, batch_size=2,
        max_length=64, device="cpu", plot=False, checkpoint_every=1, lora_dropout=dropout,
    )  # fmt: skip
    train(settings, console=False)
    first = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    checkpoint = run / "checkpoint-1"
    again = settings.model_copy(update={"resume": str(checkpoint)})
    train(again, console=False)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == first
    assert "dropout" not in caplog.text
    rewrite_state(checkpoint, lambda state: state.pop("dropout"))
    train(again, console=False)
    assert ("drew dropout masks by another generator" in caplog.text) == (dropout > 0.0)
