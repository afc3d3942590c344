"""Enforce --memory-budget: check before loading, limit while training, compare afterwards.

Before rows are read, one row of 8 tokens is planned, and a budget that cannot hold it is refused.
Before weights are read, so is the largest step that the run's rows can make. On a CUDA GPU the
allocator gets the budget as its limit. On a CPU the budget is for the process and its tensors:
every step that is larger than those before it, and the first two, run under a `MemoryMeter` that
stops the run at what the process leaves; after every step the process itself is looked at, and more
resident memory than the budget ends the run after a checkpoint. At the end the measured peak stands
beside the plan of the largest step seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError, gib
from engine.memory.estimate import CUDA_CONTEXT, MemoryPlan, Workload, plan, step_of
from engine.memory.process import forget_peak, peak_resident, refusal
from engine.memory.search import least_step, require_any
from engine.memory.simulate.meter import MemoryMeter
from engine.memory.simulate.observer import observed, track_model, track_parallel
from engine.memory.simulate.stored_model import stored_model
from kernels.runtime.device import total_memory

if TYPE_CHECKING:
    from engine.training.prepare import Prepared
    from engine.training.processes.together import Optimization
    from models.config.model_config import ModelConfig
    from models.decoder import Decoder
    from models.layers.packed_batch import PackedBatch
    from models.weight_average import WeightAverage

log = logging.getLogger(__name__)

TOLERANCE = 0.05
_ALWAYS = 2


def require_space(
    config: TrainConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    process: int,
) -> None:
    """Raise `MemoryPlanError` where the budget cannot hold one row of 8 tokens.

    `config.memory_budget` must be set; `process` is what a CPU holds besides tensors. A budget that
    holds costs one plan, another a few more, and one below the process none.
    """
    budget = config.memory_budget
    assert budget is not None
    if device.type == "cpu" and budget <= process:
        raise MemoryPlanError(refusal(budget, process))

    def make(settings: TrainConfig) -> MemoryPlan:
        named = settings.dtype if settings.dtype != config.dtype else None
        own = dtype if named is None else getattr(torch, named)
        gpu = device.type == "cuda"
        return plan(model, settings, gpu=gpu, dtype=own, process=process)

    least = least_step(config)
    made = make(least)
    if made.total <= budget:
        return
    require_any(config, budget, lambda other: made if other == least else make(other))
    raise MemoryPlanError(
        f"This run needs {gib(made.total)} for one row of {least.max_length} tokens with full "
        f"recomputation, {gib(made.total - budget)} more than the memory budget of {gib(budget)}. "
        "`engine plan` with the same settings finds some that fit."
    )


class MemoryBudget:
    """Holds one run to `config.memory_budget` bytes."""

    def __init__(
        self,
        prepared: Prepared,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        process: int,
        planned: MemoryPlan | None = None,
    ) -> None:
        """Plan the run and limit the GPU. Raises `MemoryPlanError` where the budget is too small.

        `config` is the run's with its checkpointing policy chosen; its `memory_budget` must be set.
        `process` is what a CPU holds besides tensors, and `planned` the plan of the largest step,
        where that is made already.
        """
        self._prepared, self._config = prepared, config
        self._device, self._dtype, self._process = device, dtype, process
        budget = config.memory_budget
        assert budget is not None
        self._budget = budget
        self.planned = planned or self._plan(config, largest_step(prepared))
        if self.planned.total > budget:
            raise MemoryPlanError(self._refusal())
        own = f", {gib(process)} of them the process itself" if device.type == "cpu" else ""
        log.info("Planned peak %s of %s%s", gib(self.planned.total), gib(budget), own)
        if device.type == "cuda":
            share = min(1.0, (budget - CUDA_CONTEXT) / total_memory(device))
            torch.cuda.set_per_process_memory_fraction(share, device)
        self._most = 0
        self._watched = 0
        self._measured = 0
        self._largest: Sequence[PackedBatch] = ()
        self._resident = 0
        if device.type == "cpu":
            forget_peak()

    def _plan(
        self, config: TrainConfig, work: Workload | Sequence[PackedBatch] | None
    ) -> MemoryPlan:
        return plan(
            stored_model(self._prepared.model_source),
            config,
            gpu=self._device.type == "cuda",
            dtype=self._dtype,
            work=work,
            process=self._process,
        )

    def _refusal(self) -> str:
        step, config = self.planned, self._config
        gradients = ""
        if config.every_weight and not config.optimizer_in_backward:
            gradients = (
                ", or let gradients be freed as they come with --optimizer-in-backward "
                "--max-grad-norm 0 --accumulate 1"
            )
        return (
            f"This run needs {gib(step.total)} for its largest step of {step.tokens} tokens, "
            f"{gib(step.total - self._budget)} more than the memory budget of "
            f"{gib(self._budget)}. `engine plan` with the same settings finds some that fit. Lower "
            f"--batch-size or --max-length, or take --gradient-checkpointing full{gradients}."
        )

    @contextmanager
    def watch(
        self,
        model: Decoder,
        optimization: Optimization,
        average: WeightAverage | None,
        batches: Sequence[PackedBatch],
    ) -> Iterator[None]:
        """Around one step. Raises `MemoryPlanError` from the op that goes over the budget."""
        tokens = sum(batch.tokens for batch in batches)
        larger = tokens > self._most
        if larger:
            self._most, self._largest = tokens, batches
        self._watched += 1
        if self._device.type == "cuda" or not (larger or self._watched <= _ALWAYS):
            yield
            return
        meter = MemoryMeter(limit=self._budget - self._process)
        track_model(meter, model)
        meter.track("batch", [t for b in batches for t in b.tensors()])
        # Made now if this is the first step, so that it holds what every later one does.
        meter.track("optimiser", optimization.optimizer.state_tensors().values())
        track_parallel(meter, optimization.parallel)
        if average is not None:
            meter.track("moving average", average.state_tensors().values())
        with observed(meter), meter:
            yield
        self._measured = max(self._measured, meter.peak.bytes)

    def overrun(self) -> str | None:
        """What ends the run between two steps: on a CPU, more resident memory than the budget."""
        if self._device.type != "cpu":
            return None
        self._resident = max(self._resident, peak_resident())
        if self._resident <= self._budget:
            return None
        more = -(-self._resident * 11 // 10 // 2**20)
        return (
            f"This process held {gib(self._resident)} of resident memory, more than the memory "
            f"budget of {gib(self._budget)}; {gib(self.planned.total)} were planned, and the rest "
            f"is its allocator's or another part's of the program. Give --memory-budget {more}MiB, "
            "or lower --batch-size or --max-length."
        )

    def figures(self) -> dict[str, Any]:
        """Planned and measured peaks for the summary; warns where they are far apart."""
        config = self._config
        seen = self._plan(config, self._largest) if self._largest else self.planned
        expected = seen.step.bytes
        measured = self._measured
        if self._device.type == "cuda":
            expected = max(expected, seen.load.bytes)
            measured = int(torch.cuda.max_memory_allocated(self._device))
        if measured and abs(expected - measured) > TOLERANCE * measured:
            log.warning(
                "The plan was wrong by %.1f %%: %s planned for the largest step, %s measured. "
                "Please report it with this run's config.yaml.",
                100 * (expected - measured) / measured, gib(expected), gib(measured),
            )  # fmt: skip
        return {
            "memory_budget_bytes": self._budget,
            "planned_limit_bytes": self.planned.total,
            "planned_peak_bytes": expected,
            "measured_peak_bytes": measured,
            **({"resident_peak_bytes": self._resident} if self._device.type == "cpu" else {}),
        }


def largest_step(prepared: Prepared) -> Workload:
    """The most tokens that a step of this run can have, from the lengths of its rows."""
    return step_of(prepared.config, prepared.lengths, prepared.model_source.config)
