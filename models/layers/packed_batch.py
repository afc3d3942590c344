"""What the layers of one step share: the packed batch, and the levels of recompute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import AttentionPlan
from models.layers.kv_cache import KVCache
from models.memory.offload import CheckpointStore, WeightStream

LEVELS = ("none", "selective", "full")
_SITES = 6
_SEED_BITS = (1 << 63) - 1


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

    With `mlp_tile_rows` the feed-forward part takes that many tokens at a time and keeps no inner
    activation at any recompute level (`models.layers.token_tiles`). With `singly` no more than one
    decoded weight, or one group of those that attention reads together, exists at a time, and
    attention goes over its heads in parts.
    """

    mlp_tile_rows: int | None = None
    singly: bool = False

    @property
    def narrow(self) -> str:
        """The scratch that weights which write a block's output are decoded into."""
        return "wide" if self.singly else "narrow"


def dropout_seeds(seed: int, layers: int, device: torch.device) -> Tensor:
    """Seeds (layers * 6,) int64 of every dropout site: a pure function of seed, layer and site."""
    sites = torch.arange(layers * _SITES, device=device)
    return sites.add_((seed * 1_000_003) & _SEED_BITS).bitwise_and_(_SEED_BITS)


@dataclass(frozen=True)
class Batch:
    """What every layer needs to know of a packed batch, computed once.

    cos, sin (N, rotary_dim / 2); `dropout_seeds` None means evaluation. With a `cache` the tokens
    are the next ones of one cached sequence. Where there is a list `routed`, each mixture adds its
    rows per expert and its sum of probabilities, both (E,).
    """

    cos: Tensor
    sin: Tensor
    plan: AttentionPlan
    dropout_seeds: Tensor | None = None
    cache: KVCache | None = None
    routed: list[tuple[Tensor, Tensor]] | None = None
    levers: Levers = Levers()
    checkpoints: CheckpointStore | None = None
    weights: WeightStream | None = None

    def seed(self, layer: int, site: int) -> Tensor | None:
        """Seed of one dropout site, int64 without dimensions.

        Sites 0 and 1 are the mixer's, 2 to 5 the feed-forward part's.
        """
        return None if self.dropout_seeds is None else self.dropout_seeds[layer * _SITES + site]
