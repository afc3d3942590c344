"""Memory of a run: its checkpointing policy, its budget, its errors."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.config.train_config import TrainConfig
from engine.device import resolve_device, resolve_dtype
from engine.training.prepare import Prepared
from models.config.model_config import ModelConfig

if TYPE_CHECKING:
    from engine.memory.budget import MemoryBudget
    from engine.memory.estimate import MemoryPlan

log = logging.getLogger(__name__)


def with_policy(
    config: TrainConfig, prepared: Prepared, device: torch.device, dtype: torch.dtype, process: int
) -> tuple[TrainConfig, MemoryPlan | None]:
    """The settings with the checkpointing policy chosen, where they leave it to the machine.

    With them the plan of the largest step, if the choice needed one. `process` is what a CPU holds
    besides tensors.
    """
    if config.gradient_checkpointing != "auto" and config.keep_decoded != "auto":
        return config, None
    from engine.memory.auto_policy import planned_policy
    from engine.memory.budget import largest_step
    from engine.memory.decoded import resolve_decoded, spare_memory
    from engine.memory.estimate import plan
    from engine.memory.simulate.stored_model import stored_model

    model, work = stored_model(prepared.model_source), largest_step(prepared)
    bare = config.model_copy(update={"keep_decoded": "none"})
    policy, planned = planned_policy(model, bare, device, dtype, work, process=process)
    config = config.model_copy(update={"gradient_checkpointing": policy})
    gpu = device.type == "cuda"
    make = partial(plan, model, gpu=gpu, dtype=dtype, work=work, process=process)
    limit = spare_memory(config, device)
    keep, made = resolve_decoded(config, model.num_hidden_layers, limit, make)
    if keep != "none":
        log.info("the decoded weights of the last %s layers stay in memory", keep)
    return config.model_copy(update={"keep_decoded": keep}), made or planned


def require_space_for(config: TrainConfig, process: int, model: ModelConfig) -> None:
    """Raises `MemoryPlanError` where no row at all would fit the run's memory budget."""
    if config.memory_budget is not None:
        from engine.memory.budget import require_space

        device = resolve_device(config.device)
        require_space(config, model, device, resolve_dtype(config.dtype, device), process)


def budget_of(
    prepared: Prepared,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    process: int,
    planned: MemoryPlan | None,
) -> MemoryBudget | None:
    """The run's memory budget, if it has one; raises `MemoryPlanError` where it cannot hold."""
    if config.memory_budget is None:
        return None
    from engine.memory.budget import MemoryBudget

    return MemoryBudget(prepared, config, device, dtype, process, planned)


def explained_memory(config: TrainConfig, prepared: Prepared) -> AbstractContextManager[None]:
    """Around a run whose device may run out of memory: the error says what would fit."""
    from engine.memory.budget import largest_step
    from engine.memory.out_of_memory import explained
    from engine.memory.simulate.stored_model import stored_model

    device = resolve_device(config.device)
    dtype, model = resolve_dtype(config.dtype, device), stored_model(prepared.model_source)
    return explained(model, config, device, dtype, largest_step(prepared))
