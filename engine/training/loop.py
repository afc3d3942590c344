"""The training loop, and nothing of its set-up.

One step: the gradients of `accumulate` micro-batches, each divided by the trained tokens of all of
them together, are summed, clipped by their global norm and handed to the optimizer. Accumulating N
micro-batches is therefore the same arithmetic as one batch of N times the rows.

Everything that decides a step is a pure function of the step's number: its rows, its learning
rate, its dropout masks. A run that stops and goes on needs the weights, the optimizer's state and
that number, nothing else.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.runs.metrics import Eta, StepMetrics, peak_memory_bytes
from engine.runs.signals import StopSignals
from models.decoder import Decoder
from optim import AdamW8bit, StepInBackward, lr_at
from optim.clip import clip_coefficient, global_norm

if TYPE_CHECKING:
    from engine.data.loader import Batch

log = logging.getLogger(__name__)


class NonFiniteError(EngineError):
    """A loss or gradient was not finite more often than the run allows.

    No weight was changed, unless the optimizer stepped in backward: the message says so then.
    """


@dataclass(frozen=True)
class TrainerSettings:
    """What the loop needs of a run's configuration. `total_steps` counts optimizer steps."""

    total_steps: int
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    max_grad_norm: float
    seed: int
    nonfinite_limit: int = 0
    checkpoint_every: int = 0
    eval_every: int = 0


@dataclass
class Progress:
    """Where a run stands: the JSON part of a checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    loss_scale: float = 1.0
    steps_at_scale: int = 0

    def state(self) -> dict[str, Any]:
        """What JSON holds; `Progress(**state)` is its inverse."""
        return asdict(self)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. `grad_norm` is before clipping; a skipped step changed nothing.

    `torn` says that of a skipped step some weights may have moved (`train_step` with `in_backward`,
    a finite loss, and gradients that were not).
    """

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    skipped: bool
    torn: bool = False


def dropout_seed(seed: int, step: int, micro: int) -> int:
    """Seed of one micro-batch's dropout: a pure function of the run's seed and its position."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro + 1) & ((1 << 62) - 1)


def train_step(
    model: Decoder,
    optimizer: AdamW8bit,
    batches: Sequence[Batch],
    *,
    max_grad_norm: float,
    seed: int = 0,
    step: int = 0,
    loss_scale: float = 1.0,
    teacher: Decoder | None = None,
    in_backward: StepInBackward | None = None,
) -> StepResult:
    """Accumulate the micro-batches' gradients and update once; gradients are then cleared.

    Clipping is a factor that the optimizer applies as it reads the gradients; the host waits for
    the device once, after the update, to learn the loss. A loss or gradient norm that is not finite
    leaves weights and optimizer state as they were. `loss_scale` multiplies the loss before the
    backward pass and is divided out again, for gradients that float16 could not hold otherwise.
    `max_grad_norm` 0 is no clipping.

    With `in_backward`, which must be of `optimizer`, weights move while their gradients are made,
    to the same bits. A loss that is not finite still changes nothing, for it is known before; a
    gradient that is not finite leaves its own unit as it was, but units before it have moved.

    Raises `ValueError` if no row has a trained token, and with `in_backward` for several
    micro-batches, clipping or a loss scale.
    """
    trained = sum(batch.trained_tokens for batch in batches)
    if trained == 0:
        raise ValueError("none of the step's rows has a trained token")
    if in_backward is not None and (len(batches) > 1 or max_grad_norm or loss_scale != 1.0):
        raise ValueError("steps in backward take one micro-batch, unclipped, at a loss scale of 1")
    model.train()
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    for micro, batch in enumerate(batches):
        model.dropout_seed = dropout_seed(seed, step, micro)
        part = model.loss(
            batch.input_ids.to(model.ids_device),
            batch.labels.to(model.device),
            batch.cu_seqlens.to(model.device),
            num_items=trained / loss_scale,
            teacher=teacher,
        )
        loss += part.detach() / loss_scale
        if in_backward is None:
            part.backward()
        else:
            with in_backward.stepping(torch.where(torch.isfinite(loss), 1.0, torch.nan)):
                part.backward()
    if in_backward is None:
        norm = _step_at_once(optimizer, loss, max_grad_norm, loss_scale)
    else:
        norm = in_backward.grad_norm()
    tokens = sum(int(batch.input_ids.numel()) for batch in batches)
    value, measured = torch.stack((loss, norm.double())).tolist()
    skipped = not (math.isfinite(value) and math.isfinite(measured))
    torn = skipped and math.isfinite(value) and in_backward is not None
    return StepResult(value, measured, tokens, trained, skipped, torn)


def _step_at_once(
    optimizer: AdamW8bit, loss: Tensor, max_grad_norm: float, loss_scale: float
) -> Tensor:
    """Update by the gradients there are, clear them, and return their norm, fp32 ()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = global_norm([p.grad for p in parameters if p.grad is not None]) / loss_scale
    factor = clip_coefficient(norm, max_grad_norm or math.inf) / loss_scale
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    # The optimizer leaves out a step whose factor is not finite, on the device.
    optimizer.step(grad_scale=torch.where(finite, factor, torch.nan))
    optimizer.zero_grad(set_to_none=True)
    return norm


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


