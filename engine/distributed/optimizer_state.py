"""The optimizer's state of all ranks, as that of one.

Each rank has the state of the parameters that it owns. A checkpoint holds the state that one rank
alone would have, in the format of one rank: it does not know how many wrote it, and any number can
go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.distributed.data_parallel import DataParallel
from engine.distributed.messages import as_bytes, from_bytes
from optim import StepOptimizer


class OptimizerOfRanks:
    """Gathers and spreads the state of `own`, the optimizer of what this rank owns.

    `whole` is an optimizer of the same kind over stand-ins of all parameters in host memory, and
    `parameters` are the real ones, in the order of its stand-ins.
    """

    def __init__(
        self,
        parallel: DataParallel,
        own: StepOptimizer,
        whole: StepOptimizer,
        parameters: list[Tensor],
    ) -> None:
        self._parallel, self._own, self._whole = parallel, own, whole
        self._parameters = parameters
        numbers = {id(p): number for number, p in enumerate(own.ordered_params())}
        self._own_numbers = {
            index: numbers[id(p)] for index, p in enumerate(parameters) if id(p) in numbers
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """The state that one rank would have; every rank must ask, and every rank has it then."""
        for rank in range(self._parallel.ranks.size):
            for index, tensors in self._exchanged(rank).items():
                self._whole.load_parameter_state(index, tensors)
        self._whole.set_skipped(self._own.skipped_steps)
        return self._whole.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state that one rank had; raises ValueError if it is of other parameters."""
        self._whole.load_state_tensors(tensors)
        self._take_own()

    def _take_own(self) -> None:
        for index, number in self._own_numbers.items():
            self._own.load_parameter_state(number, self._whole.parameter_state(index))
        self._own.set_skipped(self._whole.skipped_steps)

    def _exchanged(self, rank: int) -> dict[int, dict[str, Tensor]]:
        """The state of every parameter that `rank` owns, by the parameter's number."""
        owned = self._parallel.owned_by(rank)
        like = {
            f"{index}.{name}": tensor
            for index, p in enumerate(self._parameters)
            if id(p) in owned
            for name, tensor in self._whole.parameter_state(index).items()
        }
        ranks = self._parallel.ranks
        if ranks.rank == rank:
            mine = {
                f"{index}.{name}": tensor
                for index, number in self._own_numbers.items()
                for name, tensor in self._own.parameter_state(number).items()
            }
            flat = as_bytes({key: mine[key] for key in like})
        else:
            size = sum(t.numel() * t.element_size() for t in like.values())
            flat = torch.empty(size, dtype=torch.uint8)
        ranks.broadcast(flat, rank).wait()
        return _by_parameter(from_bytes(flat, like))

    def spread(self) -> None:
        """Give every rank its part of the state that the first rank has loaded."""
        ranks, count = self._parallel.ranks, len(self._parameters)
        like = {
            f"{index}.{name}": tensor
            for index in range(count)
            for name, tensor in self._whole.parameter_state(index).items()
        }
        flat = as_bytes(like)
        skipped = torch.tensor(self._whole.skipped_steps, dtype=torch.int64)
        for tensor in (flat, skipped):
            ranks.broadcast(tensor, 0).wait()
        if ranks.rank == 0:
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
