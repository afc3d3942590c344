"""The optimizer's state of all ranks, as that of one.

Each rank has the state of the parameters that it owns. A checkpoint holds the state that one rank
alone would have, in the format of one rank: it does not know how many wrote it, and any number can
go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.distributed.messages import as_bytes, from_bytes
from kernels.adamw8bit import ROW
from kernels.runtime.ranks import Ranks
from optim import StepOptimizer


@dataclass(frozen=True)
class OwnedState:
    """The state that a rank has of parameter `index`: of `count` elements from `begin` on.

    The parameter has `numel`. What is not all of it is whole blocks of 8-bit states.
    """

    index: int
    begin: int
    count: int
    numel: int

    @property
    def is_whole(self) -> bool:
        return self.count == self.numel

    def of(self, whole: Tensor) -> Tensor:
        """What of a tensor of the whole state is this one's, flat and in the same memory."""
        if self.is_whole or whole.dim() == 0:
            return whole
        flat, end = whole.view(-1), self.begin + self.count
        if flat.numel() == self.numel:
            return flat[self.begin : end]
        first, last = self.begin // ROW, -(-end // ROW)
        if flat.numel() == -(-self.numel // ROW) * ROW:  # codes in rows, the last one padded
            return flat[first * ROW : last * ROW]
        return flat[first:last]


class OptimizerOfRanks:
    """Gathers and spreads the state of `own`, the optimizer of what this rank owns.

    `whole` is an optimizer of the same kind over stand-ins of all parameters in host memory;
    `owned` says what every rank has of them, and `numbers` which parameter of `own` each of this
    rank's is.
    """

    def __init__(
        self,
        ranks: Ranks,
        own: StepOptimizer,
        whole: StepOptimizer,
        owned: Sequence[Sequence[OwnedState]],
        numbers: Mapping[int, int],
    ) -> None:
        self._ranks, self._own, self._whole = ranks, own, whole
        self._owned, self._numbers = owned, numbers

    def state_tensors(self) -> dict[str, Tensor]:
        """The state that one rank would have; every rank must ask, and every rank has it then."""
        for rank, owned in enumerate(self._owned):
            received = _by_parameter(self._exchanged(rank))
            for state in owned:
                self._take(state, received.get(state.index, {}))
        self._whole.set_skipped(self._own.skipped_steps)
        return self._whole.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state that one rank had; raises ValueError if it is of other parameters."""
        self._whole.load_state_tensors(tensors)
        self._take_own()

    def _take(self, state: OwnedState, received: Mapping[str, Tensor]) -> None:
        """Lay what its owner sent into the whole state."""
        if state.is_whole:
            self._whole.load_parameter_state(state.index, received)
            return
        whole = self._whole.parameter_state(state.index)
        for name, tensor in whole.items():
            state.of(tensor).copy_(received[name])
        self._whole.load_parameter_state(state.index, whole)  # a number of steps is a copy

    def _take_own(self) -> None:
        for state in self._owned[self._ranks.rank]:
            number = self._numbers[state.index]
            own = self._own.parameter_state(number)
            whole = self._whole.parameter_state(state.index)
            parts = {n: state.of(tensor).view(own[n].shape) for n, tensor in whole.items()}
            self._own.load_parameter_state(number, parts)
        self._own.set_skipped(self._whole.skipped_steps)

    def _exchanged(self, rank: int) -> dict[str, Tensor]:
        """The state of every parameter that `rank` owns, by the parameter's number and name."""
        like = {
            f"{state.index}.{name}": state.of(tensor)
            for state in self._owned[rank]
            for name, tensor in self._whole.parameter_state(state.index).items()
        }
        if self._ranks.rank == rank:
            mine = {
                f"{state.index}.{name}": tensor
                for state in self._owned[rank]
                for name, tensor in self._own.parameter_state(self._numbers[state.index]).items()
            }
            flat = as_bytes({key: mine[key] for key in like})
        else:
            size = sum(t.numel() * t.element_size() for t in like.values())
            flat = torch.empty(size, dtype=torch.uint8)
        self._ranks.broadcast(flat, rank).wait()
        return from_bytes(flat, like)

    def spread(self) -> None:
        """Give every rank its part of the state that the first rank has loaded."""
        like = {
            f"{index}.{name}": tensor
            for index in range(len(self._whole.ordered_params()))
            for name, tensor in self._whole.parameter_state(index).items()
        }
        flat = as_bytes(like)
        skipped = torch.tensor(self._whole.skipped_steps, dtype=torch.int64)
        for tensor in (flat, skipped):
            self._ranks.broadcast(tensor, 0).wait()
        if self._ranks.rank == 0:
            return
        for index, state in _by_parameter(from_bytes(flat, like)).items():
            self._whole.load_parameter_state(index, state)
        self._whole.set_skipped(int(skipped))
        self._take_own()


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Tensors by the number of their parameter, which their names begin with, and their names."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = tensor
    return states
