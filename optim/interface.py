"""What a training step asks of every optimizer, and who watches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from kernels.runtime.simulation import Scoped


class StepOptimizer(torch.optim.Optimizer):
    """An optimizer whose step scales gradients as it reads them and skips what is not finite."""

    def ordered_params(self) -> list[Tensor]:
        """Every parameter, in the order of the groups."""
        return [param for group in self.param_groups for param in group["params"]]

    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        only: tuple[int, ...] | None = None,
    ) -> None:
        """Update every parameter that has a gradient; or none, if one or the scale is not finite.

        `grad_scale` multiplies the gradients as they are read. With `only`, numbers of parameters
        in the order of the groups, the others are neither looked at nor moved.
        """
        raise NotImplementedError

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite."""
        raise NotImplementedError

    def set_skipped(self, count: int) -> None:
        """Say how many steps were skipped before."""
        raise NotImplementedError

    def parameter_state(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter; `step`, its number of steps, may be a copy."""
        raise NotImplementedError

    def load_parameter_state(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take what `parameter_state` gave for a parameter of the same size and type."""
        for name, mine in self.parameter_state(index).items():
            mine.copy_(tensors[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as named tensors, without copies, for a checkpoint that holds no pickle.

        Hyper-parameters are not in it: they belong to the run's configuration.
        """
        raise NotImplementedError

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises ValueError if it is of other parameters."""
        raise NotImplementedError


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
