"""Read a tensor some rows at a time instead of whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Protocol, runtime_checkable

from torch import Tensor

from engine.model_sources.interface.model_source import ModelSource

PART = 1 << 22
"""Elements of a part of a matrix."""


@runtime_checkable
class MakesParts(Protocol):
    """A source that computes what it returns, and can do it for some rows of a tensor alone."""

    def row_parts(self, name: str) -> Iterator[Tensor]:
        """Tensor `name` in parts, in the order of its rows."""


def row_parts(source: ModelSource, name: str) -> Iterator[Tensor]:
    """Tensor `name` of `source` in parts of consecutive rows, of at most `PART` elements each.

    Together they are `source.tensor(name)`, which a source that is no `MakesParts` makes first. A
    part is a view of memory that is released once the next one is asked for.
    """
    if isinstance(source, MakesParts):
        parts = source.row_parts(name)
    else:
        parts = split_rows(source.tensor(name))
    with suppress(StopIteration):
        while True:
            yield next(parts)  # No variable holds it here while whoever asked works on it.
            source.release(name)


def split_rows(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in the parts that `row_parts` has; a vector is one part."""
    return iter(tensor.split(rows_of_part(tuple(tensor.shape))))


def rows_of_part(shape: tuple[int, ...]) -> int:
    """How many rows of a tensor of `shape` are in a part."""
    if len(shape) < 2:
        return max(1, *shape)
    return max(1, PART // max(1, math.prod(shape[1:])))


def outside_layers(name: str) -> bool:
    """Whether `name` is of the embedding, the last norm or the head."""
    return ".layers." not in name
