"""Memory and operations of one rank of an arrangement, at rising thrift.

A rank's step is simulated (`engine.memory`), with its part of rows, tokens, weights and experts:
what it holds, computes and sends is counted as for the run itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from engine.clusters.arrangement import Arrangement
from engine.config.choices import POLICIES
from engine.config.train_config import TrainConfig
from engine.memory.estimate import MemoryPlan, Simulations, Workload, plan, workload
from engine.memory.options import apply_options, memory_options
from engine.memory.search import changed
from models.config.model_config import ModelConfig

_LAYERS = ("NF4 base", "dense base")


@dataclass(frozen=True)
class Thrift:
    """Settings of a run that needs less memory, and the share of time that they are said to cost.

    What recomputation costs is in the operations that are counted, and streamed weights are timed.
    """

    config: TrainConfig
    cost: float


def thrifts(config: TrainConfig, gpu: bool, tied: bool) -> Iterator[Thrift]:
    """Settings from the fastest to the most frugal."""
    for policy in POLICIES:
        yield Thrift(changed(config, gradient_checkpointing=policy), 0.0)
    full = changed(config, gradient_checkpointing="full")
    if config.batch_size > 1:
        full = changed(full, batch_size=1, accumulate=config.batch_size * config.accumulate)
        yield Thrift(full, 0.0)
    options = [o for o in memory_options(full, gpu, tied) if o.setting != "optimizer_in_backward"]
    for count in range(1, len(options) + 1):
        taken = options[:count]
        cost = sum(option.cost for option in taken if option.value != "weights")
        yield Thrift(apply_options(full, taken), cost)


@dataclass(frozen=True)
class RankPlan:
    """What a rank needs. `passes` a step, of `tokens` each, which all together are its `flops`.

    `layer` are the bytes of one layer's weights, `sums` those of the gradients that are added up,
    and `sent` what the rank gives to each collective in a step.
    """

    config: TrainConfig
    arrangement: Arrangement
    memory: int
    owners: dict[str, int]
    host: int
    flops: float
    passes: float
    tokens: int
    layer: int
    sums: int
    sent: Mapping[str, int] = field(default_factory=dict)
    cost: float = 0.0

    @property
    def policy(self) -> str:
        return self.config.gradient_checkpointing

    @property
    def divides_trained(self) -> bool:
        """Whether ranks divide the parameters that they train."""
        return self.arrangement.weights and self.config.every_weight

    @property
    def streams(self) -> bool:
        """Whether weights come from the host's memory."""
        return "weights" in self.config.offload


@dataclass(frozen=True)
class RankPlanner:
    """Plans ranks of one model on GPUs."""

    model: ModelConfig
    dtype: torch.dtype
    stored: torch.dtype
    _simulations: Simulations = field(default_factory=Simulations)
    _weights: dict[str, int] = field(default_factory=dict)

    def __call__(self, thrift: Thrift, arrangement: Arrangement) -> RankPlan:
        """The plan of the rank that needs most."""
        config = changed(thrift.config, **arrangement.settings, keep_decoded="none")
        work = workload(config, self.model)
        made = self._plan(config, work)
        return RankPlan(
            config=thrift.config,
            arrangement=arrangement,
            memory=made.total,
            owners={name: size for name, size in made.step.owners.items() if size},
            host=made.host,
            flops=made.flops,
            passes=work.times(config) * len(work.micro_batches),
            tokens=sum(work.micro_batches[0]) // arrangement.context,
            layer=self._layer_bytes(thrift.config),
            sums=made.step.owners.get("trained weights", 0),
            sent=made.sent,
            cost=thrift.cost,
        )

    def _plan(self, config: TrainConfig, work: Workload | None = None) -> MemoryPlan:
        return plan(
            self.model,
            config,
            gpu=True,
            dtype=self.dtype,
            stored=self.stored,
            work=work,
            simulations=self._simulations,
        )

    def _layer_bytes(self, config: TrainConfig) -> int:
        """Bytes of one layer's weights, as they are stored on a GPU."""
        key = f"{config.method} {config.double_quant} {config.dtype}"
        if key not in self._weights:
            short = changed(
                config, gpus=1, offload=(), max_length=64, batch_size=1, keep_decoded="none"
            )
            total = sum(self._plan(short).save.owners.get(name, 0) for name in _LAYERS)
            self._weights[key] = total // self.model.num_hidden_layers
        return self._weights[key]
