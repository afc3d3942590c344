"""Rows that are read where they lie, by their index."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gathered(NamedTuple):
    """M rows: row m is row rows[m] of `matrix` (N, width), or its row m where `rows` is None."""

    matrix: Tensor
    rows: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor | Gathered) -> Gathered:
        return cls(x) if isinstance(x, Tensor) else x

    def part(self, part: slice) -> Tensor:
        """Some of the rows as a matrix."""
        if self.rows is None:
            return self.matrix[part]
        return self.matrix.index_select(0, self.rows[part])

    def all(self) -> Tensor:
        """All rows as a matrix."""
        return self.matrix if self.rows is None else self.matrix.index_select(0, self.rows)

    def columns(self, widths: list[int]) -> list[Gathered]:
        """Column blocks."""
        return [Gathered(block, self.rows) for block in self.matrix.split(widths, 1)]
