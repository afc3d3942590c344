"""Matrices with spare columns, where adapters join the base product.

Rows begin on a multiple of `kernels.linear.projection.ALIGNED` elements whatever the rank is. On a
CPU, where adapters do not join, nothing is spare and rows lie close together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kernels.linear.projection import Projection, aligned, spare_columns


@dataclass(frozen=True)
class Columns:
    """Column blocks of one matrix in memory of the engine's own, with spare columns behind them.

    Whoever multiplies by the matrix may write adapters' low-rank columns into the spare ones.
    `whole` (N, pitch), parts (N, width_i); without spare columns it is an ordinary matrix.
    """

    whole: Tensor
    parts: tuple[Tensor, ...]
    width: int

    @cached_property
    def matrix(self) -> Tensor:
        """All blocks (N, sum of widths)."""
        return self.parts[0] if len(self.parts) == 1 else self.whole[:, : self.width]

    def spare(self, count: int) -> Tensor:
        """The first `count` spare columns (N, count)."""
        return self.whole[:, self.width : self.width + count]

    def extended(self, count: int) -> Tensor:
        """All blocks and `count` spare columns (N, sum of widths + count)."""
        return self.whole[:, : self.width + count]

    def lends(self, count: int) -> bool:
        """Whether there are that many spare columns."""
        return self.whole.shape[1] >= self.width + count

    def is_matrix(self, x: Tensor) -> bool:
        """Whether `x` is `matrix`: the same elements of the same memory."""
        matrix = self.matrix
        return (
            x.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
            and x.storage_offset() == matrix.storage_offset()
            and x.shape == matrix.shape
            and x.stride() == matrix.stride()
            and x.dtype == matrix.dtype
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)

    def __getitem__(self, index: int) -> Tensor:
        return self.parts[index]


def _columns(rows: int, widths: Sequence[int], spare: int, like: Tensor) -> Columns:
    width = sum(widths)
    whole = like.new_empty(rows, aligned(width + spare) if spare else width)
    if len(widths) == 1:
        return Columns(whole, (whole[:, :width] if spare else whole,), width)
    return Columns(whole, whole[:, :width].split(widths, 1), width)


def output_columns(
    rows: int, projections: Sequence[Projection], like: Tensor, *, spare: bool = True
) -> Columns:
    """Uninitialised outputs (rows, out_i) of a group: column blocks of one matrix.

    With `spare` columns for what backward multiplies along, where adapters join the product.
    """
    widths = [p.out_features for p in projections]
    extra = spare_columns(projections, like.device) if spare else 0
    return _columns(rows, widths, extra, like)


def input_columns(like: Tensor, projections: Sequence[Projection]) -> Columns | None:
    """An uninitialised input of a group, in the shape of `like` (N, in), with spare columns.

    None where no adapter joins the base product: any matrix is then as good.
    """
    extra = spare_columns(projections, like.device)
    return _columns(like.shape[0], [like.shape[1]], extra, like) if extra else None


def gradient_columns(like: Tensor, projections: Sequence[Projection]) -> Columns | None:
    """Memory for the outputs' gradients of a group with spare columns; None as `input_columns`."""
    if not spare_columns(projections, like.device):
        return None
    return output_columns(like.shape[0], projections, like)


def stacked(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The one matrix of which `parts` are consecutive rows (dim 0) or columns (dim 1), if any."""
    first = parts[0]
    if len(parts) == 1:
        return first
    step = first.stride(dim)
    offset = first.storage_offset()
    for part in parts:
        same = (
            part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and part.stride() == first.stride()
            and part.shape[1 - dim] == first.shape[1 - dim]
            and part.storage_offset() == offset
        )
        if not same:
            return None
        offset += part.shape[dim] * step
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride(), first.storage_offset())


def copied(parts: Sequence[Tensor], projections: Sequence[Projection]) -> Columns:
    """The gradients of a group's outputs, copied into a matrix with spare columns."""
    own = output_columns(parts[0].shape[0], projections, parts[0])
    whole = stacked(parts, 1)
    if whole is not None:
        own.matrix.copy_(whole)
    else:
        for target, part in zip(own.parts, parts, strict=True):
            target.copy_(part)
    return own


def matrix_of(x: Tensor | Columns) -> Tensor:
    """The matrix itself."""
    return x.matrix if isinstance(x, Columns) else x


def blocks_of(x: Tensor | Columns) -> Columns | tuple[Tensor]:
    """What takes column blocks gets this of a matrix of one block."""
    return x if isinstance(x, Columns) else (x,)
