"""Save a run: checkpoints, and in the end the adapter or model."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config.settings import with_present_names
from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.export import export_hf_directory
from engine.model_sources.from_model import TrainedSource
from engine.model_sources.interface.model_source import ModelSource
from engine.provenance import version
from engine.runs.checkpoints import CheckpointStore, LoadedCheckpoint
from engine.storage import durable
from engine.training.loop import Progress, new_progress
from engine.training.trainable import BASE_FILE, adapter_config
from models.adapters import PARTS, adapter_tensors
from models.decoder import Decoder
from optim import AdamW8bit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """The part of a run that a checkpoint holds: weights, optimizer, and which run it is.

    `digest` is that of the base model.
    """

    config: TrainConfig
    model: Decoder
    optimizer: AdamW8bit
    digest: str

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: the adapter's tensors, or every weight."""
        if self.config.method == "full":
            return dict(self.model.named_parameters())
        return {
            f"{path}.{part}": tensor
            for path, tensors in adapter_tensors(self.model).items()
            for part, tensor in zip(PARTS, tensors, strict=False)
        }

    def save(self, checkpoints: CheckpointStore, progress: Progress, policy: str) -> None:
        """Write a checkpoint of the run as it stands, with its checkpointing policy."""
        checkpoints.save(
            progress.step,
            {
                "weights": {k: v.detach().cpu() for k, v in self.weights().items()},
                "optimizer": {k: v.cpu() for k, v in self.optimizer.state_tensors().items()},
            },
            {
                "progress": progress.state(),
                "trajectory": self.config.trajectory(),
                "checkpointing": policy,
                "base": self.digest,
            },
        )

    def resume(self, checkpoints: CheckpointStore) -> tuple[Progress, str | None]:
        """Where the run goes on, its weights and optimizer restored, as `--resume` asks for.

        With it the checkpointing policy of the checkpoint; None for a fresh start.

        Raises `CheckpointError` for a checkpoint of another run.
        """
        loaded = checkpoints.resume(self.config.resume)
        if loaded is None:
            return new_progress(self.model), None
        self._require_same_run(loaded)
        saved = loaded.tensors("weights")
        own = self.weights()
        if saved.keys() != own.keys():
            raise CheckpointError(f"{loaded.path} holds other weights than this run trains.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self.optimizer.load_state_tensors(loaded.tensors("optimizer"))
        state = loaded.state
        log.info("Going on from %s", loaded.path)
        # Earlier versions wrote the policy under "recompute".
        return Progress(**state["progress"]), state.get("checkpointing") or state["recompute"]

    def _require_same_run(self, loaded: LoadedCheckpoint) -> None:
        state = with_present_names(loaded.state, TrainConfig.renamed)
        for key, mine in (("trajectory", self.config.trajectory()), ("base", self.digest)):
            if state.get(key) != mine:
                raise CheckpointError(
                    f"{loaded.path} belongs to another run: {_difference(state.get(key), mine)}. "
                    "Go on with the settings and model it was started with, or start a new run "
                    "in another --output-dir."
                )

    def write_output(self, source: ModelSource, directory: Path) -> Path:
        """The adapter with PEFT's names, or after full fine-tuning the whole model."""
        if self.config.method == "full":
            target = directory / "model"
            if target.exists():  # of a run that had ended and was resumed
                shutil.rmtree(target)
            export_hf_directory(TrainedSource(source, self.model), target)
            return target
        target = directory / "adapter"
        save_adapter(target, adapter_config(self.config, source), adapter_tensors(self.model))
        base = {"digest": self.digest, "engine_version": version()}
        durable.write_json(target / BASE_FILE, base)
        return target


def _difference(saved: Any, mine: Any) -> str:
    if not isinstance(saved, dict) or not isinstance(mine, dict):
        return "its base model has other weights"
    keys = [key for key in mine if saved.get(key) != mine[key]]
    return "; ".join(f"{key} was {saved.get(key)!r} and is {mine[key]!r}" for key in keys[:4])
