"""The run directory: its lock, its log and its files.

    pipeline.log     everything from DEBUG up; the console shows INFO
    metrics.jsonl    a line per step (`engine.runs.metrics`)
    config.yaml      the resolved configuration; `engine train --config` takes it again
    manifest.json    versions, machine, seed, digests, git commit, and every start of the run
    summary.json     parameters, status (Success or Failure), output_path, error_message, metrics
    checkpoint-<n>/  training checkpoints (`engine.runs.checkpoints`)
    adapter/         the result, with PEFT's names; after full fine-tuning `model/`

    replaced/        the run that was overwritten, until the next --overwrite

`RunDirectory` is a context: leaving it by an exception writes the traceback to the log and, unless
there is one already, a summary of the failure.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from engine.config.data_names.passwords import hide_in_words, scrub
from engine.config.sources import dump_yaml
from engine.config.train_config import TrainConfig
from engine.errors import EngineError
from engine.provenance import git_commit, machine, versions
from engine.runs.checkpoints import CheckpointStore, sweep
from engine.runs.earlier import EarlierRun
from engine.runs.logs import RunLog
from engine.runs.output import (
    check_earlier,
    name_run,
    results_of,
    unwritable,
)
from engine.runs.signals import Interrupted, RaiseOnTerminate
from engine.storage import durable, names
from engine.storage.lock import DirectoryLock
from engine.storage.safe_files import json_object_or_empty

log = logging.getLogger(__name__)


class RunDirectory:
    """The folder of a run that is being made.

    Nothing is written before `open`, and nothing into an earlier run's files before `begin`: a
    start that is refused leaves the run that stands there byte for byte as it was. What is logged
    before then reaches the log file as the run begins.
    """

    def __init__(self, config: TrainConfig, *, console: bool = True) -> None:
        self.config = dated(name_run(config))
        assert self.config.output_dir is not None
        self.path = self.config.output_dir
        self.console = console
        self.summary_written = False
        self.begun = False
        # A refusal is noted down in a folder that the user named, unless a run stands there.
        named = config.output_dir is not None or config.run_id is not None
        self._notes_refusal = named and not is_run_begun(self.path)
        self._signals = RaiseOnTerminate()
        self._started = time.time()
        self._log = RunLog(self.config.log_level if console else None)
        self._lock: DirectoryLock | None = None
        self._replaces = False

    def open(self) -> None:
        """Make and lock the folder; where no earlier run stands in it, begin at once.

        Raises `ConfigError` if the folder cannot be written to, if another process is writing to
        it, and if it holds the results of an earlier run that is neither resumed nor overwritten.
        """
        check_earlier(self.config)
        try:
            names.mkdir(self.path, parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None
        earlier = is_run_begun(self.path)
        self._lock = DirectoryLock(self.path, sign=False)
        try:
            self._earlier = EarlierRun(self.path)
            self.checkpoints = CheckpointStore(self.path, self.config.keep_checkpoints, self._lock)
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._replaces = self.config.resume is None and bool(results_of(self.path))
        if not earlier:
            self.begin()

    def begin(self) -> None:
        """Start writing; an earlier run that is overwritten moves aside. A second call is nothing.

        To be called when everything is checked and the weights are there.
        """
        if self.begun:
            return
        assert self._lock is not None
        try:
            self._lock.sign()
            if self._replaces:
                self._earlier.set_aside()
            sweep(self.adapter_path)
            self.begun = True
            self._log.open_file(self.log_path)
            names.unlink(self.summary_path, missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None
        durable.write_text(self.path / "config.yaml", dump_yaml(self.config))

    def reached_checkpoint(self) -> None:
        """The run has a checkpoint: from here on it is the run of this folder."""
        self._earlier.settle()

    @property
    def log_path(self) -> Path:
        """The file that holds every log line and traceback."""
        return self.path / "pipeline.log"

    @property
    def metrics_path(self) -> Path:
        """The file of one line per step."""
        return self.path / "metrics.jsonl"

    @property
    def summary_path(self) -> Path:
        """The file that says how the run ended."""
        return self.path / "summary.json"

    @property
    def adapter_path(self) -> Path:
        """The folder that the trained adapter is saved to."""
        return self.path / "adapter"

    def write_manifest(self, **facts: Any) -> None:
        """Write `manifest.json` from what this machine is and `facts` (digests, thread count ...).

        The starts of a run that was resumed add up under `starts`.
        """
        target = self.path / "manifest.json"
        before = self.recorded() if self.config.resume else {}
        earlier = before.get("starts")
        earlier = earlier if isinstance(earlier, list) else []
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": hide_in_words(sys.argv),
            "pid": os.getpid(),
            "resume": self.config.resume,
        }
        content = {
            "run_id": self.config.run_id,
            "seed": self.config.seed,
            "template_date": self.config.template_date,
            "directory": str(before.get("directory") or Path.cwd()),
            "versions": versions(),
            "machine": machine(),
            "git_commit": git_commit(),
            "starts": [*earlier, start],
        }
        durable.write_json(target, content | facts)

    def recorded(self) -> dict[str, Any]:
        """The manifest of a run that goes on; empty where there is none."""
        return json_object_or_empty(self.path / "manifest.json")

    def write_summary(
        self,
        status: str,
        *,
        output_path: Path | None = None,
        error_message: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Write `summary.json`. `status` is Success or Failure; anything else is a `ValueError`.

        `more` are further entries: `next` (commands), `stopped` (step and signal).
        """
        if status not in ("Success", "Failure"):
            raise ValueError(f"status is {status!r}; it should be Success or Failure")
        durable.write_json(
            self.summary_path,
            {
                "verb": "train",
                "parameters": self.config.stored(),
                "status": status,
                "output_path": str(output_path) if output_path is not None else None,
                "error_message": scrub(error_message) if error_message else None,
                "metrics": dict(metrics or {}),
                "wall_seconds": round(time.time() - self._started, 3),
                **more,
            },
        )
        self.summary_written = True

    def close(self) -> None:
        """Close the log and let go of the folder; a second call does nothing."""
        self._signals.__exit__(None, None, None)
        self._log.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                self._record_failure(error)
        finally:
            self.close()

    def _record_failure(self, error: BaseException) -> None:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        log.debug("the run ended with %s", type(error).__name__, exc_info=error)
        if self.begun and self._earlier.waits:
            self._log.close_file()
            self._earlier.restore()
            log.warning("The earlier run in %s stands as before.", self.path)
            return
        if not self.begun and not (self._notes_refusal and self._note_refusal()):
            return
        if not isinstance(error, EngineError) and not stopped:
            error.add_note(f"The traceback is in {self.log_path}.")
        if self.summary_written:
            return
        text = str(error) or ("Stopped by SIGINT." if stopped else type(error).__name__)
        message = text if stopped or isinstance(error, EngineError) else f"{_name(error)}: {error}"
        facts: dict[str, Any] = {"signal": "SIGINT", "step": None}
        if isinstance(error, Interrupted):
            facts = error.facts()
        more: dict[str, Any] = {"stopped": facts} if stopped else {}
        try:
            self.write_summary("Failure", error_message=message, **more)
        except EngineError as second:
            # The first failure is the one to report; a full disk often causes both.
            log.error("The summary could not be written: %s", second)

    def _note_refusal(self) -> bool:
        """Begin after all, to write down why the run never did; False where that cannot be."""
        try:
            self._notes_refusal = False
            if self._lock is None:
                self.open()
            self.begin()
        except (EngineError, OSError):
            return False
        return True


def dated(config: TrainConfig) -> TrainConfig:
    """`config` with the date that its chat template takes for the present.

    A run that goes on has that of its first start; otherwise it is now, unless it was given.
    """
    assert config.output_dir is not None
    date = config.template_date
    if config.resume is not None:
        recorded = json_object_or_empty(config.output_dir / "manifest.json").get("template_date")
        date = recorded if isinstance(recorded, str) else date
    date = date or datetime.now().isoformat(timespec="seconds")
    return config.model_copy(update={"template_date": date})


def is_run_begun(folder: Path) -> bool:
    """Whether `folder` holds a run, and not just the record of one that was refused."""
    return (folder / "manifest.json").exists() or bool(results_of(folder))


def _name(error: BaseException) -> str:
    return type(error).__name__
