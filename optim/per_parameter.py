"""Base of the optimizers that update one parameter after the other.

A subclass says which tensors of state a parameter has, and how it moves. This class scales
gradients as they are read, leaves out a step that is not finite, counts steps and hands out the
state as named tensors. The host waits for the device once a step, to know that all is finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from kernels.adamw8bit import may_step
from optim.flat_state import check_loadable, refuse_unusable
from optim.interface import StepOptimizer, optimizer_observer

LAYOUT_VERSION = 1
"""Raised when stored states change their meaning, so that an older file is refused."""


class PerParameter(StepOptimizer):
    """An optimizer with tensors of state for each parameter; a subclass has the maths."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["lr"] < 0.0 or defaults["weight_decay"] < 0.0:
            raise ValueError(
                f"lr and weight_decay must not be negative, got {defaults['lr']} and "
                f"{defaults['weight_decay']}"
            )
        self._states: list[dict[str, Tensor]] | None = None
        self._steps: list[int] = []
        self._skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        super().__init__(params, defaults)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite."""
        return int(self._skipped)

    def new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step, on its device."""
        raise NotImplementedError

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        group: Mapping[str, Any],
        step: int,
    ) -> None:
        """Move `param` and `state` in place by `grad`, in fp32 and scaled; `step` is from 1."""
        raise NotImplementedError

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        only: tuple[int, ...] | None = None,
    ) -> None:
        """Update every parameter that has a gradient; or none, if one or its state is not finite.

        Nor is one updated by scaled gradients longer than `kernels.adamw8bit.LARGEST_NORM`, or with
        a scale that is not finite. `grad_scale` multiplies the gradients as they are read. With
        `only`, numbers of parameters in the order of the groups, the others are neither looked at
        nor moved.
        """
        states, params, whole = self._built(), self.ordered_params(), only is None
        numbers = range(len(params)) if only is None else only
        grads = {i: grad for i in numbers if (grad := params[i].grad) is not None}
        observer = optimizer_observer()
        observer.step_begins(list(grads.values()), whole)
        others = [state for i in grads for state in states[i].values() if state.is_floating_point()]
        if isinstance(grad_scale, Tensor):
            others.append(grad_scale)
        if may_step(list(grads.values()), grad_scale, others):
            groups = [group for group in self.param_groups for _ in group["params"]]
            for index, grad in grads.items():
                self._steps[index] += 1
                wide = grad.to(torch.float32) * grad_scale
                self.update(params[index], wide, states[index], groups[index], self._steps[index])
        else:
            self._skipped += 1
        observer.step_ends(whole)

    def set_skipped(self, count: int) -> None:
        """Say how many steps were skipped before."""
        self._skipped.fill_(count)

    def parameter_state(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter, with a copy of its number of steps."""
        state = self._built()[index]
        return {**state, "step": torch.tensor(self._steps[index], dtype=torch.int64, device="cpu")}

    def load_parameter_state(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take what `parameter_state` gave for a parameter of the same size and type."""
        super().load_parameter_state(index, tensors)
        self._steps[index] = int(tensors["step"])

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as named tensors, without copies, for a checkpoint that holds no pickle.

        Hyper-parameters are not in it: they belong to the run's configuration.
        """
        named = {
            f"{index}.{name}": tensor
            for index, state in enumerate(self._built())
            for name, tensor in state.items()
        }
        return named | {
            "steps": torch.tensor(self._steps, dtype=torch.int64, device="cpu"),
            "skipped_steps": self._skipped,
            "layout": torch.tensor(
                [LAYOUT_VERSION, *(param.numel() for param in self.ordered_params())],
                dtype=torch.int64,
                device="cpu",
            ),
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises ValueError if it is of other parameters."""
        own = self.state_tensors()
        check_loadable("the optimiser state", own, tensors)
        if not torch.equal(own["layout"], tensors["layout"].cpu()):
            raise ValueError("the optimiser state belongs to parameters of other sizes")
        for name, mine in own.items():
            mine.copy_(tensors[name])
        self._steps = [int(step) for step in tensors["steps"]]

    def _built(self) -> list[dict[str, Tensor]]:
        """The state, made at first use, so that a model may still be moved before training."""
        if self._states is None:
            params = self.ordered_params()
            refuse_unusable(params)
            with optimizer_observer().building_state():
                self._states = [
                    self.new_state(param, group)
                    for group in self.param_groups
                    for param in group["params"]
                ]
            self._steps = [0] * len(params)
            for param, state in zip(params, self._states, strict=True):
                self.state[param] = state
        return self._states


def add_update(param: Tensor, update: Tensor, decay: float, alpha: float) -> None:
    """param = decay * param + alpha * update, in fp32, rounded once to the parameter's type."""
    if param.dtype == torch.float32:
        param.mul_(decay).add_(update, alpha=alpha)
    else:
        param.copy_(param.to(torch.float32).mul_(decay).add_(update, alpha=alpha))
