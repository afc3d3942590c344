"""Read sources as rows of the schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.data.corpus.records import Record, shaped, texts_of
from engine.data.dataset import (
    BadLines,
    ReadReport,
    RowChoice,
    each_row,
    log_read,
    refuse_nothing,
)
from engine.data.origins import Origin, notice_stale
from engine.data.rows import Row
from engine.data.sources.resolve import Names, RowFile, data_files
from engine.data.sources.streams.located import BadLine, Located


@dataclass(frozen=True)
class CorpusRow:
    """A row as it will be written, and as training reads it."""

    record: Record
    row: Row

    @property
    def texts(self) -> tuple[str, str]:
        """What it asks and what it answers."""
        return texts_of(self.row)


@dataclass
class Corpus:
    """Rows of some sources.

    Attributes:
        rows: those that pass the filters, in order.
        report: what was read and left out.
        files: where they come from.
    """

    rows: list[CorpusRow]
    report: ReadReport
    files: list[RowFile] = field(default_factory=list)

    @property
    def origins(self) -> list[Origin]:
        """The files, for the manifest."""
        return [Origin.of_file(file) for file in self.files]

    @property
    def losses(self) -> dict[str, int]:
        """How many rows reading left out, by the reason."""
        report = self.report
        told = {
            "bad": len(report.skipped),
            "rated_too_low": report.below_rating,
            "unrated": report.unrated,
            "other_category": report.other_category,
        }
        return {reason: count for reason, count in told.items() if count}


def read_corpus(
    names: Names,
    choice: RowChoice,
    strict: bool = False,
    on_bad: Callable[[Located | BadLine, BadLine], None] | None = None,
) -> Corpus:
    """Every row of the sources that passes the filters.

    Args:
        names: of the sources.
        choice: which rows, and what becomes of bad ones.
        strict: refuse a source that is stale.
        on_bad: takes every bad row: what was read, and what is wrong with it.

    Raises:
        DataError: a source cannot be read, has a bad row, is stale, or leaves nothing.
    """
    files = data_files(names, choice.query)
    notice_stale(files, strict)
    report = ReadReport()
    rows = [
        CorpusRow(shaped(item.value, row, "auto"), row)
        for item, row in each_row(files, choice, report, on_bad)
    ]
    refuse_nothing(len(rows), files, report, BadLines.parse(choice.bad_lines))
    log_read(report)
    return Corpus(rows, report, files)


def records(rows: Iterable[CorpusRow]) -> list[Record]:
    """The rows as they will be written."""
    return [row.record for row in rows]
