"""Arrangements of a run on a cluster, the fastest that fits first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.clusters.arrangement import Arrangement, arrangements
from engine.clusters.hardware import Cluster
from engine.clusters.rank_plan import RankPlan, RankPlanner, Thrift, thrifts
from engine.clusters.step_time import StepTime, step_time
from engine.config.train_config import TrainConfig
from engine.memory.search import changed
from models.config.model_config import ModelConfig

USABLE = 0.95
"""Share of a GPU's memory that a rank may plan with."""


@dataclass(frozen=True)
class Ranked:
    """An arrangement: its plan and time, or why there is none."""

    arrangement: Arrangement
    plan: RankPlan | None = None
    time: StepTime | None = None
    tokens: int = 0
    efficiency: float = 0.0
    why_not: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.time.seconds if self.time else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        facts: dict[str, Any] = {
            "options": self.arrangement.options,
            "data": self.arrangement.data,
            "context": self.arrangement.context,
            "experts": self.arrangement.experts,
            "shard_weights": self.arrangement.weights,
            "fits": self.plan is not None,
        }
        if self.plan is None or self.time is None:
            return facts | {"why_not": self.why_not}
        return facts | {
            "settings": _changed(self.plan.config),
            "memory_bytes": self.plan.memory,
            "owners": self.plan.owners,
            "host_bytes": self.plan.host,
            "bytes_sent": dict(self.plan.sent),
            "compute_seconds": self.time.compute,
            "exposed_seconds": self.time.exposed,
            "seconds_per_step": self.time.seconds,
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "efficiency": self.efficiency,
        }


_SHOWN = (
    "gradient_checkpointing",
    "batch_size",
    "accumulate",
    "offload",
    "embedding_on",
    "head_precision",
    "mlp_tile_tokens",
    "loss_chunk_tokens",
    "low_memory_decode",
)


def _changed(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide memory, where they are not the defaults."""
    values = {name: getattr(config, name) for name in _SHOWN}
    defaults = {name: TrainConfig.model_fields[name].default for name in _SHOWN}
    always = ("gradient_checkpointing", "batch_size", "accumulate")
    return {n: v for n, v in values.items() if n in always or v != defaults[n]}


def rank_arrangements(
    model: ModelConfig,
    config: TrainConfig,
    cluster: Cluster,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> list[Ranked]:
    """All arrangements with their fastest settings that fit, the fastest first.

    Those that do not fit come last, with what their most frugal settings need.
    """
    # Arrangements say what is divided, whatever the settings ask for.
    config = changed(config, shard="none", context_parallel=1, expert_parallel=1)
    planner = RankPlanner(model, dtype, stored)
    steps = list(thrifts(config, True, model.tie_word_embeddings))
    ranked = [
        _ranked(arrangement, steps, planner, cluster, config)
        for arrangement in arrangements(model, config, cluster.size, cluster.gpus)
    ]
    return sorted(ranked, key=lambda one: (one.plan is None, -one.tokens_per_second))


def _ranked(
    arrangement: Arrangement,
    steps: list[Thrift],
    planner: RankPlanner,
    cluster: Cluster,
    config: TrainConfig,
) -> Ranked:
    """The fastest settings of an arrangement that fit a GPU.

    The most frugal ones are planned first: if they do not fit, none do.
    """
    limit, model = int(USABLE * cluster.memory), planner.model
    possible = [step for step in steps if arrangement.refused(model, step.config) is None]
    least = planner(possible[-1], arrangement).memory
    if least > limit:
        short = (least - limit) / 2**30
        return Ranked(arrangement, why_not=f"{least / 2**30:.1f} GiB needed, {short:.1f} too much")
    for step in possible:
        made = planner(step, arrangement)
        if made.memory <= limit:
            time = step_time(made, model, cluster, planner.dtype.itemsize)
            rows = config.batch_size * config.accumulate * config.sequences_per_example
            tokens = rows * config.max_length
            ideal = made.flops * tokens / (made.tokens * made.passes * arrangement.context)
            busy = cluster.flops * cluster.size * time.seconds / arrangement.context
            return Ranked(arrangement, made, time, tokens, ideal / busy)
    raise AssertionError("the most frugal settings fit")
