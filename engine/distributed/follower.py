"""The run directory of a process that does not write to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config.train_config import TrainConfig
from engine.runs.directory import RunDirectory


class FollowedDirectory(RunDirectory):
    """The folder of a run that another process of the group writes.

    `config` is that of the first process, with its directory and date. Nothing is locked, written
    or read here; warnings go to the console.
    """

    def __init__(self, config: TrainConfig) -> None:
        quiet = config.model_copy(update={"log_level": "WARNING"})
        super().__init__(quiet)
        self.config = config
        self._notes_refusal = False

    def open(self) -> None:
        """Nothing is opened."""

    def begin(self) -> None:
        """Nothing is written."""

    def reached_checkpoint(self) -> None:
        """The first process notes it."""

    def write_manifest(self, **facts: Any) -> None:
        """The first process writes it."""

    def recorded(self) -> dict[str, Any]:
        """Nothing: the first process tells what it has."""
        return {}

    def write_summary(
        self,
        status: str,
        *,
        output_path: Path | None = None,
        error_message: str | None = None,
        metrics: Any = None,
        **more: Any,
    ) -> None:
        """The first process writes it."""
