"""Which tokens are trained: those that cover characters of a loss span."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from engine.tokenization.tokenizer import Offsets
from engine.tokenization.turn_edges import Span


def trained_mask(offsets: Offsets, spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens cover a character of a span.

    Args:
        offsets: [start, end) characters of every token, in order.
        spans: [start, end) characters of what is trained, in order and apart.

    Returns:
        (len(offsets),) bool. Tokenizers that trim white space from offsets give a token of white
        space no characters, only a position: such a token belongs to the text before it.
    """
    characters = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    if not len(spans):
        return np.zeros(len(characters), dtype=np.bool_)
    first, last = np.array(spans, dtype=np.int64).T
    starts, ends = characters[:, 0], characters[:, 1]
    # The last span that begins before a token ends is the only one that it can cover, or follow.
    span = np.searchsorted(first, ends, side="left") - 1
    until = np.where(span >= 0, last[span], -1)
    return np.where(starts == ends, starts <= until, starts < until)


def span_mask(encoding: Encoding, spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """`trained_mask` of an encoding, without a list of all its offsets.

    Only the tokens at the edges of spans are looked at; where a span begins or ends at a character
    that no token covers, all are.
    """
    count = len(encoding)
    mask = np.zeros(count, dtype=np.bool_)
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None or start >= end:
            return trained_mask(encoding.offsets, spans)
        while first > 0 and _characters(encoding, first - 1)[1] > start:
            first -= 1
        while last + 1 < count:
            a, b = _characters(encoding, last + 1)
            if a > end or (a == end and b > a):
                break
            last += 1
        mask[first : last + 1] = True
    return mask


def _characters(encoding: Encoding, token: int) -> Span:
    """[start, end) of a token; that of one which stands for no text is empty."""
    return encoding.token_to_chars(token) or (0, 0)


def token_weights(
    row_weight: float | None,
    count: int,
    weighted: Sequence[tuple[float, npt.NDArray[np.bool_]]] = (),
) -> npt.NDArray[np.float32] | None:
    """How much each of `count` tokens counts, (count,) float32; None where all count alike.

    Args:
        row_weight: the row's factor, None for 1.
        weighted: factors of messages, each with the marks (count,) of their tokens.
    """
    factor = 1.0 if row_weight is None else row_weight
    if factor == 1.0 and not weighted:
        return None
    weights = np.full(count, factor, dtype=np.float32)
    for weight, marks in weighted:
        weights[marks] = factor * weight
    return weights
