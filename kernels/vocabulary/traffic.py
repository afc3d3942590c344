"""Bytes that a rank gives to the collectives of a divided vocabulary."""

from __future__ import annotations


def lookup_bytes(asked: int, answered: int, row_bytes: int, ranks: int) -> int:
    """Of a lookup of `asked` ids on this rank, which answers `answered` of all ranks' ids."""
    return 8 * ranks + 8 * asked + row_bytes * answered


def loss_bytes(
    longest: int, rows: int, width: int, itemsize: int, ranks: int, *, gradient: bool = True
) -> int:
    """Of a loss whose rank with most trained tokens has `longest`, in chunks of `rows` a rank.

    `itemsize` is that of the hidden states (.., `width`); sums are 4 bytes, or 8 beside float64.
    With `gradient` those of the hidden states are summed.
    """
    wide = max(4, itemsize)
    size = max(1, min(rows, longest))
    tokens = -(-longest // size) * size
    given = 8 + tokens * (8 + 4) + tokens * width * itemsize + 4 * ranks * tokens * wide
    return given + (ranks * tokens * width * wide if gradient else 0)


def log_prob_bytes(
    longest: int, rows: int, width: int, itemsize: int, ranks: int, *, gradient: bool = True
) -> int:
    """Of log-probabilities of sequences, as above; with `gradient` of their backward pass too."""
    wide = max(4, itemsize)
    size = max(1, min(rows, longest))
    tokens = -(-longest // size) * size
    given = loss_bytes(longest, rows, width, itemsize, ranks, gradient=False)
    again = tokens * wide + tokens * width * itemsize + ranks * tokens * width * wide
    return given + (again if gradient else 0)
