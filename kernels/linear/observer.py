"""Tell an observer the inputs of linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.runtime.simulation import Scoped

if TYPE_CHECKING:
    from kernels.linear.projection import Projection


class InputObserver:
    """Is told what linear maps read in the thread where it observes; here nothing is done."""

    def linear(self, x: Tensor, projections: Sequence[Projection]) -> None:
        """These projections read x (N, in), before any dropout."""

    def expert(self, x: Tensor, expert: int, weight: object) -> None:
        """An expert reads x (M, in); `weight` holds one projection of all experts."""


_NOBODY = InputObserver()
_observer: Scoped[InputObserver] = Scoped("input observer", _NOBODY)

input_observer = _observer.get
observe_inputs = _observer.use
"""A context in which an observer is told of this thread's linear maps."""


def is_observed() -> bool:
    """Whether somebody wants to know."""
    return input_observer() is not _NOBODY
