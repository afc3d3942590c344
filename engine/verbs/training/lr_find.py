"""engine train --lr-find: a short range test that suggests a learning rate.

The steps are those of the run itself: its rows in its order, its objective, optimizer and memory
plan; only the rate is the test's. The weights that moved are thrown away.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from engine.config.settings import given_settings
from engine.config.train_config import TrainConfig
from engine.device import check_threads, resolve_device
from engine.distributed.group import launched
from engine.errors import ConfigError, DataError, MemoryPlanError
from engine.memory.process import process_bytes
from engine.runs.directory import dated
from engine.runs.logs import RunLog
from engine.runs.metrics import StepMetrics
from engine.runs.output import name_run, unwritable
from engine.runs.progress import ProgressReporter
from engine.sweeps.lr_range import LrCurve, has_diverged, range_rates, write_curve
from engine.training.cpu_dtype import with_cpu_dtype
from engine.training.determinism import deterministic
from engine.training.init_adapter import with_init_adapter
from engine.training.loop import (
    NonFiniteError,
    Progress,
    Trainer,
    TrainerHooks,
    TrainerSettings,
)
from engine.training.prepare import prepare
from engine.verbs.training.plan import with_fitted
from engine.verbs.training.run_memory import explained_memory, require_space_for
from engine.verbs.training.run_setup import RunSetup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RangeSettings(TrainerSettings):
    """The loop's settings of a range test: a rate for each step."""

    rates: tuple[float, ...] = ()

    def rate(self, step: int) -> float:
        """The rate of a step."""
        return self.rates[step]


def lr_find(
    config: TrainConfig | None = None,
    *,
    steps: int = 100,
    rates: tuple[float, float] = (1e-6, 1.0),
    console: bool = True,
    **settings: Any,
) -> LrCurve:
    """Train `steps` steps at rates growing from the first of `rates` to the second.

    Settings come as `engine.train` takes them. The curve is written to `lr_find.json` and
    `lr_find.png` in the run's directory; no model, adapter, checkpoint or record of a run is.
    Raises as `engine.train` does.
    """
    config = given_settings(TrainConfig, config, settings)
    if config.resume is not None:
        raise ConfigError(
            "--lr-find tries rates for a run that begins, and --resume goes on with one. Leave out "
            "one or the other."
        )
    if config.gpus > 1 or launched():
        raise ConfigError(
            "--lr-find takes its steps in one process: their gradients are those of the same rows "
            "over several. Leave out --gpus or torchrun here, and give them with the rate it finds."
        )
    check_threads(config.threads)
    if config.threads:
        torch.set_num_threads(config.threads)
    log_lines = RunLog(config.log_level if console else None)
    try:
        return _find(config, range_rates(steps, *rates), console)
    finally:
        log_lines.close()


def _find(given: TrainConfig, rates: tuple[float, ...], console: bool) -> LrCurve:
    short = given.model_copy(update={"max_steps": len(rates), "report_to": ()})
    asked = with_cpu_dtype(with_init_adapter(short))
    device = resolve_device(asked.device)
    process = process_bytes(device)
    config, rows = with_fitted(asked)
    config = dated(name_run(config))
    assert config.output_dir is not None
    losses: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(deterministic(device, config.deterministic))
        prepared = prepare(config, partial(require_space_for, config, process), rows)
        stack.callback(prepared.close)
        stack.enter_context(explained_memory(config, prepared))
        setup = RunSetup(config, prepared, process)
        bar = stack.enter_context(
            ProgressReporter(len(rates), log_every=config.log_every, live=console)
        )
        diverged = _train(setup, rates, losses, bar)
    curve = LrCurve(rates[: len(losses)], tuple(losses), diverged)
    facts = {"settings": given.stored(), "steps": len(rates), "rates_asked": [rates[0], rates[-1]]}
    try:
        return write_curve(curve, config.output_dir, facts)
    except OSError as error:
        raise unwritable(config.output_dir, error) from None


def _train(
    setup: RunSetup, rates: tuple[float, ...], losses: list[float], bar: ProgressReporter
) -> bool:
    """Take the steps, with their losses into `losses`; whether they ended by divergence."""

    def report(line: StepMetrics) -> None:
        bar.update(line)
        if line.loss is not None:
            losses.append(line.loss)

    def nothing(progress: Progress) -> None:
        """No checkpoint is written."""

    hooks = TrainerHooks(nothing, report, ended=lambda: has_diverged(losses))
    budget = setup.budget
    if budget is not None:

        def overrun() -> None:
            problem = budget.overrun()
            if problem is not None:
                raise MemoryPlanError(f"{problem} The range test ends without a suggestion.")

        watch = partial(budget.watch, setup.model, setup.optimization, setup.average)
        hooks = replace(hooks, watch=watch, overrun=overrun)
    own = setup.trainer_settings()
    known = {item.name: getattr(own, item.name) for item in fields(TrainerSettings)}
    quiet = {"nonfinite_limit": 0, "checkpoint_every": 0, "eval_every": 0, "sample_every": 0}
    settings = RangeSettings(**(known | quiet), rates=rates)
    try:
        Trainer(setup.step(), setup.prepared.batches, settings, hooks).run()
    except NonFiniteError:
        return True
    except DataError as error:
        # The loop speaks of a checkpoint, and there is none.
        raise error.__cause__ if isinstance(error.__cause__, DataError) else error from None
    return has_diverged(losses)
