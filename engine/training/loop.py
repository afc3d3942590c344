"""The training loop: steps, checkpoints, evaluations, stops.

Everything that decides a step is a pure function of the step's number: its examples, its learning
rate, its dropout masks. A run that is stopped and resumed needs the weights, the optimizer's state
and that number, nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from engine.errors import DataError, EngineError, MemoryPlanError
from engine.runs.metrics import Eta, StepMetrics, peak_memory_bytes
from engine.runs.signals import Interrupted, StopSignals
from engine.training.batches_ahead import BatchesAhead, StepBatches
from engine.training.evaluation.best import BestSoFar
from engine.training.step import StepResult, TrainingStep
from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch
from optim import ScheduleShape, lr_at
from optim.lr_schedule import DEFAULT_SHAPE

log = logging.getLogger(__name__)


class NonFiniteError(EngineError):
    """A loss or gradient was not finite more often than the run allows.

    No weight was changed, unless the optimizer stepped in backward: the message says so then.
    """


@dataclass(frozen=True)
class TrainerSettings:
    """What the loop needs of a run's configuration. `total_steps` counts optimizer steps.

    `go_on` is the command that goes on with the run after a stop.
    """

    total_steps: int
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    nonfinite_limit: int = 0
    checkpoint_every: int = 0
    eval_every: int = 0
    sample_every: int = 0
    go_on: str = "--resume auto"
    min_lr_ratio: float = 0.0
    lr_shape: ScheduleShape = DEFAULT_SHAPE

    def rate(self, step: int) -> float:
        """The learning rate of the update after `step` completed ones."""
        return lr_at(
            step,
            base=self.learning_rate,
            warmup=self.warmup_steps,
            total=self.total_steps,
            kind=self.lr_schedule,
            min_ratio=self.min_lr_ratio,
            shape=self.lr_shape,
        )


@dataclass
class Progress:
    """Where a run stands: the JSON part of a checkpoint.

    `cursor` says where rows that are streamed go on (`engine.data.streaming.batch_stream`), `best`
    what evaluations have shown so far (`engine.training.evaluation.best`).
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    loss_scale: float = 1.0
    steps_at_scale: int = 0
    cursor: dict[str, Any] | None = None
    best: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What JSON holds; `Progress(**state)` is its inverse."""
        return asdict(self)


FIRST_LOSS_SCALE = 2.0**16
_GROW_EVERY = 1000


def new_progress(model: Decoder) -> Progress:
    """The start of a run; float16 starts with a loss scale."""
    return Progress(loss_scale=FIRST_LOSS_SCALE if model.dtype == torch.float16 else 1.0)


def adjust_loss_scale(progress: Progress, skipped: bool) -> bool:
    """Halve the scale after an overflow, double it after many steps without one.

    Returns whether the step is to be done again at the lower scale. Source: Micikevicius et al.
    2018, arXiv 1710.03740.
    """
    if skipped and progress.loss_scale > 1.0:
        progress.loss_scale /= 2
        progress.steps_at_scale = 0
        return True
    if progress.loss_scale > 1.0 and not skipped:
        progress.steps_at_scale += 1
        if progress.steps_at_scale == _GROW_EVERY:
            progress.loss_scale *= 2
            progress.steps_at_scale = 0
    return False


def _unwatched(batches: Sequence[PackedBatch]) -> AbstractContextManager[None]:
    return nullcontext()


def _within() -> None:
    return None


def _never() -> bool:
    return False


@dataclass(frozen=True)
class StopReasons:
    """Why a run may stop after a step: a signal, its caller's wish, more memory than it may take.

    Of several processes each has its own, and all stop for the reason of any.
    """

    signal: int | None = None
    ended: bool = False
    problem: str | None = None


def _own(reasons: StopReasons) -> StopReasons:
    return reasons


@dataclass(frozen=True)
class TrainerHooks:
    """What the loop calls.

    `save` writes a checkpoint, `report` takes each step's metrics, `evaluate` returns held-out
    figures to add to a step's line, `sample` writes answers of the model after a step, and `watch`
    is entered around a step. `overrun` is asked after a step whether it took more memory than it
    may; what it says ends the run. `ended` is asked whether the run shall end after this step.
    `agree` makes the reasons of this process those of all that train together.
    """

    save: Callable[[Progress], None]
    report: Callable[[StepMetrics], None]
    evaluate: Callable[[], dict[str, float]] | None = None
    watch: Callable[[Sequence[PackedBatch]], AbstractContextManager[None]] = _unwatched
    overrun: Callable[[], str | None] = _within
    sample: Callable[[int], None] | None = None
    ended: Callable[[], bool] = _never
    agree: Callable[[StopReasons], StopReasons] = _own


class Trainer:
    """Runs steps until `total_steps`, early stopping, a signal, or too many non-finite steps.

    `batches_of(number)` gives the micro-batches of a step (counted from 0) and the epoch it lies
    in, as a fraction, after it; on a GPU it is asked for the next step's while a step runs.
    """

    def __init__(
        self,
        step: TrainingStep,
        batches_of: Callable[[int], tuple[Sequence[PackedBatch], float]],
        settings: TrainerSettings,
        hooks: TrainerHooks,
        signals: StopSignals | None = None,
        progress: Progress | None = None,
        best: BestSoFar | None = None,
    ) -> None:
        self.step = step
        self._batches = BatchesAhead(batches_of, step.model, settings.total_steps)
        self.settings, self.hooks = settings, hooks
        self.signals = signals or StopSignals()
        self.progress = progress or new_progress(step.model)
        self._eta = Eta(settings.total_steps)
        self.best = best
        self.evaluated: tuple[int, dict[str, float]] | None = None
        self._improved = False
        self._on_disk = self.progress.step

    @property
    def is_done(self) -> bool:
        """Whether no step is left: all are done, or early stopping has waited long enough."""
        exhausted = self.best is not None and self.best.exhausted
        return exhausted or self.progress.step >= self.settings.total_steps

    def run(self) -> Progress:
        """Train to the end; a checkpoint of the last step is on the disk when this returns.

        `evaluated` is then the step and the figures of the last evaluation, if there was one.

        Raises `Interrupted` after a checkpoint when a signal asked for a stop, and
        `NonFiniteError`, `MemoryPlanError` and `DataError`, after a checkpoint too, when values
        stay non-finite, a step took more memory than it may, or a row cannot be used.
        """
        settings, progress = self.settings, self.progress
        ended = False
        while not self.is_done and not ended:
            self._one_step()
            due = self._is_due(settings.checkpoint_every) or self._improved
            # Read once: a signal may come at any moment.
            own = StopReasons(self.signals.requested, self.hooks.ended(), self.hooks.overrun())
            reasons = self.hooks.agree(own)
            stop, ended = reasons.signal, reasons.ended
            unfinished = not self.is_done and not ended
            problem = reasons.problem if unfinished else None
            if due or stop is not None or problem is not None or not unfinished:
                self._save()
            if problem is not None:
                raise MemoryPlanError(
                    f"{problem} A checkpoint of step {progress.step} of {settings.total_steps} is "
                    f"written: {settings.go_on} with these settings goes on from there."
                )
            if unfinished and stop is not None:
                raise Interrupted(
                    stop,
                    f"Stopped after step {progress.step} of {settings.total_steps}; a checkpoint "
                    f"is written. Go on with {settings.go_on}.",
                    step=progress.step,
                )
        return progress

    def _save(self) -> None:
        self.hooks.save(self.progress)
        self._on_disk = self.progress.step

    def _next_batches(self) -> StepBatches:
        """The batches of the next step. Raises `DataError` after a checkpoint."""
        step = self.progress.step
        try:
            return self._batches.take(step)
        except DataError as error:
            if step == 0:
                raise
            if step > self._on_disk:
                self._save()
            raise DataError(
                f"{error} A checkpoint of step {step} of {self.settings.total_steps} is written: "
                f"{self.settings.go_on} goes on from there; add --bad-lines skip to leave such "
                "rows out."
            ) from error

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _evaluate(self) -> dict[str, float]:
        """Figures of the held-out rows where they are due; the best ones so far are noted."""
        step, every = self.progress.step, self.settings.eval_every
        last = step == self.settings.total_steps
        self._improved = False
        if self.hooks.evaluate is None or not (self._is_due(every) or (every and last)):
            return {}
        figures = self.hooks.evaluate()
        self.evaluated = step, figures
        if self.best is not None:
            self._improved = self.best.take(step, figures)
            self.progress.best = self.best.saved()
        return figures

    def _one_step(self) -> None:
        settings, progress = self.settings, self.progress
        started = time.perf_counter()
        lr = settings.rate(progress.step)
        for group in self.step.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)
        batches = self._next_batches()
        with self.hooks.watch(batches.host):
            result = self._run(batches.device)
        while adjust_loss_scale(progress, result.skipped):
            log.info("float16 overflowed; loss scale lowered to %g", progress.loss_scale)
            result = self._run(batches.device)
        self._count(result)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        figures = self._evaluate()
        self.hooks.report(
            StepMetrics(
                step=progress.step,
                epoch=batches.epoch,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens_per_second=result.tokens / seconds,
                trained_tokens=result.trained_tokens,
                peak_memory_bytes=peak_memory_bytes(self.step.model.device),
                eta_seconds=self._eta.update(progress.step, result.tokens, seconds),
                skipped=progress.skipped,
                seconds=seconds,
                extra=result.figures | figures,
            )
        )
        every = settings.sample_every
        if self.hooks.sample and (self._is_due(every) or (every and self.is_done)):
            self.hooks.sample(progress.step)

    def _run(self, batches: Sequence[PackedBatch]) -> StepResult:
        number = self.progress.step
        return self.step(
            batches,
            number,
            self.progress.loss_scale,
            meanwhile=lambda: self._batches.start(number + 1),
        )

    def _count(self, result: StepResult) -> None:
        progress, limit = self.progress, self.settings.nonfinite_limit
        if result.skipped:
            what = f"loss {result.loss}, gradient norm {result.grad_norm}"
            if progress.skipped_in_a_row + 1 > limit:
                if result.torn:
                    # Neither the state before the step nor one after it: nothing to save.
                    raise NonFiniteError(
                        f"Step {progress.step + 1} is not finite ({what}), and with the optimizer "
                        "in backward a part of the weights had moved by then; they are not saved. "
                        "Go on from the last checkpoint with --resume auto, with a lower "
                        "--learning-rate or without --optimizer-in-backward."
                    )
                # The step is not counted: going on from the last checkpoint meets it again.
                self.hooks.save(progress)
                raise NonFiniteError(
                    f"Step {progress.step + 1} is not finite ({what}); no weight was changed and "
                    f"the state before it is saved. Lower --learning-rate, look at the rows with "
                    "`engine data preview`, or allow it with --nonfinite skip:N."
                )
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            extent = "in part" if result.torn else "whole"
            log.warning("Step %d skipped (%s): %s", progress.step + 1, extent, what)
        else:
            progress.skipped_in_a_row = 0
        progress.step += 1
        progress.tokens += result.tokens
        progress.trained_tokens += result.trained_tokens
