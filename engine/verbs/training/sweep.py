"""engine sweep: runs with several values of their settings, one after another."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config.tasks.comparing import SweepSettings
from engine.errors import ConfigError, listing
from engine.pipelines.process import run_stage
from engine.pipelines.recipe import Stage
from engine.pipelines.records import StageRecord
from engine.runs.summary import refuse_other_summary, write_summary
from engine.storage import durable, names
from engine.storage.lock import DirectoryLock
from engine.storage.safe_files import json_object_or_empty
from engine.storage.standing import refuse_foreign
from engine.sweeps.recipe import Sweep, read_sweep
from engine.sweeps.report import (
    PICTURE,
    RECORD,
    TABLE,
    SweepResult,
    TrialResult,
    ranked,
    result_of,
    write_report,
)
from engine.sweeps.trials import Trial, trials_of

OnTrial = Callable[[Trial, str], None]

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPED = frozenset(128 + number for number in _STOPS)
"""Exit statuses of a run that was asked to stop. One that was killed has failed like any other."""
_IDENTITY = "trials.json"
_INPUTS = (
    "model", "revision", "tokenizer", "add_tokens", "data", "query", "eval_data", "eval_query",
    "teacher", "reference",
)  # fmt: skip
"""Settings that name what a run reads."""
log = logging.getLogger(__name__)


def sweep(file: str | Path, on_trial: OnTrial | None = None, **options: Any) -> SweepResult:
    """Run the trials of a file; `options` are the other settings of `SweepSettings`.

    Does and raises as `sweep_with`.
    """
    return sweep_with(SweepSettings(file=str(file), **options), on_trial)


def sweep_with(settings: SweepSettings, on_trial: OnTrial | None = None) -> SweepResult:
    """Run the trials of a file that have not been done, then write the table and the picture.

    `on_trial` is told of each trial what happens: `begins`, `done before`, or how it ended. A trial
    that fails does not stop the others; one that a signal stopped does, and goes on next time. The
    status is that of the signal, or of the last trial where none succeeded. Raises `ConfigError`.
    """
    recipe = read_sweep(Path(settings.file), settings.output_dir, settings.trials)
    trials, tell = trials_of(recipe), on_trial or (lambda trial, what: None)
    if settings.dry_run:
        return SweepResult(recipe, [TrialResult(trial, "planned", None, {}) for trial in trials])
    started, status = time.time(), 0
    refuse_other_summary(recipe.output_dir, "sweep")
    names.mkdir(recipe.output_dir, parents=True, exist_ok=True)
    with DirectoryLock(recipe.output_dir):
        _require_same(recipe, trials)
        for trial in trials:
            status = _run(recipe, trial, tell)
            if status in _STOPPED:
                break
        results = [result_of(trial, recipe.metric) for trial in trials]
        _say_of_other_inputs([one.trial for one in results if one.value is not None])
        stopped = status in _STOPPED
        result = SweepResult(recipe, ranked(results, recipe.greatest))
        if stopped or result.best is None:
            result = replace(result, status=status or 2)
        write_report(result)
        _summarise(result, started)
    return result


def _run(recipe: Sweep, trial: Trial, tell: OnTrial) -> int:
    """Run one trial, unless it is done; its exit status."""
    record = StageRecord(recipe.output_dir, Stage(trial.name, "train", dict(trial.settings)))
    # The report is written from the run's own summary, so that has to be there too.
    if record.is_done() and result_of(trial, recipe.metric).status == "Success":
        record.settle()
        tell(trial, "done before")
        return 0
    tell(trial, "begins")
    begun = time.monotonic()
    status, message = run_stage(record.stage, record.begin(), record.folder, quiet=True)
    record.end(status, time.monotonic() - begun, message)
    value = result_of(trial, recipe.metric).value
    good = f"{recipe.metric} {value:.6g}" if value is not None else "done"
    tell(trial, good if status == 0 else message or f"ended with status {status}")
    return status


def _require_same(recipe: Sweep, trials: list[Trial]) -> None:
    """Refuse a directory in which another sweep has trials under the same names.

    More trials than there were are welcome, and so is another metric. Raises `ConfigError`.
    """
    path = recipe.output_dir / _IDENTITY
    before = json_object_or_empty(path)
    refuse_foreign(path, lambda _: _is_identity(before), "a list of trials")
    for name in (RECORD, TABLE, PICTURE) if not before else ():
        refuse_foreign(recipe.output_dir / name, lambda _: False, "a report of a sweep")
    now = {trial.name: {key: str(value) for key, value in trial.values.items()} for trial in trials}
    for name, values in before.items():
        if name in now and now[name] != values:
            raise ConfigError(
                f"{recipe.output_dir} holds another sweep: its {name} has {values}, and that of "
                f"{recipe.file} has {now[name]}. Give another --output-dir, or remove that one."
            )
    durable.write_json(path, before | now)


def _say_of_other_inputs(trials: list[Trial]) -> None:
    """Warn where trials that name the same inputs did not read the same, as digests tell."""
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    for trial in trials:
        named = repr([trial.settings.get(name) for name in _INPUTS])
        digests = json_object_or_empty(trial.folder / "manifest.json").get("digests")
        digests = digests if isinstance(digests, dict) else {}
        first, before = seen.setdefault(named, (trial.name, digests))
        other = [name for name in before if name in digests and before[name] != digests[name]]
        if other:
            log.warning(
                "%s read other inputs than %s (%s changed in between), so that their figures "
                "cannot be compared; delete the one that is out of date and start again",
                trial.name, first, listing(other),
            )  # fmt: skip


def _is_identity(told: dict[str, Any]) -> bool:
    return bool(told) and all(isinstance(values, dict) for values in told.values())


def _summarise(result: SweepResult, started: float) -> None:
    best, recipe = result.best, result.sweep
    done = sum(one.status == "Success" for one in result.trials)
    figures = {"trials": len(result.trials), "succeeded": done}
    facts = {} if best is None else {"best_trial": best.trial.name, recipe.metric: best.value}
    failure = None
    if result.status:
        failure = "No trial succeeded." if best is None else "The sweep was stopped."
    write_summary(
        recipe.output_dir,
        "sweep",
        {"file": str(recipe.file), "method": recipe.method, "metric": recipe.metric},
        started=started,
        metrics=figures | facts,
        output_path=None if best is None else best.trial.folder,
        error_message=failure,
    )
