"""Which rows of a step this process computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config.train_config import TrainConfig
from engine.distributed.deal import (
    DealtRows,
    PassLimits,
    RowCost,
    deal_by_cost,
    deal_in_order,
)
from engine.distributed.mesh import Mesh
from kernels.runtime.ranks import Ranks
from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors


@dataclass(frozen=True)
class Dealer:
    """Deals the rows of every step to `ranks`.

    In order where random masks follow from the token's index in its micro-batch: they are then
    those of one process. In `lockstep` every rank runs as many passes as the one with most.
    """

    ranks: Ranks
    cost: RowCost
    limits: PassLimits
    in_order: bool
    lockstep: bool = False

    @classmethod
    def of(cls, config: TrainConfig, model: ModelConfig, mesh: Mesh) -> Dealer:
        """The dealer of a run of this model."""
        tokens = config.batch_size * config.max_length if config.packing else None
        limits = PassLimits(config.batch_size, tokens)
        return cls(mesh.data, cost_of(model), limits, dealt_in_order(config), mesh.lockstep)

    def share(
        self, step: Sequence[Sequence[int]], length: Callable[[int], int]
    ) -> tuple[list[DealtRows], int]:
        """The rows of this rank, in pieces that are a pass each, and how many it must add to them.

        There may be no rows. What is added are passes without any, for lockstep.
        """
        size = self.ranks.size
        if self.in_order:
            dealt = deal_in_order(step, length, self.cost, size)
        else:
            dealt = deal_by_cost(step, length, self.cost, size, self.limits)
        own = dealt[self.ranks.rank]
        return own, max(map(len, dealt)) - len(own) if self.lockstep else 0


def dealt_in_order(config: TrainConfig) -> bool:
    """Whether random masks follow from where a token stands in its micro-batch."""
    return max(config.lora_dropout, config.hidden_dropout, config.attention_dropout) > 0.0


def cost_of(model: ModelConfig) -> RowCost:
    """The products of a forward pass: with every weight, and of queries with keys.

    Of a mixture's experts a token meets `num_experts_per_tok`.
    """
    share = model.num_experts_per_tok / model.num_experts if model.num_experts else 1.0
    linear = 0.0
    for name, shape in expected_tensors(model).items():
        if ".layers." in name and len(shape) > 1:
            linear += math.prod(shape) * (share if ".experts." in name else 1.0)
    attention = [i for i, kind in enumerate(model.layer_types) if kind != "linear_attention"]
    return RowCost(linear, sum(float(model.heads(i) * model.head_dim) for i in attention))
