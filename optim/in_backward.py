"""Optimizer steps during backward: parameters move when their gradients are ready.

    all at once     backward -> every gradient -> step -> gradients freed
    in backward     for each unit of parameters, last layer first: gradients -> step -> freed

The gradients of a whole model never exist together, only those of one unit, a layer for example.
Weights and state come out as from one step over all parameters, to the bit. Source: Lv et al. 2023
(LOMO, arXiv 2306.09782); torchtune and PyTorch's tutorials have it for one parameter at a time.

autograd adds up whatever flows into a parameter before it hands the sum over, once. A parameter
that is used twice, such as an embedding that is the head too, is therefore met when its gradient is
complete, and no part of the graph that backward has yet to reach reads it.

What it cannot do: clip by the global norm, which is known when all has moved, and add gradients up
over several passes. A gradient that is not finite stops the step of its own unit; units before it
have moved by then, and those after it will get what the same bad values make of their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from optim.interface import StepOptimizer


class StepInBackward:
    """Lets backward passes step `optimizer` unit by unit.

    `units` are lists of its parameters whose gradients come together. Raises `ValueError` where a
    parameter of the optimizer is in none of them, in two, or twice in one.
    """

    def __init__(self, optimizer: StepOptimizer, units: Sequence[Sequence[Tensor]]) -> None:
        self._optimizer = optimizer
        self._params = optimizer.ordered_params()
        numbers = {id(param): number for number, param in enumerate(self._params)}
        members = [[numbers.get(id(param), -1) for param in unit] for unit in units]
        if sorted(number for unit in members for number in unit) != list(range(len(numbers))):
            raise ValueError("the units must hold every parameter of the optimizer once")
        self._units = [tuple(sorted(unit)) for unit in members]
        self._unit_of = {number: unit for unit in self._units for number in unit}
        self._open: tuple[int, ...] = ()
        self._arrived = 0
        self._scale: float | Tensor = 1.0
        self._norms: dict[int, Tensor] = {}

    @contextmanager
    def stepping(self, grad_scale: float | Tensor = 1.0) -> Iterator[None]:
        """While entered, the one backward pass that is run moves the parameters.

        `grad_scale`, a number or a tensor () on their device, multiplies the gradients as they are
        read; where it is not finite nothing moves. Nothing here waits for the device. Gradients are
        None afterwards. Raises `ValueError` where there are gradients already.
        """
        if any(param.grad is not None for param in self._params):
            raise ValueError("steps in backward add nothing up: clear the gradients first")
        self._scale, self._open, self._arrived = grad_scale, (), 0
        self._norms.clear()
        skipped = self._optimizer.state_tensors()["skipped_steps"]
        before = skipped.clone()
        handles = [
            param.register_post_accumulate_grad_hook(partial(self._arrive, number))
            for number, param in enumerate(self._params)
        ]
        try:
            yield
            self._step()
        finally:
            for handle in handles:
                handle.remove()
        # However many units were skipped, it was one step.
        skipped.copy_(torch.minimum(skipped, before + 1))

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients of the last pass before `grad_scale`, fp32 ().

        Its squares are summed as `optim.clip.global_norm` sums them, so the bits are the same.
        """
        norms = [norm for _, norm in sorted(self._norms.items())]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total.float()

    def _arrive(self, number: int, _: Tensor) -> None:
        """The gradient of a parameter is complete."""
        unit = self._unit_of[number]
        if unit != self._open:
            # Parts of the unit before are without a gradient: what came of it is all of it.
            self._step()
            self._open = unit
        self._arrived += 1
        if self._arrived == len(unit):
            self._step()

    def _step(self) -> None:
        """Move the parameters of the open unit that have a gradient, and free it."""
        unit, self._open, self._arrived = self._open, (), 0
        ready = [number for number in unit if self._params[number].grad is not None]
        if not ready:
            return
        grads = [grad for number in ready if (grad := self._params[number].grad) is not None]
        norms = torch._foreach_norm(grads, 2, torch.float64)
        self._norms |= dict(zip(ready, norms, strict=True))
        del grads
        self._optimizer.step(grad_scale=self._scale, only=unit)
        for number in ready:
            self._params[number].grad = None
