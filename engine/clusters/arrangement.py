"""How a run is laid over GPUs: rows, tokens, weights, experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.config.rules import Facts, broken
from engine.config.train_config import TrainConfig
from models.config.model_config import ModelConfig
from models.parallel.token_slices import TokenSlices
from models.parallel.traffic import exchanged_heads

_LONG = 32_768
"""Tokens of a row from which on its context may be split though there are rows enough."""


@dataclass(frozen=True)
class Arrangement:
    """`data` ranks share the rows of a step, `context` ranks each row's tokens.

    With `weights` every layer's weights, and the vocabulary's rows, are divided among all GPUs;
    `experts` GPUs share the experts of each layer.
    """

    data: int
    context: int = 1
    experts: int = 1
    weights: bool = False

    @property
    def size(self) -> int:
        return self.data * self.context

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that make it."""
        return {
            "gpus": self.size,
            "shard": "weights" if self.weights else "none",
            "context_parallel": self.context,
            "expert_parallel": self.experts,
        }

    @property
    def options(self) -> str:
        """The settings that make it, as the command line takes them."""
        parts = []
        if self.weights:
            parts.append("--shard weights")
        if self.context > 1:
            parts.append(f"--context-parallel {self.context}")
        if self.experts > 1:
            parts.append(f"--expert-parallel {self.experts}")
        return " ".join(parts) or "data parallel alone"

    def refused(self, model: ModelConfig, config: TrainConfig) -> str | None:
        """Why a run with these settings cannot be arranged so; None where it can."""
        facts = Facts(experts=model.num_experts, processes=self.size)
        asked = config.model_copy(update=self.settings)
        dividing = ("shard", "context_parallel", "expert_parallel")
        rules = [rule for rule in broken(asked, facts) if rule.setting in dividing]
        return f"{rules[0].text(asked, facts)}." if rules else None


def arrangements(
    model: ModelConfig, config: TrainConfig, size: int, gpus: int
) -> Iterator[Arrangement]:
    """The arrangements of `size` GPUs, `gpus` in a machine, that are worth a plan.

    Experts stay within a machine, whose links their exchanges need, and so does context, but where
    a step has fewer rows than machines. Context is split only where the rows of a step are fewer
    than GPUs, or a row is long. What the run's other settings exclude is left out.
    """
    rows = config.batch_size * config.accumulate * config.sequences_per_example
    experts = [
        e for e in _divisors(gpus) if e == 1 or (model.num_experts and model.num_experts % e == 0)
    ]
    for context in _contexts(model, config.max_length, rows, size, gpus):
        for one in experts:
            for weights in (False, True):
                made = Arrangement(size // context, context, one, weights)
                if made.refused(model, config) is None:
                    yield made


def _contexts(model: ModelConfig, length: int, rows: int, size: int, gpus: int) -> list[int]:
    """Over how many GPUs the tokens of a row may be worth to be split."""
    if rows >= size and length < _LONG:
        return [1]
    shared = [c for c in _divisors(size) if c > 1 and _shared_heads(model, c)]
    within = [c for c in shared if gpus % c == 0]
    busy = [c for c in within if size // c <= rows]
    if not busy:  # no split within a machine gives every GPU a row
        busy = [c for c in shared if size // c <= rows][:1] or shared[-1:]
    return [1, *busy]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _shared_heads(model: ModelConfig, ranks: int) -> bool:
    """Whether ranks can have equal shares of every layer's heads."""
    try:
        for layer in range(model.num_hidden_layers):
            exchanged_heads(model, layer, TokenSlices.of(ranks, 0, ranks))
    except ValueError:
        return False
    return True
