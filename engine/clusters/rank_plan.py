"""Memory and operations of one rank of an arrangement, at rising thrift.

The step of a rank is simulated as that of data parallelism (`engine.memory`), with its part of the
rows and of their tokens. What is divided besides replaces its owners' bytes by the formulas of
`models.memory.layer_gather` and `models.parallel.traffic`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from engine.clusters.arrangement import Arrangement
from engine.config.choices import POLICIES
from engine.config.train_config import TrainConfig
from engine.memory.estimate import MemoryPlan, Simulations, Workload, plan, workload
from engine.memory.options import apply_options, memory_options
from engine.memory.search import changed
from engine.model_sources.load_model import divides_vocabulary
from models.config.model_config import ModelConfig
from models.memory.layer_gather import resident_bytes, share_bytes
from models.parallel.token_slices import TokenSlices
from models.parallel.traffic import exchanged_heads
from models.tensor_names import expected_tensors

_LAYERS = ("NF4 base", "dense base")
_OUTER = ("embeddings", "head")


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

    `layer` and `resident` are the bytes of one layer's weights, whole and as the rank keeps them.
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
        """The plan of one rank. Raises `MemoryPlanError` where the ranks are too many."""
        divided_rows = changed(thrift.config, gpus=arrangement.data)
        work = workload(divided_rows, self.model)
        whole = self._plan(thrift.config, arrangement, work)
        if arrangement.context == 1:
            own = whole
        else:
            lengths = tuple(
                tuple(-(-length // arrangement.context) for length in documents)
                for documents in work.micro_batches
            )
            own = self._plan(thrift.config, arrangement, replace(work, micro_batches=lengths))
        owners = self._owners(own, arrangement)
        tokens = sum(work.micro_batches[0])
        if arrangement.context > 1:
            owners["exchanged heads"] = self._exchange(tokens, arrangement.context)
            # cos and sin of all tokens are on every rank, in fp32 or wider.
            wide = self.model.rotary_dim * max(4, self.dtype.itemsize)
            owners["positions"] = wide * (tokens - tokens // arrangement.context)
        simulated = len(work.micro_batches)
        return RankPlan(
            config=thrift.config,
            arrangement=arrangement,
            memory=sum(owners.values()) + sum(own.reserve.values()),
            owners={name: size for name, size in owners.items() if size},
            host=own.host // (arrangement.size if arrangement.weights else 1),
            flops=whole.flops / arrangement.context,
            passes=work.times(thrift.config) * simulated,
            tokens=tokens // arrangement.context,
            layer=self._layer_bytes(thrift.config),
            sums=own.step.owners.get("trained weights", 0),
            cost=thrift.cost,
        )

    def _plan(self, config: TrainConfig, arrangement: Arrangement, work: Workload) -> MemoryPlan:
        return plan(
            self.model,
            changed(config, gpus=arrangement.size, keep_decoded="none"),
            gpu=True,
            dtype=self.dtype,
            stored=self.stored,
            work=work,
            simulations=self._simulations,
        )

    def _owners(self, own: MemoryPlan, arrangement: Arrangement) -> dict[str, int]:
        """Bytes by owner at the peak of a step, with what is divided."""
        size, owners = arrangement.size, dict(own.step.owners)
        layers, layer = self.model.num_hidden_layers, self._layer_bytes(own.config)
        if arrangement.weights and own.config.every_weight:
            values = owners.get("trained weights", 0)
            owners["trained weights"] = values // size
            # Those of one layer, in fp32 or wider, are summed while the next one's are made.
            wide = 2 * layer * max(4, self.dtype.itemsize) // self.dtype.itemsize
            owners["gradients"] = values // size + wide
            owners["gathered layers"] = 2 * layer
        elif arrangement.weights:
            share = share_bytes(layer, size)
            on_device = resident_bytes([share] * layers, size)
            if "weights" in own.config.offload:
                on_device = 2 * size * share + 2 * share
            for name in _LAYERS:
                owners.pop(name, None)
            owners["divided layers"] = on_device
            if divides_vocabulary(own.config):
                owners |= {name: owners.get(name, 0) // size for name in _OUTER}
        if arrangement.experts > 1:
            for name in _LAYERS:
                moved = owners.get(name, 0) * self._expert_share()
                owners[name] = int(owners.get(name, 0) - moved * (1 - 1 / arrangement.experts))
        return owners

    def _layer_bytes(self, config: TrainConfig) -> int:
        """Bytes of one layer's weights, as they are stored on a GPU."""
        key = f"{config.method} {config.double_quant} {config.dtype}"
        if key not in self._weights:
            short = changed(
                config, gpus=1, offload=(), max_length=64, batch_size=1, keep_decoded="none"
            )
            made = plan(self.model, short, gpu=True, dtype=self.dtype, stored=self.stored)
            total = sum(made.save.owners.get(name, 0) for name in _LAYERS)
            self._weights[key] = total // self.model.num_hidden_layers
        return self._weights[key]

    def _exchange(self, tokens: int, ranks: int) -> int:
        """Bytes of both sides of the largest exchange of heads, there at once."""
        slices = TokenSlices.of(tokens, 0, ranks)
        layers = range(self.model.num_hidden_layers)
        given = max(exchanged_heads(self.model, i, slices, "none").forward for i in layers)
        return 2 * given * self.dtype.itemsize

    def _expert_share(self) -> float:
        """The experts' part of the layers' weights."""
        sizes = {
            name: math.prod(shape)
            for name, shape in expected_tensors(self.model).items()
            if ".layers." in name
        }
        return sum(n for name, n in sizes.items() if ".experts." in name) / sum(sizes.values())
