"""The batches of a run over a stream of examples.

Batches depend on the position in the stream where they begin and on nothing else, so that a run
goes on from any step with the batches that it would have had. Without packing a batch is the next
`batch_size` examples. With it, the examples of some rows (a window) are packed into bins by best
fit, the bins are shuffled, and a batch is `batch_size` of them. A step never reaches over the end
of an epoch; the last one may be smaller.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from engine.data.batches.loader import SHUFFLE, permutation
from engine.data.batches.packing import best_fit
from engine.data.examples import Example
from engine.data.streaming.ahead import Ahead
from engine.data.streaming.example_stream import CHUNK, ExampleStream
from engine.errors import DataError

log = logging.getLogger(__name__)

SAMPLE = 8 * CHUNK
"""Rows that are read before the first step, to know what rows are like."""

_WINDOW_ROWS, _WINDOW_BINS = 1024, 64
_AHEAD = 16
_BINS = 1 << 50
"""Draws of random numbers from here on are those of windows, below it those of epochs."""


@dataclass(frozen=True)
class Cursor:
    """Where a stream goes on: an epoch, a position in it, and bins of its window to leave out."""

    epoch: int = 0
    position: int = 0
    bins: int = 0


@dataclass(frozen=True)
class BatchSettings:
    """How examples become batches; see `engine.data.batches.loader.BatchPlan`."""

    batch_size: int
    accumulate: int
    max_length: int
    packing: bool
    seed: int


@dataclass(frozen=True)
class _Micro:
    """One micro-batch, the cursor after it, its epoch and the part of it that was read."""

    examples: list[Example]
    after: Cursor
    epoch: int
    share: float


class BatchStream:
    """The batches of every step, in the order of the steps.

    Args:
        stream: the examples.
        settings: how they become batches.

    Attributes:
        sample: the examples of the first rows.
        steps_per_epoch: optimizer steps of an epoch: exact where every row becomes one example,
            else estimated from the sample, always alike.
        estimated: whether it is estimated.
    """

    def __init__(self, stream: ExampleStream, settings: BatchSettings) -> None:
        self.stream, self.settings = stream, settings
        rows = min(SAMPLE, stream.length)
        read = [item for _, item in zip(range(rows), stream.epoch(0), strict=False)]
        self.sample = [example for item in read for example in item.examples]
        if not self.sample:
            raise DataError(
                f"None of the first {rows} rows can be trained on: {stream.report.describe()}; "
                f"{len(stream.read.skipped)} are bad and {stream.read.filtered} filtered out."
            )
        groups = len(self.sample)
        if settings.packing:
            groups = len(best_fit([len(e) for e in self.sample], settings.max_length))
        self.estimated = settings.packing or groups != rows
        batches = math.ceil(groups / rows * stream.length / settings.batch_size)
        self.steps_per_epoch = math.ceil(batches / settings.accumulate)
        self._cursors: dict[int, Cursor] = {0: Cursor()}
        self._next = 0
        self._micros: Ahead[_Micro] | None = None
        self._waiting: _Micro | None = None

    @property
    def digest(self) -> str:
        """Of the content of all rows."""
        return self.stream.digest

    def cursor(self, step: int) -> dict[str, int]:
        """Where the stream stands after `step` steps, as JSON values."""
        return asdict(self._cursors[step])

    def go_on(self, step: int, cursor: dict[str, Any] | None) -> None:
        """Go on after `step` steps, from where `cursor` said that the stream stood."""
        self.close()
        self._next = step
        self._cursors = {step: Cursor(**cursor) if cursor else Cursor()}

    def step(self, number: int) -> tuple[list[list[Example]], float]:
        """The examples of a step's micro-batches, counted from 0, and the epoch after it.

        Raises `ValueError` for another step than the next, and `DataError` for a bad row.
        """
        if number != self._next:
            raise ValueError(f"step {number} was asked for, and the next one is {self._next}")
        if self._micros is None:
            self._micros = Ahead(self._all(self._cursors[number]), _AHEAD)
        first = self._waiting or next(self._micros)
        self._waiting = None
        micros = [first]
        while len(micros) < self.settings.accumulate:
            micro = next(self._micros)
            if micro.epoch != first.epoch:
                self._waiting = micro
                break
            micros.append(micro)
        self._next = number + 1
        self._cursors[self._next] = micros[-1].after
        for old in [step for step in self._cursors if step < number - 1]:
            del self._cursors[old]
        last = micros[-1]
        return [micro.examples for micro in micros], last.epoch + last.share

    def close(self) -> None:
        """End the thread that works ahead."""
        if self._micros is not None:
            self._micros.close()
        self._micros = self._waiting = None

    def _all(self, cursor: Cursor) -> Iterator[_Micro]:
        make = self._packed if self.settings.packing else self._plain
        while True:
            number = 0
            for micro in make(cursor):
                number += 1
                yield micro
            if not number and cursor == Cursor(cursor.epoch):
                raise DataError("A whole epoch has no row that can be trained on.")
            cursor = Cursor(cursor.epoch + 1)

    def _plain(self, cursor: Cursor) -> Iterator[_Micro]:
        waiting: list[Example] = []
        epoch, length = cursor.epoch, self.stream.length
        for item in self.stream.epoch(epoch, cursor.position):
            waiting += item.examples
            if len(waiting) >= self.settings.batch_size:
                after = item.position + 1
                yield _Micro(waiting, Cursor(epoch, after), epoch, after / length)
                waiting = []
        if waiting:
            yield _Micro(waiting, Cursor(epoch + 1), epoch, 1.0)

    def _packed(self, cursor: Cursor) -> Iterator[_Micro]:
        size, epoch, length = self.settings.batch_size, cursor.epoch, self.stream.length
        waiting: list[list[Example]] = []
        skip = cursor.bins
        for start, stop, bins in self._windows(cursor):
            for number, group in enumerate(bins, start=1):
                if number <= skip:
                    continue
                waiting.append(group)
                if len(waiting) == size:
                    share = (start + (stop - start) * number / len(bins)) / length
                    after = Cursor(epoch, start, number)
                    yield _Micro(list(chain(*waiting)), after, epoch, share)
                    waiting = []
            skip = 0
        if waiting:
            yield _Micro(list(chain(*waiting)), Cursor(epoch + 1), epoch, 1.0)

    def _windows(self, cursor: Cursor) -> Iterator[tuple[int, int, list[list[Example]]]]:
        """First position, the one after the last, and the bins of each window from a cursor on."""
        settings, start = self.settings, cursor.position
        examples: list[Example] = []
        tokens, most = 0, _WINDOW_BINS * settings.batch_size * settings.max_length
        for item in self.stream.epoch(cursor.epoch, start):
            examples += item.examples
            tokens += sum(map(len, item.examples))
            stop = item.position + 1
            if stop - start == _WINDOW_ROWS or tokens >= most or stop == self.stream.length:
                yield start, stop, self._bins(examples, cursor.epoch, start)
                start, examples, tokens = stop, [], 0

    def _bins(self, examples: list[Example], epoch: int, start: int) -> list[list[Example]]:
        if not examples:
            return []
        bins = best_fit([len(example) for example in examples], self.settings.max_length)
        draw = _BINS + (epoch << 36) + start
        order = permutation(len(bins), self.settings.seed, SHUFFLE, draw)
        return [[examples[index] for index in bins[number]] for number in order.tolist()]
