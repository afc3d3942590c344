"""What a trial answers of an operation that may be missing here."""

from __future__ import annotations

from torch import Tensor


def refusal(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def worst_error(value: Tensor, exact: Tensor) -> float:
    """The largest error of `value`, on any device, over the largest value of `exact` in fp64."""
    return float((value.cpu().double() - exact).abs().max() / exact.abs().max())
