"""The categories and sources of held-out rows, as names of figures."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.data.examples import Example
from engine.data.rows import Row

log = logging.getLogger(__name__)

CATEGORY, SOURCE = "category/", "source/"
_MOST = 100
"""Parts of a kind whose figures somebody would still read."""


@dataclass(frozen=True)
class PartNames:
    """Which figures an example counts for, beside those of all examples.

    `categories` is by an example's `source`, and `files` by the file in it.
    """

    categories: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def of(self, example: Example) -> tuple[str, ...]:
        """The names of the parts that an example belongs to."""
        category = self.categories.get(example.source)
        file = self.files.get(file_of(example))
        parts = ((CATEGORY, category), (SOURCE, file))
        return tuple(prefix + name for prefix, name in parts if name is not None)

    def names(self, examples: Iterable[Example]) -> set[str]:
        """The names of all parts that some examples have."""
        return {name for example in examples for name in self.of(example)}


def categories_of(rows: Iterable[Row]) -> dict[str, str]:
    """The categories of rows, by where they stand."""
    return {row.source: row.category for row in rows if row.category is not None}


def parts_of(examples: Sequence[Example], categories: Mapping[str, str]) -> PartNames:
    """The parts of some examples: categories and files, each where there are several.

    More of a kind than anybody would read are left out, with a line in the log.
    """
    own = {e.source: categories[e.source] for e in examples if e.source in categories}
    some_without = len(own) < len({example.source for example in examples})
    if len(set(own.values())) + bool(own and some_without) < 2:
        own = {}
    files = _short_names(dict.fromkeys(file_of(example) for example in examples))
    if len(files) < 2:
        files = {}
    if len(set(own.values())) > _MOST:
        log.info("%d categories: their losses are not told one by one", len(set(own.values())))
        own = {}
    if len(files) > _MOST:
        log.info("%d held-out sources: their losses are not told one by one", len(files))
        files = {}
    return PartNames(own, files)


def file_of(example: Example) -> str:
    """The file, or what else stands before the number, in an example's source."""
    return example.source.rpartition(":")[0]


def _short_names(files: Iterable[str]) -> dict[str, str]:
    """The last part of every path, or the whole path where two end alike."""
    listed = list(files)
    ends = [Path(file).name or file for file in listed]
    return {
        file: end if ends.count(end) == 1 else file for file, end in zip(listed, ends, strict=True)
    }
