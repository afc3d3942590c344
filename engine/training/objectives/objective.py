"""`Objective`: what a training step minimises, and what it reports besides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.runtime.ranks import ONE_RANK, Ranks
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch


@dataclass(frozen=True)
class StepTotals:
    """What the losses of all micro-batches of a step are divided by.

    `items` is their number of trained tokens (or the sum of their weights), or of pairs or answers;
    `tokens` are the trained tokens that a further likelihood term counts, `wanted` and `unwanted`
    the good and bad answers.
    `baseline` () is what all micro-batches measure rewards from, where the objective has that.
    """

    items: float
    tokens: int = 0
    wanted: int = 0
    unwanted: int = 0
    baseline: Tensor | None = None


@dataclass(frozen=True)
class Share:
    """One micro-batch's share of a step: of its loss () and of its figures (F,), both summed up.

    The loss has gradients and is multiplied by the loss scale; the figures are neither.
    """

    loss: Tensor
    figures: Tensor | None = None


class Objective(Protocol):
    """A loss that adds up over the micro-batches of a step."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the figures that a step reports besides its loss."""

    def totals(
        self,
        model: Decoder,
        batches: Sequence[PackedBatch],
        settings: StepSettings,
        ranks: Ranks = ONE_RANK,
    ) -> StepTotals:
        """What a step of these micro-batches of every rank divides by. The host does not wait.

        Raises `ValueError` where there is nothing to learn from.
        """

    def share(
        self,
        model: Decoder,
        batch: PackedBatch,
        settings: StepSettings,
        totals: StepTotals,
        loss_scale: float = 1.0,
    ) -> Share:
        """The share of one micro-batch, with gradients where they are on."""
