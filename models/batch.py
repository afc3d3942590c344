"""What the layers of one step share: the packed batch, and the levels of recompute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.attention import AttentionPlan
from models.kv_cache import KVCache
from models.offload import CheckpointStore, WeightStream

LEVELS = ("none", "selective", "full")
_SITES = 6


def layer_levels(text: str, layers: int) -> tuple[str, ...]:
    """The recompute level of every layer: "full", or "full:20,none" for the first 20 and the rest.

    The last part needs no count. Raises `ValueError` where a level is unknown or the counts are not
    those of the layers.
    """
    levels: list[str] = []
    parts = text.split(",")
    for index, part in enumerate(parts):
        level, _, count = part.strip().partition(":")
        if level not in LEVELS or not (count.isdigit() if count else index == len(parts) - 1):
            raise ValueError(
                f"recompute level {text!r}; expected one of {', '.join(LEVELS)}, or levels with "
                "numbers of layers such as full:20,none"
            )
        levels += [level] * (int(count) if count else max(0, layers - len(levels)))
    if len(levels) != layers:
        raise ValueError(
            f"recompute level {text!r} is for {len(levels)} layers; there are {layers}"
        )
    return tuple(levels)


@dataclass(frozen=True)
class Levers:
    """What a step does to hold less memory, at the price of time. Gradients stay what they were.

    With `mlp_tile_rows` the dense feed-forward part takes that many tokens at a time and keeps
    nothing at any recompute level (`models.tiled_mlp`). With `singly` no more than one decoded
    weight, or one group of those that attention reads together, exists at a time, and attention
    goes over its heads in parts.
    """

    mlp_tile_rows: int | None = None
    singly: bool = False

    @property
    def narrow(self) -> str:
        """The scratch that weights which write a block's output are decoded into."""
        return "wide" if self.singly else "narrow"


@dataclass(frozen=True)
class Batch:
    """What every layer needs to know of a packed batch, computed once.

    cos, sin (N, rotary_dim / 2); `dropout_seed` None means evaluation. With a `cache` the tokens
    are the next ones of one cached sequence. Where there is a list `routed`, each mixture adds its
    rows per expert and its sum of probabilities, both (E,).
    """

    cos: Tensor
    sin: Tensor
    plan: AttentionPlan
    dropout_seed: int | None = None
    cache: KVCache | None = None
    routed: list[tuple[Tensor, Tensor]] | None = None
    levers: Levers = Levers()
    checkpoints: CheckpointStore | None = None
    weights: WeightStream | None = None

    def seed(self, layer: int, site: int) -> int | None:
        """Seed of one dropout site: a pure function of the batch's seed, layer and site.

        Sites 0 and 1 are the mixer's, 2 to 5 the feed-forward part's.
        """
        if self.dropout_seed is None:
            return None
        return (self.dropout_seed * 1_000_003 + layer * _SITES + site) & 0x7FFFFFFFFFFFFFFF