class Trainer:
    """Runs steps until `total_steps`, a signal, or too many steps that are not finite.

    `batches_of(step)` gives the micro-batches of a step (counted from 0) and the epoch it lies in,
    as a fraction, after it. `save` writes a checkpoint, `report` takes each step's metrics,
    `evaluate` returns held-out figures to add to a step's line, `watch` is entered around a step,
    a `teacher` is what the model learns from instead of the tokens, and `in_backward` lets the
    optimizer step while gradients are made.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: AdamW8bit,
        batches_of: Callable[[int], tuple[Sequence[Batch], float]],
        settings: TrainerSettings,
        *,
        save: Callable[[Progress], None],
        report: Callable[[StepMetrics], None],
        evaluate: Callable[[], dict[str, float]] | None = None,
        signals: StopSignals | None = None,
        progress: Progress | None = None,
        watch: Callable[[Sequence[Batch]], AbstractContextManager[None]] | None = None,
        teacher: Decoder | None = None,
        in_backward: StepInBackward | None = None,
    ) -> None:
        self.model, self.optimizer, self.teacher = model, optimizer, teacher
        self.in_backward = in_backward
        self.batches_of, self.settings = batches_of, settings
        self.save, self.report, self.evaluate = save, report, evaluate
        self.signals = signals or StopSignals()
        self.progress = progress or new_progress(model)
        self.watch = watch or (lambda batches: nullcontext())
        self._eta = Eta(settings.total_steps)

    def run(self) -> Progress:
        """Train to the end; a checkpoint of the last step is on the disk when this returns.

        Raises `Interrupted` after a checkpoint when a signal asked for a stop, and
        `NonFiniteError`, after a checkpoint too, when values stay non-finite.
        """
        settings, progress = self.settings, self.progress
        while progress.step < settings.total_steps:
            self._one_step()
            due = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
            stopping = self.signals.requested is not None
            if due or stopping or progress.step == settings.total_steps:
                self.save(progress)
            if progress.step < settings.total_steps:
                self.signals.raise_if_requested(
                    f"Stopped after step {progress.step} of {settings.total_steps}; a checkpoint "
                    "is written. Go on with --resume auto."
                )
        return progress

    def _one_step(self) -> None:
        settings, progress = self.settings, self.progress
        started = time.perf_counter()
        lr = lr_at(
            progress.step,
            base=settings.learning_rate,
            warmup=settings.warmup_steps,
            total=settings.total_steps,
            kind=settings.lr_schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batches, epoch = self.batches_of(progress.step)
        with self.watch(batches):
            result = self._update(batches)
        while adjust_loss_scale(progress, result.skipped):
            log.info("float16 overflowed; loss scale lowered to %g", progress.loss_scale)
            result = self._update(batches)
        self._count(result)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        held = {}
        if self.evaluate and settings.eval_every and progress.step % settings.eval_every == 0:
            held = self.evaluate()
        self.report(
            StepMetrics(
                step=progress.step,
                epoch=epoch,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                tokens_per_second=result.tokens / seconds,
                trained_tokens=result.trained_tokens,
                peak_memory_bytes=peak_memory_bytes(self.model.device),
                eta_seconds=self._eta.update(progress.step, result.tokens, seconds),
                skipped=progress.skipped,
                seconds=seconds,
                extra=held,
            )
        )

    def _update(self, batches: Sequence[Batch]) -> StepResult:
        return train_step(
            self.model,
            self.optimizer,
            batches,
            max_grad_norm=self.settings.max_grad_norm,
            seed=self.settings.seed,
            step=self.progress.step,
            loss_scale=self.progress.loss_scale,
            teacher=self.teacher,
            in_backward=self.in_backward,
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
                self.save(progress)
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
