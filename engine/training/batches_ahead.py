"""Collate and upload the next step's batches while a GPU works.

When the host has queued a step's work it would wait for the device to learn the loss. In that time
it collates the next step's batches and starts their copies, one for each micro-batch, from pinned
memory on a stream of their own; the next step's work waits for the copies on the device. No thread
is needed, so there is none to stop and nothing runs out of order. On a CPU the host is the device
and has no time to spare: batches are collated when their step begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels.runtime.device import has_streams
from kernels.runtime.host_memory import SideUploads
from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch

BatchesOf = Callable[[int], tuple[Sequence[PackedBatch], float]]


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one step, on the host and where the step reads them.

    `epoch` is reached after it.
    """

    host: Sequence[PackedBatch]
    device: Sequence[PackedBatch]
    epoch: float


@dataclass(frozen=True)
class _Ahead:
    """The batches of step `number` on their way, or the error that making them raised."""

    number: int
    host: Sequence[PackedBatch] = ()
    epoch: float = 0.0
    copies: Sequence[tuple[Tensor, Any]] = ()
    error: Exception | None = None


class BatchesAhead:
    """The batches of every step of a run; on a GPU the next step's are under way beforehand.

    `batches_of(number)` gives the micro-batches of a step and the epoch after it, and decides all:
    what is ahead is dropped if another step is asked for.
    """

    def __init__(self, batches_of: BatchesOf, model: Decoder, total_steps: int) -> None:
        self._batches_of, self._total_steps = batches_of, total_steps
        self._uploads = SideUploads(model.device) if has_streams(model.device) else None
        self._with_ids = model.ids_device.type == model.device.type
        self._ahead: _Ahead | None = None

    def take(self, number: int) -> StepBatches:
        """The batches of step `number`. Raises what `batches_of` raises for it."""
        ahead, self._ahead = self._ahead, None
        if self._uploads is None:
            batches, epoch = self._batches_of(number)
            return StepBatches(batches, batches, epoch)
        if ahead is None or ahead.number != number:
            ahead = self._start(self._uploads, number)
        if ahead.error is not None:
            raise ahead.error
        device = [
            batch.divided(self._uploads.wait(*copy), self._with_ids)
            for batch, copy in zip(ahead.host, ahead.copies, strict=True)
        ]
        return StepBatches(ahead.host, device, ahead.epoch)

    def start(self, number: int) -> None:
        """Start on the batches of step `number`, unless that is done or no step of the run.

        An error is raised by `take`, for the step before it is not concerned.
        """
        done = self._ahead is not None and self._ahead.number == number
        if self._uploads is not None and not done and number < self._total_steps:
            self._ahead = self._start(self._uploads, number)

    def _start(self, uploads: SideUploads, number: int) -> _Ahead:
        try:
            host, epoch = self._batches_of(number)
            copies = [uploads.start(batch.joined(self._with_ids)) for batch in host]
        except Exception as error:
            return _Ahead(number, error=error)
        return _Ahead(number, host, epoch, copies)
