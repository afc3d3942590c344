"""Read data sets into `Row`s, counting what is left out.

Where rows come from is `engine.data.sources`. A broken row stops the load with its file, line and
column, unless the caller allows some to be skipped; nothing is ever left out without being counted
in the `ReadReport`.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from engine.config.numbers import is_count
from engine.config.row_settings import ChoiceSettings
from engine.data.origins import notice_stale
from engine.data.rows import Row, is_row, parse_row
from engine.data.rows.fields import RowFault
from engine.data.sources.resolve import Names, RowFile, data_files
from engine.data.sources.streams.located import ROW_LIMIT, BadLine, Located, RowLimit
from engine.errors import ConfigError, DataError, listing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadLines:
    """What to do with a row that cannot be used.

    Attributes:
        skip: leave it out and count it, instead of stopping.
        at_most: largest share of bad rows (0 to 1) before the load stops all the same.
    """

    skip: bool = False
    at_most: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "BadLines":
        """Read 'fail', 'skip' or 'skip:5%'.

        Raises:
            ConfigError: the text is none of these.
        """
        if text == "fail":
            return cls()
        if text == "skip":
            return cls(skip=True)
        head, _, share = text.partition(":")
        number = share.removesuffix("%")
        is_number = share.endswith("%") and is_count(number.replace(".", "", 1))
        if head == "skip" and is_number and float(number) <= 100:
            return cls(skip=True, at_most=float(number) / 100)
        raise ConfigError(
            f"'{text}' does not say what to do with bad lines; expected 'fail' (stop at the "
            "first), 'skip' (leave them out and count them), or 'skip:5%' (stop if more than 5 % "
            "are bad)."
        )


@dataclass
class ReadReport:
    """What a load read and left out.

    Attributes:
        read: rows found in the files, good or bad (blank lines do not count).
        skipped: `file:line:column: fault` of each bad row that was left out.
        below_rating: rows left out for a rating under the minimum.
        unrated: rows left out because a minimum was asked for and they have no rating.
        other_category: rows left out because of their category.
        unused: keys that nothing reads, with the number of rows that have them; those of
            messages as `messages[].key`.
        forms: what rows were recognised as, with their number.
    """

    read: int = 0
    skipped: list[str] = field(default_factory=list)
    below_rating: int = 0
    unrated: int = 0
    other_category: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)

    @property
    def filtered(self) -> int:
        """Good rows that a filter left out."""
        return self.below_rating + self.unrated + self.other_category

    def count(self, row: Row) -> None:
        """Count a good row: its form, and the keys of it that nothing reads."""
        self.forms[row.form] = self.forms.get(row.form, 0) + 1
        for key in row.unused:
            self.unused[key] = self.unused.get(key, 0) + 1

    def recognised(self) -> str:
        """What the rows were recognised as, in one line."""
        counts = sorted(self.forms.items(), key=lambda item: -item[1])
        return ", ".join(f"{form} ({count:,} rows)" for form, count in counts)

    def notes(self) -> list[str]:
        """What was read and is not used, a line for each."""
        if not self.unused:
            return []
        ordered = sorted(self.unused.items(), key=lambda item: (-item[1], item[0]))
        counts = [f"'{key}' ({count:,} rows)" for key, count in ordered]
        note = f"Keys of the data that are not used: {', '.join(counts)}."
        if any("[]." in key for key in self.unused):
            note += " Those of messages only reach the chat template."
        return [note]


@dataclass(frozen=True)
class RowChoice:
    """Which rows of a data set are read, and how.

    Attributes:
        min_rating: keep only rows whose `rating` is at least this; unrated rows do not pass.
        category: keep only rows of this category, or of one of these.
        bad_lines: 'fail', 'skip' or 'skip:5%' (see `BadLines.parse`).
        query: which rows of a database.
        columns: field of a row -> column of the data, where it is named otherwise.
        judged: read the `label` of a row: whether its answer is a good one.
        limit: how large a row may be.
    """

    min_rating: int | None = None
    category: str | Sequence[str] | None = None
    bad_lines: str = "fail"
    query: str | None = None
    columns: Mapping[str, str] | None = None
    judged: bool = False
    limit: RowLimit = ROW_LIMIT

    @classmethod
    def of(cls, settings: ChoiceSettings, category: str | Sequence[str] | None = None) -> Self:
        """The choice that a table of settings makes."""
        return cls(
            settings.min_rating,
            category,
            settings.bad_lines,
            settings.query,
            settings.map,
            limit=RowLimit(settings.max_row_bytes),
        )

    def limited(self, file: RowFile) -> RowFile:
        """The file, read with this choice's limit of a row."""
        return file if file.limit == self.limit else replace(file, limit=self.limit)

    @property
    def categories(self) -> set[str]:
        """The categories that pass; empty for all of them."""
        return {self.category} if isinstance(self.category, str) else set(self.category or ())

    def parse(self, item: Located | BadLine, file: RowFile) -> Row | BadLine:
        """A value of `file` as a row, or as what is wrong with it."""
        if isinstance(item, BadLine):
            return item
        try:
            at = item.position
            row = parse_row(item.value, at.file, at.line, self.columns, self.judged)
        except RowFault as fault:
            return BadLine(item.position, f"found {fault}", "Change the row, or remove it.")
        origin = file.origin, file.weight
        return row if origin == row.origin else replace(row, origin=origin)

    def passes(self, row: Row, report: ReadReport) -> bool:
        """Whether a good row passes the filters; one that does not is counted."""
        return _passes(row, self.min_rating, self.categories, report)


