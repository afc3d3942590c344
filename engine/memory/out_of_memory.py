"""Explain an out-of-memory error: planned, taken, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError, gib, is_out_of_memory
from engine.memory.auto_policy import resolve_policy
from engine.memory.estimate import CUDA_CONTEXT, MemoryPlan, Workload, plan
from engine.memory.options import flag
from engine.memory.search import choose
from kernels.runtime.device import free_memory, total_memory
from models.config.model_config import ModelConfig

_SMALLER = 0.95
"""Of a plan that did not hold, what the next may need."""


@dataclass(frozen=True)
class DeviceUse:
    """Bytes of a device: all, free, held by this run's tensors, and by its allocator."""

    total: int
    free: int
    allocated: int
    reserved: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceUse:
        """Of a device as it stands, this run's tensors at their most; of a CPU, the machine's."""
        if device.type == "cuda":
            taken = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
            return cls(total_memory(device), free_memory(device), *taken)
        machine, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
        return cls(machine.total, machine.available, own, own)

    @property
    def of_others(self) -> int:
        """What neither is free nor belongs to this run."""
        return max(0, self.total - self.free - self.reserved - CUDA_CONTEXT)

    @property
    def available(self) -> int:
        """What a run may need in all that others leave to it."""
        return self.total - self.of_others


@contextmanager
def explained(
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    work: Workload,
) -> Iterator[None]:
    """Raise `MemoryPlanError` for a device that runs out of memory inside the block.

    `work` is the largest step of the run of `config`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        use = DeviceUse.of(device)
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
        raise explain(str(error), model, config, device, dtype, work, use) from error


def explain(
    text: str,
    model: ModelConfig,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    work: Workload,
    use: DeviceUse,
) -> MemoryPlanError:
    """One paragraph about an out-of-memory error: planned, taken, and which settings would fit.

    The settings are those that `engine plan` finds for what is there, or for less than was planned
    where that should have been enough.
    """
    policy = resolve_policy(model, config, device, dtype, work, use.available)
    config = config.model_copy(update={"gradient_checkpointing": policy})
    make = partial(plan, model, gpu=device.type == "cuda", dtype=dtype)
    planned = make(config, work=work)
    budget = use.available
    if planned.total <= budget:
        process = planned.reserve.get("process", 0)  # which no setting makes smaller
        budget = process + int(_SMALLER * (planned.total - process))
    if config.memory_budget is not None:
        budget = min(budget, config.memory_budget)
    said = " ".join(text.split()).split(". GPU ")[0].removeprefix("CUDA out of memory. ")
    said = f" ({said[:200].rstrip('.')})" if said else ""
    return MemoryPlanError(
        f"The device {device} ran out of memory{said}. Planned were "
        f"{gib(planned.total)} for the largest step, {planned.tokens} tokens with "
        f"--gradient-checkpointing {policy}. Of {gib(use.total)} this run's tensors took up to "
        f"{gib(use.allocated)}, its allocator holds {gib(use.reserved)} and other programs "
        f"{gib(use.of_others)}. {_proposal(config, budget, make)}"
    )


def _proposal(config: TrainConfig, budget: int, make: partial[MemoryPlan]) -> str:
    try:
        choice = choose(config, budget, make)
    except MemoryPlanError as refusal:
        return str(refusal)
    flags = " ".join(flag(name, after) for name, (_, after) in choice.changes.items())
    return (
        f"Settings that are planned with {gib(choice.plan.total)}: {flags}. A resumed run may "
        "change --offload, --embedding-on and --memory-budget; the others begin a new run."
    )
