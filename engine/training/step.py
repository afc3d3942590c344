"""One optimizer step: accumulate gradients, clip them, update the weights.

The gradients of the micro-batches, each divided by the trained tokens of all of them together, are
summed, clipped by their global norm and handed to the optimizer. Accumulating N micro-batches is
therefore the same arithmetic as one batch of N times the examples. So are the micro-batches of
several ranks: trained tokens, gradients and losses are summed over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from engine.training.objectives.objective import Objective, StepTotals
from engine.training.objectives.tokens import TOKENS
from kernels.runtime.random import derived_seed
from kernels.runtime.ranks import ONE_RANK, Ranks, host_sums
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.layers.packed_batch import PackedBatch
from models.weight_average import WeightAverage
from optim import StepInBackward, StepOptimizer
from optim.clip import clip_coefficient, global_norm, usable_norm


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. `grad_norm` is before clipping; a skipped step changed nothing.

    `torn` says that of a skipped step some weights may have moved (`TrainingStep` with
    `in_backward`, a finite loss, and gradients that were not). `figures` are what the objective
    reports besides its loss.
    """

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    skipped: bool
    torn: bool = False
    figures: dict[str, float] = field(default_factory=dict)


class StepRanks(Protocol):
    """What ranks that compute a step together do around its passes; all of them, in this order."""

    @property
    def data(self) -> Ranks:
        """The ranks that the rows of a step are dealt to."""

    def begin(self) -> None:
        """Before the first pass."""

    def last_pass(self) -> AbstractContextManager[None]:
        """Around this rank's last backward pass, if it has one."""

    def finish(self) -> None:
        """After the last pass: the optimizer's parameters have the gradients of all ranks."""

    def norm(self, gradients: Sequence[Tensor], sums: Tensor) -> Tensor:
        """The norm () of all ranks' gradients; `gradients` are the optimizer's own.

        `sums` (F,) become those of all ranks.
        """

    def gather(self) -> None:
        """After the update."""


def dropout_seed(seed: int, step: int, micro: int) -> int:
    """Key of one micro-batch's dropout: a pure function of the run's seed and its position."""
    return derived_seed(seed, step, micro)


@dataclass(frozen=True)
class TrainingStep:
    """Everything that the steps of a run have in common.

    `max_grad_norm` 0 is no clipping. `objective` is what the steps minimise. With `in_backward`,
    which must be of `optimizer`, weights move while their gradients are made, to the same bits.
    With `parallel` the micro-batches are this rank's part of the step, which may be none, and
    `optimizer` has the parameters that this rank owns. An `average` takes in the weights after
    every update.
    """

    model: Decoder
    optimizer: StepOptimizer
    settings: StepSettings = DEFAULT_SETTINGS
    max_grad_norm: float = 0.0
    seed: int = 0
    objective: Objective = TOKENS
    in_backward: StepInBackward | None = None
    parallel: StepRanks | None = None
    average: WeightAverage | None = None

    def __call__(
        self,
        batches: Sequence[PackedBatch],
        number: int = 0,
        loss_scale: float = 1.0,
        meanwhile: Callable[[], None] | None = None,
    ) -> StepResult:
        """Accumulate the micro-batches' gradients and update once; gradients are then cleared.

        `number` is the step's, from 0: dropout follows from it. Clipping is a factor that the
        optimizer applies as it reads the gradients; the host waits for the device once, after the
        update, to learn the loss. A loss or gradient norm that is not finite, or too large for fp32
        moments, leaves weights and optimizer state as they were. `loss_scale` multiplies the loss
        before the backward pass and is divided out again, for gradients that float16 could not hold
        otherwise. `meanwhile` is called when all work is queued, before that wait.

        With `in_backward` a loss that is not finite still changes nothing, for it is known before;
        a gradient that is not finite leaves its own unit as it was, but units before it have moved.

        Raises `ValueError` if there is nothing to learn from, and with `in_backward` for several
        micro-batches, clipping or a loss scale.
        """
        if self.in_backward is not None and (
            len(batches) > 1 or self.max_grad_norm or loss_scale != 1.0
        ):
            raise ValueError(
                "steps in backward take one micro-batch, unclipped, at a loss scale of 1"
            )
        if not self.model.training:
            self.model.train()
        ranks = ONE_RANK if self.parallel is None else self.parallel.data
        totals = self.objective.totals(self.model, batches, self.settings, ranks)
        sums = self._passes(batches, number, totals, loss_scale)
        norm = usable_norm(self._norm(sums, loss_scale), self.max_grad_norm or math.inf)
        self._update(sums[0], norm, loss_scale)
        counts = (sum(b.tokens for b in batches), sum(b.trained_tokens for b in batches))
        tokens, trained = map(int, host_sums(ranks, *counts))
        outcome = torch.cat((sums[:1], norm.double().unsqueeze(0), sums[1:]))
        if meanwhile is not None:
            meanwhile()
        value, measured, *others = outcome.tolist()
        skipped = not (math.isfinite(value) and math.isfinite(measured))
        torn = skipped and math.isfinite(value) and self.in_backward is not None
        if self.average is not None and not skipped:
            self.average.update()
        told = dict(zip(self.objective.names, others, strict=True))
        return StepResult(value, measured, tokens, trained, skipped, torn, told)

    def _passes(
        self, batches: Sequence[PackedBatch], number: int, totals: StepTotals, loss_scale: float
    ) -> Tensor:
        """The gradients of the micro-batches; their loss and figures (1 + F,), fp64."""
        if self.parallel is not None:
            self.parallel.begin()
        names = len(self.objective.names)
        sums = torch.zeros(1 + names, dtype=torch.float64, device=self.model.device)
        for index, batch in enumerate(batches):
            micro = index if batch.micro is None else batch.micro
            seed = dropout_seed(self.seed, number, micro)
            how = replace(self.settings, dropout_seed=seed, first_row=batch.first_token)
            part = self.objective.share(self.model, batch, how, totals, loss_scale)
            sums[0] += part.loss.detach() / loss_scale
            if part.figures is not None:
                sums[1:] += part.figures
            with self._backward_pass(sums[0], last=index == len(batches) - 1):
                part.loss.backward()
        return sums

    def _backward_pass(self, loss: Tensor, last: bool) -> AbstractContextManager[None]:
        """Around the backward pass of a micro-batch, with the loss so far."""
        if self.in_backward is not None:
            return self.in_backward.stepping(torch.where(torch.isfinite(loss), 1.0, torch.nan))
        if self.parallel is not None and last:
            return self.parallel.last_pass()
        return nullcontext()

    def _norm(self, sums: Tensor, loss_scale: float) -> Tensor:
        """The norm () of all gradients; they and `sums` (1 + F,) are then those of all ranks."""
        if self.in_backward is not None:  # the weights have moved already
            return self.in_backward.grad_norm()
        if self.parallel is not None:
            self.parallel.finish()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.parallel is not None:
            return self.parallel.norm(gradients, sums) / loss_scale
        return global_norm(gradients) / loss_scale

    def _update(self, loss: Tensor, norm: Tensor, loss_scale: float) -> None:
        """Update by the gradients there are, and clear them."""
        if self.in_backward is not None:
            return
        factor = clip_coefficient(norm, self.max_grad_norm or math.inf) / loss_scale
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        # The optimizer leaves out a step whose factor is not finite, on the device.
        self.optimizer.step(grad_scale=torch.where(finite, factor, torch.nan))
        self.optimizer.zero_grad(set_to_none=True)
        if self.parallel is not None:
            self.parallel.gather()