def load_rows(
    names: Names,
    min_rating: int | None = None,
    category: str | Sequence[str] | None = None,
    bad_lines: str = "fail",
    query: str | None = None,
) -> list[Row]:
    """Read every row of a data set that passes the filters.

    `names` are what `data_files` takes: a path, or several; the filters are those of `RowChoice`.

    Raises:
        DataError: a file cannot be read, a row is bad, or no row is left.
        ConfigError: `bad_lines` cannot be understood.
    """
    return read_chosen(names, RowChoice(min_rating, category, bad_lines, query))[0]


def read_rows(
    names: Names,
    min_rating: int | None = None,
    category: str | Sequence[str] | None = None,
    bad_lines: str = "fail",
) -> tuple[list[Row], ReadReport]:
    """`load_rows` that also tells what was left out."""
    return read_chosen(names, RowChoice(min_rating, category, bad_lines))


def read_chosen(names: Names, choice: RowChoice) -> tuple[list[Row], ReadReport]:
    """`read_rows` with everything that may be chosen."""
    policy = BadLines.parse(choice.bad_lines)
    files = data_files(names, choice.query)
    notice_stale(files)
    report = ReadReport()
    rows = [row for _, row in each_row(files, choice, report)]
    refuse_nothing(len(rows), files, report, policy)
    log.info("%s: %s", ", ".join(dict.fromkeys(f.name for f in files[:8])), report.recognised())
    log_read(report)
    return rows, report


def each_row(
    files: Sequence[RowFile],
    choice: RowChoice,
    report: ReadReport,
    on_bad: Callable[[Located | BadLine, BadLine], None] | None = None,
) -> Iterator[tuple[Located, Row]]:
    """The rows that pass the filters, each with the value it was read from.

    `report` counts all of them. `on_bad` takes what is wrong with a row, after what was read of it.

    Raises:
        DataError: a row is bad, and `choice` does not say that such are skipped.
    """
    policy = BadLines.parse(choice.bad_lines)
    for file in map(choice.limited, files):
        for item in file.values(is_row):
            report.read += 1
            row = choice.parse(item, file)
            if isinstance(row, BadLine):
                _count_bad(row, policy, report)
                if on_bad is not None:
                    on_bad(item, row)
                continue
            report.count(row)
            if choice.passes(row, report):
                assert isinstance(item, Located)
                yield item, row


def log_read(report: ReadReport) -> None:
    """Warn of rows that were left out, and of what was ignored in the others."""
    skipped, filtered = len(report.skipped), report.filtered
    if skipped or filtered:
        log.warning(
            "Of %d rows, %d bad ones were skipped and %d filtered out; %d are left.",
            report.read, skipped, filtered, report.read - skipped - filtered,
        )  # fmt: skip
    for note in report.notes():
        log.warning("%s", note)


def _passes(row: Row, min_rating: int | None, categories: set[str], report: ReadReport) -> bool:
    if categories and row.category not in categories:
        report.other_category += 1
        return False
    if min_rating is None:
        return True
    if row.rating is None:
        report.unrated += 1
        return False
    if row.rating < min_rating:
        report.below_rating += 1
        return False
    return True


def _count_bad(bad: BadLine, policy: BadLines, report: ReadReport) -> None:
    if not policy.skip:
        raise DataError(f"{bad} `engine data validate --bad-lines skip` lists every bad row.")
    report.skipped.append(str(bad))


def refuse_nothing(
    rows: int, files: Sequence[RowFile], report: ReadReport, policy: BadLines
) -> None:
    """Raise `DataError` where no row is left of `files`, or more are bad than may be skipped."""
    names = listing(file.name for file in files)
    if len(report.skipped) > policy.at_most * report.read:
        raise DataError(
            f"{names}: {len(report.skipped)} of {report.read} rows are bad, more than the "
            f"{100 * policy.at_most:.4g} % that may be skipped; the first is {report.skipped[0]}"
        )
    if rows:
        return
    if report.read == 0:
        raise DataError(f"{names}: the data set is empty; expected at least one row.")
    raise DataError(
        f"{names}: none of {report.read} rows is left: {len(report.skipped)} bad, "
        f"{report.below_rating} rated below the minimum, {report.unrated} without a rating, "
        f"{report.other_category} of another category. Loosen the filters or fix the rows."
    )
