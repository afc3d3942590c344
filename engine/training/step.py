"""One optimizer step: accumulate gradients, clip them, update the weights.

The gradients of the micro-batches, each divided by the trained tokens of all of them together, are
summed, clipped by their global norm and handed to the optimizer. Accumulating N micro-batches is
therefore the same arithmetic as one batch of N times the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.training.objectives.objective import Objective
from engine.training.objectives.tokens import TOKENS
from kernels.runtime.random import derived_seed
from models.decoder import Decoder
from models.layers.context import DEFAULT_SETTINGS, StepSettings
from models.layers.packed_batch import PackedBatch
from optim import StepInBackward, StepOptimizer
from optim.clip import clip_coefficient, global_norm


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


def dropout_seed(seed: int, step: int, micro: int) -> int:
    """Key of one micro-batch's dropout: a pure function of the run's seed and its position."""
    return derived_seed(seed, step, micro)


@dataclass(frozen=True)
class TrainingStep:
    """Everything that the steps of a run have in common.

    `max_grad_norm` 0 is no clipping. `objective` is what the steps minimise. With `in_backward`,
    which must be of `optimizer`, weights move while their gradients are made, to the same bits.
    """

    model: Decoder
    optimizer: StepOptimizer
    settings: StepSettings = DEFAULT_SETTINGS
    max_grad_norm: float = 0.0
    seed: int = 0
    objective: Objective = TOKENS
    in_backward: StepInBackward | None = None

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
        update, to learn the loss. A loss or gradient norm that is not finite leaves weights and
        optimizer state as they were. `loss_scale` multiplies the loss before the backward pass and
        is divided out again, for gradients that float16 could not hold otherwise. `meanwhile` is
        called when all work is queued, before that wait.

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
        totals = self.objective.totals(self.model, batches, self.settings)
        loss = torch.zeros((), dtype=torch.float64, device=self.model.device)
        figures = loss.new_zeros(len(self.objective.names))
        for micro, batch in enumerate(batches):
            how = replace(self.settings, dropout_seed=dropout_seed(self.seed, number, micro))
            part = self.objective.share(self.model, batch, how, totals, loss_scale)
            loss += part.loss.detach() / loss_scale
            if part.figures is not None:
                figures += part.figures
            self._backward(part.loss, loss)
        norm = self._update(loss, loss_scale)
        tokens = sum(batch.tokens for batch in batches)
        outcome = torch.cat((torch.stack((loss, norm.double())), figures))
        if meanwhile is not None:
            meanwhile()
        value, measured, *others = outcome.tolist()
        skipped = not (math.isfinite(value) and math.isfinite(measured))
        torn = skipped and math.isfinite(value) and self.in_backward is not None
        trained = sum(batch.trained_tokens for batch in batches)
        told = dict(zip(self.objective.names, others, strict=True))
        return StepResult(value, measured, tokens, trained, skipped, torn, told)

    def _backward(self, part: Tensor, loss: Tensor) -> None:
        """The gradients of one micro-batch's share of the loss so far."""
        if self.in_backward is None:
            part.backward()
        else:
            with self.in_backward.stepping(torch.where(torch.isfinite(loss), 1.0, torch.nan)):
                part.backward()

    def _update(self, loss: Tensor, loss_scale: float) -> Tensor:
        """Update by the gradients there are, clear them, and return their norm, fp32 ()."""
        if self.in_backward is not None:  # the weights have moved already
            return self.in_backward.grad_norm()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = global_norm([p.grad for p in parameters if p.grad is not None]) / loss_scale
        factor = clip_coefficient(norm, self.max_grad_norm or math.inf) / loss_scale
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        # The optimizer leaves out a step whose factor is not finite, on the device.
        self.optimizer.step(grad_scale=torch.where(finite, factor, torch.nan))
        self.optimizer.zero_grad(set_to_none=True)
        return norm
