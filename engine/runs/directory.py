"""The run directory: its lock, its log and its files.

    pipeline.log     everything from DEBUG up; the console shows INFO
    metrics.jsonl    a line per step (`engine.runs.metrics`)
    config.yaml      the resolved configuration; `engine train --config` takes it again
    manifest.json    versions, machine, seed, digests, git commit, and every start of the run
    summary.json     parameters, status (Success or Failure), output_path, error_message, metrics
    checkpoint-<n>/  training checkpoints (`engine.runs.checkpoints`)
    adapter/         the result, with PEFT's names; after full fine-tuning `model/`

`RunDirectory` is a context: leaving it by an exception writes the traceback to the log and, unless
there is one already, a summary of the failure.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from engine.config.sources import dump_yaml
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, EngineError
from engine.provenance import git_commit, machine, versions
from engine.runs.checkpoints import CheckpointStore, sweep
from engine.runs.logs import RunLog
from engine.runs.signals import Interrupted, RaiseOnTerminate
from engine.storage import durable
from engine.storage.lock import DirectoryLock
from engine.storage.safe_files import json_object_or_empty

log = logging.getLogger(__name__)


def name_run(config: TrainConfig, now: float | None = None) -> TrainConfig:
    """`config` with `run_id` and `output_dir` filled in: time and model, and `runs/<run_id>`."""
    run_id = config.run_id
    if run_id is None:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        model = Path(config.model).name or "model"
        safe = "".join(sign if sign.isalnum() or sign in "._+-" else "-" for sign in model)
        run_id = f"{stamp}-{safe[:48]}"
    output = config.output_dir if config.output_dir is not None else Path("runs") / run_id
    return config.model_copy(update={"run_id": run_id, "output_dir": output})


class RunDirectory:
    """The locked folder of a run that is being made, with its log open.

    Raises `ConfigError` if the folder cannot be written to, if another process is writing to it,
    and if it holds the results of an earlier run that `config` neither resumes nor overwrites.
    """

    def __init__(self, config: TrainConfig, *, console: bool = True) -> None:
        self.config = name_run(config)
        assert self.config.output_dir is not None
        self.path = self.config.output_dir
        self.summary_written = False
        self._signals = RaiseOnTerminate()
        self._started = time.time()
        self._make()
        self.lock = DirectoryLock(self.path)
        try:
            sweep(self.path)
            sweep(self.adapter_path)
            self.checkpoints = CheckpointStore(self.path, self.config.keep_checkpoints, self.lock)
            self._settle_earlier_run()
            self._log = RunLog(self.log_path, self.config.log_level if console else None)
            self.summary_path.unlink(missing_ok=True)
            durable.write_text(self.path / "config.yaml", dump_yaml(self.config))
        except OSError as error:
            self.lock.release()
            raise self._unwritable(error) from None
        except BaseException:
            self.lock.release()
            raise

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
        earlier = json_object_or_empty(target).get("starts", []) if self.config.resume else []
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": sys.argv,
            "pid": os.getpid(),
            "resume": self.config.resume,
        }
        content = {
            "run_id": self.config.run_id,
            "seed": self.config.seed,
            "versions": versions(),
            "machine": machine(),
            "git_commit": git_commit(),
            "starts": [*earlier, start],
        }
        durable.write_json(target, content | facts)

    def write_summary(
        self,
        status: str,
        *,
        output_path: Path | None = None,
        error_message: str | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `summary.json`. `status` is Success or Failure; anything else is a `ValueError`."""
        if status not in ("Success", "Failure"):
            raise ValueError(f"status is {status!r}; it should be Success or Failure")
        durable.write_json(
            self.summary_path,
            {
                "parameters": self.config.model_dump(mode="json"),
                "status": status,
                "output_path": str(output_path) if output_path is not None else None,
                "error_message": error_message,
                "metrics": dict(metrics or {}),
                "wall_seconds": round(time.time() - self._started, 3),
            },
        )
        self.summary_written = True

    def close(self) -> None:
        """Close the log and let go of the folder; a second call does nothing."""
        self._signals.__exit__(None, None, None)
        self._log.close()
        self.lock.release()

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
        if not isinstance(error, EngineError) and not stopped:
            error.add_note(f"The traceback is in {self.log_path}.")
        if self.summary_written:
            return
        text = str(error) or ("Stopped by SIGINT." if stopped else type(error).__name__)
        message = text if stopped or isinstance(error, EngineError) else f"{_name(error)}: {error}"
        try:
            self.write_summary("Failure", error_message=message)
        except EngineError as second:
            # The first failure is the one to report; a full disk often causes both.
            log.error("The summary could not be written: %s", second)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"The run directory {self.path} cannot be written to: {durable.describe(error)}. "
            "Choose another with --output-dir."
        )

    def _settle_earlier_run(self) -> None:
        """Refuse, or clear away, what an earlier run left; nothing is replaced unasked."""
        if self.config.resume is not None:
            return
        aside = [entry.name for entry in self.path.glob(".bad-checkpoint-*")]
        results = [f"checkpoint-{step}" for step in self.checkpoints.steps()] + aside
        results += [name for name in ("adapter", "model") if (self.path / name).exists()]
        if results and not self.config.overwrite:
            raise ConfigError(
                f"{self.path} holds an earlier run ({', '.join(results)}). Go on with it by "
                "--resume auto, replace it with --overwrite, or choose another --output-dir."
            )
        self.checkpoints.clear()
        for name in ("adapter", "model"):
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)


def _name(error: BaseException) -> str:
    return type(error).__name__
