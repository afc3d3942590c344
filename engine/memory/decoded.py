"""Resolve `--keep-decoded auto`: as many layers as memory has room for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config.train_config import TrainConfig
from engine.memory.estimate import MemoryPlan
from kernels.runtime.device import free_memory as device_free_memory

FREE_SHARE = {"cuda": 0.9, "cpu": 0.6}
"""Share of the free memory that a run may count on: a CPU's is other programs' as well."""


def spare_memory(config: TrainConfig, device: torch.device) -> int | None:
    """What decoded weights may take: the run's budget, or of a GPU, which is the run's alone, most.

    None where neither says: a CPU's memory is other programs' too.
    """
    if config.memory_budget is not None or device.type != "cuda":
        return config.memory_budget
    if not torch.cuda.is_available():
        return None
    return int(device_free_memory(device) * FREE_SHARE["cuda"])


def resolve_decoded(
    config: TrainConfig,
    layers: int,
    limit: int | None,
    planner: Callable[[TrainConfig], MemoryPlan],
) -> tuple[str, MemoryPlan | None]:
    """`config.keep_decoded`, where it says auto as many layers as `limit` bytes have room for.

    Recomputing costs more than decoding, so the checkpointing policy comes first and takes what it
    can; this takes what is left. Without a limit nothing is kept. With the number comes its plan,
    if it was made. `config` must name its policy.
    """
    if config.keep_decoded != "auto":
        return config.keep_decoded, None
    frugal = config.low_memory_decode or "weights" in config.offload
    if limit is None or frugal or config.method != "qlora":
        return "none", None

    def made(count: int) -> MemoryPlan:
        return planner(config.model_copy(update={"keep_decoded": str(count)}))

    one = made(1)
    if one.total > limit:
        return "none", None
    every = made(layers)
    if every.total <= limit:
        return str(layers), every
    per_layer = max(1, one.step.owners["decoded base"])
    count = min(layers - 1, 1 + (limit - one.total) // per_layer)
    while count > 1 and (planned := made(count)).total > limit:
        count -= 1
    return str(count), one if count == 1 else planned
