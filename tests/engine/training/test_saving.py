"""A checkpoint that an earlier version wrote is gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from engine.config.train_config import TrainConfig
from engine.storage.manifest import MANIFEST_NAME, write_manifest
from engine.verbs.train import train

PRESENT = {earlier_name[1]: earlier_name[0] for earlier_name in TrainConfig.renamed.items()}


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
    state = json.loads((checkpoint / "state.json").read_text())
    state["recompute"] = state.pop("checkpointing")
    state["trajectory"] = {PRESENT.get(k, k): v for k, v in state["trajectory"].items()}
    assert "decode_singly" in state["trajectory"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint, 1)
    assert json.loads((checkpoint / MANIFEST_NAME).read_text())["engine_version"]
    train(settings.model_copy(update={"resume": str(checkpoint)}), console=False)
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == first
    assert json.loads((run / "adapter" / "base.json").read_text())["engine_version"]
