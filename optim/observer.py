"""Tell an observer what the optimizer does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from kernels.runtime.simulation import Scoped


class OptimizerObserver:
    """Is told what the optimizers of a thread do; here every method does nothing."""

    def building_state(self) -> AbstractContextManager[None]:
        """Entered while the state of all parameters is allocated."""
        return nullcontext()

    def step_begins(self, gradients: Sequence[Tensor], whole: bool) -> None:
        """A step is next, of all parameters or, in the midst of backward, of some."""

    def step_ends(self, whole: bool) -> None:
        """The step is done."""


_observer: Scoped[OptimizerObserver] = Scoped("optimizer observer", OptimizerObserver())

optimizer_observer = _observer.get
observe_optimizer = _observer.use
"""A context in which an observer is told of this thread's optimizers."""
