"""Examples of an epoch in its order, tokenised when they are needed.

An epoch reads every row as often as its source's weight says, in an order that is a pure function
of (seed, epoch). Rows that are held out are left out of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.data.batches.loader import SHUFFLE, SPLIT, WEIGHTS
from engine.data.dataset import BadLines, ReadReport, RowChoice
from engine.data.example_report import ExampleReport
from engine.data.examples import Example, ExampleBuilder, check_ids
from engine.data.rows import Row
from engine.data.sources.streams.located import BadLine
from engine.data.streaming.indexed_rows import IndexedRows
from engine.data.streaming.order import ShuffledOrder
from engine.errors import DataError

log = logging.getLogger(__name__)

CHUNK = 32
"""Rows that are tokenised together."""

MOST_HELDOUT = 2000
_JUDGED_FROM = 200
"""Rows after which a share of bad ones is judged."""


@dataclass(frozen=True)
class StreamSettings:
    """What decides an epoch.

    Attributes:
        seed: of the order, of what is held out, and of what a weight below 1 leaves out.
        limit_rows: only the first rows, or None.
        heldout: share of the rows that is held out.
        system_prompt: put before rows that have none.
        vocab_size: of the model.
    """

    seed: int
    limit_rows: int | None = None
    heldout: float = 0.0
    system_prompt: str | None = None
    vocab_size: int = 1 << 31


@dataclass(frozen=True)
class ReadExamples:
    """The examples of one row of an epoch; there are none of a row that is not used.

    Attributes:
        position: of the row in the epoch's order, from 0.
        examples: one, or of a document several.
    """

    position: int
    examples: list[Example]


def heldout_numbers(count: int, share: float, seed: int) -> npt.NDArray[np.int64]:
    """The numbers of the rows that a stream of `count` rows holds out, sorted."""
    wanted = 0 if share == 0 or count < 2 else max(1, round(share * count))
    if wanted > MOST_HELDOUT:
        log.info("%d rows are held out: a stream holds out no more", MOST_HELDOUT)
    chosen = np.arange(min(wanted, MOST_HELDOUT, count - 1))
    return np.sort(ShuffledOrder(count, seed, SPLIT, 0).at(chosen))


class ExampleStream:
    """The examples of every epoch of a run.

    Args:
        rows: all rows of the data set.
        choice: which of them are used.
        builder: makes examples of rows.
        settings: what decides an epoch.

    Attributes:
        read, report: what was read and what became of it, so far.
    """

    def __init__(
        self,
        rows: IndexedRows,
        choice: RowChoice,
        builder: ExampleBuilder,
        settings: StreamSettings,
    ) -> None:
        self._rows, self._choice, self._builder, self._settings = rows, choice, builder, settings
        self._policy = BadLines.parse(choice.bad_lines)
        self.read, self.report = ReadReport(), ExampleReport()
        count = min(rows.count, settings.limit_rows or rows.count)
        self.heldout = heldout_numbers(count, settings.heldout, settings.seed)
        self._parts = list(self._weighted(count))
        self._ends = np.cumsum([total for _, _, total, _ in self._parts], dtype=np.int64)
        self.length = int(self._ends[-1])

    @property
    def digest(self) -> str:
        """Of the content of all rows."""
        return self._rows.digest

    def _weighted(self, count: int) -> Iterator[tuple[int, int, int, ShuffledOrder | None]]:
        """First row, rows, rows of an epoch and their choice, of every file."""
        for number, (start, rows, _, weight) in enumerate(self._rows.spans):
            rows = max(0, min(rows, count - start))
            total = max(1, round(rows * weight)) if rows else 0
            chosen = None
            if rows and total % rows:
                chosen = ShuffledOrder(rows, self._settings.seed, WEIGHTS, number)
            yield start, rows, total, chosen

    def numbers(self, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The rows at the positions [start, stop) of an epoch."""
        order = ShuffledOrder(self.length, self._settings.seed, SHUFFLE, epoch)
        virtual = order.at(np.arange(start, stop))
        result = np.empty_like(virtual)
        part = np.searchsorted(self._ends, virtual, side="right")
        for index in np.unique(part).tolist():
            first, rows, total, chosen = self._parts[index]
            inside = (virtual[part == index] - (self._ends[index] - total)) % rows
            result[part == index] = first + (chosen.at(inside) if chosen is not None else inside)
        return result

    def epoch(self, epoch: int, start: int = 0) -> Iterator[ReadExamples]:
        """The rows of an epoch from a position on, with their examples.

        Raises `DataError` for a row that cannot be used, where that is not allowed.
        """
        for first in range(start, self.length, CHUNK):
            last = min(first + CHUNK, self.length)
            numbers = self.numbers(epoch, first, last)
            wanted = ~np.isin(numbers, self.heldout)
            rows = [self._row(n) if use else None for n, use in zip(numbers, wanted, strict=True)]
            made = self.examples([row for row in rows if row is not None])
            for offset, row in enumerate(rows):
                yield ReadExamples(first + offset, next(made) if row is not None else [])

    def heldout_rows(self) -> list[Row]:
        """The rows that are held out and used."""
        return [row for row in map(self._row, self.heldout.tolist()) if row is not None]

    def examples_of(self, rows: Sequence[Row]) -> list[Example]:
        """The examples of some rows, in one list."""
        return [example for examples in self.examples(list(rows)) for example in examples]

    def examples(self, rows: list[Row]) -> Iterator[list[Example]]:
        """The examples of each of some rows."""
        by_source: dict[str, list[Example]] = {}
        made = list(self._builder.build(rows, self.report))
        check_ids(made, self._settings.vocab_size)
        for example in made:
            by_source.setdefault(example.source, []).append(example)
        self._judge()
        for row in rows:
            # A row that a weight repeats may stand twice in a chunk, with all examples under one.
            own = by_source.get(row.source, [])
            count = len(own) // max(1, sum(other.source == row.source for other in rows))
            yield own[:count]

    def _row(self, number: int) -> Row | None:
        """A row that is used; what is not is counted."""
        row = self._rows.row(int(number))
        if row is None:
            return None
        self.read.read += 1
        if isinstance(row, BadLine):
            if not self._policy.skip:
                raise DataError(
                    f"{row} `engine data validate --bad-lines skip` lists every bad row, and "
                    "--bad-lines skip leaves them out."
                )
            self.read.skipped.append(str(row))
            return None
        self.read.count(row)
        if not self._choice.passes(row, self.read):
            return None
        prompt = self._settings.system_prompt
        if prompt is None or not row.messages or row.messages[0]["role"] == "system":
            return row
        return replace(row, messages=[{"role": "system", "content": prompt}, *row.messages])

    def _judge(self) -> None:
        """Raise `DataError` where more rows are bad than may be skipped."""
        bad, read = len(self.read.skipped) + self.report.misfits, self.read.read
        if read >= min(_JUDGED_FROM, self.length // 2) and bad > self._policy.at_most * read:
            first = [*self.read.skipped, *self.report.dropped][0]
            raise DataError(
                f"{bad} of the {read} rows read so far are bad, more than the "
                f"{100 * self._policy.at_most:.4g} % that may be skipped; the first is {first}"
            )
