"""How a run is laid over GPUs: rows, tokens, weights, experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config.train_config import TrainConfig
from models.config.model_config import ModelConfig
from models.parallel.token_slices import TokenSlices
from models.parallel.traffic import exchanged_heads

_LONG = 32_768
"""Tokens of a row from which on its context may be split though there are rows enough."""


@dataclass(frozen=True)
class Arrangement:
    """`data` ranks share the rows of a step, `context` ranks each row's tokens.

    With `weights` every layer's frozen weights are divided among all GPUs; `experts` GPUs share the
    experts of each layer.
    """

    data: int
    context: int = 1
    experts: int = 1
    weights: bool = False

    @property
    def size(self) -> int:
        return self.data * self.context

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


def arrangements(
    model: ModelConfig, config: TrainConfig, size: int, gpus: int
) -> Iterator[Arrangement]:
    """The arrangements of `size` GPUs, `gpus` in a machine, that are worth a plan.

    Context and experts stay within a machine, whose links their exchanges need. Context is split
    only where the rows of a step are fewer than GPUs, or a row is long.
    """
    rows = config.batch_size * config.accumulate
    contexts = [1]
    if rows < size or config.max_length >= _LONG:
        contexts += [
            c for c in _divisors(gpus) if c > 1 and size // c <= rows and _shared_heads(model, c)
        ]
    experts = [e for e in _divisors(gpus) if model.num_experts and model.num_experts % e == 0]
    for context in contexts:
        data = size // context
        yield Arrangement(data, context)
        if not config.every_weight:
            yield Arrangement(data, context, weights=True)
        if context == 1:
            yield from (Arrangement(data, experts=e) for e in experts if e > 1)


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
