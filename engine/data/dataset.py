"""Read data sets into `Row`s, counting what is left out.

Files are JSON Lines or one JSON array, plain or gzip-compressed. A broken row stops the load with
its file, line and column, unless the caller allows some to be skipped; nothing is ever left out
without being counted in the `ReadReport`.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.data.rows import Row, is_row, parse_row
from engine.data.rows.fields import RowFault
from engine.data.sources.json_lines import BadLine, Located, read_values
from engine.errors import ConfigError, DataError

log = logging.getLogger(__name__)

DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz")


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
        is_number = share.endswith("%") and number.replace(".", "", 1).isdigit()
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
    """

    read: int = 0
    skipped: list[str] = field(default_factory=list)
    below_rating: int = 0
    unrated: int = 0
    other_category: int = 0
    unused: dict[str, int] = field(default_factory=dict)

    @property
    def filtered(self) -> int:
        """Good rows that a filter left out."""
        return self.below_rating + self.unrated + self.other_category

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


def load_rows(
    paths: str | Path | Sequence[str | Path],
    min_rating: int | None = None,
    category: str | Sequence[str] | None = None,
    bad_lines: str = "fail",
) -> list[Row]:
    """Read every row of the files that passes the filters.

    Args:
        paths: a file, a folder with a `train.jsonl` (or a single data file), or several of them.
        min_rating: keep only rows whose `rating` is at least this; unrated rows do not pass.
        category: keep only rows of this category, or of one of these.
        bad_lines: 'fail', 'skip' or 'skip:5%' (see `BadLines.parse`).

    Raises:
        DataError: a file cannot be read, a row is bad, or no row is left.
        ConfigError: `bad_lines` cannot be understood.
    """
    return read_rows(paths, min_rating, category, bad_lines)[0]


def read_rows(
    paths: str | Path | Sequence[str | Path],
    min_rating: int | None = None,
    category: str | Sequence[str] | None = None,
    bad_lines: str = "fail",
) -> tuple[list[Row], ReadReport]:
    """`load_rows` that also tells what was left out."""
    policy = BadLines.parse(bad_lines)
    categories = {category} if isinstance(category, str) else set(category or ())
    files = data_files(paths)
    rows: list[Row] = []
    report = ReadReport()
    for file in files:
        for item in read_values(file, is_row):
            report.read += 1
            row = _make_row(item) if isinstance(item, Located) else item
            if isinstance(row, BadLine):
                _count_bad(row, policy, report)
                continue
            for key in row.unused:
                report.unused[key] = report.unused.get(key, 0) + 1
            if _passes(row, min_rating, categories, report):
                rows.append(row)
    _refuse_nothing(rows, files, report, policy)
    log_read(report)
    return rows, report


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


def data_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Resolve files and folders to data files.

    Raises:
        DataError: something does not exist, or a folder does not say which file is meant.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        raise DataError("No data file was given; name a .jsonl or .json file, or a folder.")
    return [_data_file(Path(path)) for path in listed]


def _what_it_may_be(name: str) -> str:
    """What to do about a name of no file, by what it looks like."""
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and all(Path(part).exists() for part in parts):
        return f"Several are named one by one: --data {' --data '.join(parts)}."
    if any(sign in name for sign in "*?["):
        return "No file has a name of this pattern; patterns are the shell's, so leave the quotes."
    if re.match(r"https?:/", name):
        return "Data is not fetched from the network: download the file and name it."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.lower().endswith(DATA_SUFFIXES):
        return (
            "Check the path. If it is a data set of the hub, fetch it first: hf download "
            f"{name} --repo-type dataset --local-dir data"
        )
    return "Check the path."


def _data_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(
            f"{path}: there is no such data file; expected JSON Lines or a JSON array, "
            f"plain or compressed with gzip. {_what_it_may_be(str(path))}"
        )
    files = sorted(p for p in path.iterdir() if p.name.lower().endswith(DATA_SUFFIXES))
    train = [p for p in files if p.name.split(".")[0] == "train"]
    chosen = train or files
    if len(chosen) == 1:
        return chosen[0]
    if (path / "config.json").exists():
        raise DataError(
            f"{path}: the folder holds a model and no rows. Name the rows with --data, and the "
            "model with --model."
        )
    names = ", ".join(p.name for p in files[:8]) or "none"
    raise DataError(
        f"{path}: the folder has no single train.jsonl (data files found: {names}). "
        "Name the file to read."
    )


def _make_row(item: Located) -> Row | BadLine:
    try:
        return parse_row(item.value, item.position.file, item.position.line)
    except RowFault as fault:
        return BadLine(item.position, f"found {fault}", "Change the row, or remove it.")


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


def _refuse_nothing(
    rows: list[Row], files: list[Path], report: ReadReport, policy: BadLines
) -> None:
    names = ", ".join(str(file) for file in files)
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
