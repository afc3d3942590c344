"""Rows of a run by number, read one at a time."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config.train_config import TrainConfig
    from engine.data.dataset import RowChoice
    from engine.data.rows import Row
    from engine.data.sources.resolve import RowFile
    from engine.data.streaming.indexed_rows import IndexedRows


@dataclass(frozen=True)
class NumberedRows:
    """Some rows of a data set: where they stand is in memory, eight bytes each, and no more."""

    source: IndexedRows
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, first: int, count: int) -> list[Row]:
        """Rows `first` (from 0) and those after it, at most `count`. Raises `DataError`."""
        from engine.data.rows import Row

        read = (self.source.row(number) for number in self.numbers[first : first + count])
        return [row for row in read if isinstance(row, Row)]


def rows_by_part(config: TrainConfig) -> dict[str, NumberedRows]:
    """The rows of a run to train on and those held out, as `train` and `heldout`.

    Raises `DataError` where a row is bad and the run does not allow that.
    """
    from engine.data.sources.resolve import data_files
    from engine.training.row_set import heldout_choice, trained_choice
    from engine.training.streamed import is_streamed

    files = data_files(config.data, config.query)
    choice = trained_choice(config)
    source = _indexed(files, choice)
    if is_streamed(config, files):
        parts = _streamed(config, source)
    else:
        parts = _divided(config, source, choice)
    if config.eval_data:
        own = heldout_choice(config)
        given = _indexed(data_files(config.eval_data, config.eval_query), own)
        parts["heldout"] = NumberedRows(given, _used(given, own)[0])
    return parts


def _indexed(files: Sequence[RowFile], choice: RowChoice) -> IndexedRows:
    from engine.data.streaming.indexed_rows import IndexedRows
    from engine.storage.cache_folder import cache_folder

    return IndexedRows(files, choice, cache_folder("lines"))


def _used(
    source: IndexedRows, choice: RowChoice, divided: bool = False
) -> tuple[array[int], list[bytes]]:
    """The numbers of the rows that pass and, where they are `divided`, a digest of what each asks.

    Raises `DataError` for a bad row where none may be.
    """
    from engine.data.batches.loader import question_of
    from engine.data.dataset import BadLines, ReadReport
    from engine.data.sources.streams.located import BadLine
    from engine.errors import DataError

    policy, report = BadLines.parse(choice.bad_lines), ReadReport()
    numbers, questions = array("q"), list[bytes]()
    for number in range(source.count):
        row = source.row(number)
        if isinstance(row, BadLine):
            if not policy.skip:
                raise DataError(str(row))
        elif row is not None and choice.passes(row, report):
            numbers.append(number)
            if not divided:
                continue
            text = question_of(row).encode(errors="surrogatepass")
            questions.append(hashlib.blake2b(text, digest_size=16).digest())
    return numbers, questions


def _divided(
    config: TrainConfig, source: IndexedRows, choice: RowChoice
) -> dict[str, NumberedRows]:
    """As `engine.data.batches.loader.split_heldout` divides them."""
    from engine.data.batches.loader import heldout_indices

    numbers, questions = _used(source, choice, config.heldout > 0)
    numbers, questions = numbers[: config.limit_rows], questions[: config.limit_rows]
    chosen = heldout_indices(questions, config.heldout, config.seed)
    parts = {"train": array("q"), "heldout": array("q")}
    for index, number in enumerate(numbers):
        parts["heldout" if index in chosen else "train"].append(number)
    return {name: NumberedRows(source, part) for name, part in parts.items()}


def _streamed(config: TrainConfig, source: IndexedRows) -> dict[str, NumberedRows]:
    """As a stream holds rows out, which looks at none of them; bad ones are among them."""
    from engine.data.streaming.example_stream import heldout_numbers

    count = min(source.count, config.limit_rows or source.count)
    chosen = set(heldout_numbers(count, config.heldout, config.seed).tolist())
    train = array("q", (number for number in range(count) if number not in chosen))
    return {
        "train": NumberedRows(source, train),
        "heldout": NumberedRows(source, array("q", sorted(chosen))),
    }
