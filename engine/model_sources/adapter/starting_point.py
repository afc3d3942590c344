"""An earlier adapter as the start of a new one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from engine.model_sources.adapter.adapted_source import AdaptedSource
from engine.model_sources.adapter.contents import Pairs
from engine.model_sources.adapter.fit import module_shapes


@dataclass(frozen=True)
class InitAdapter:
    """An adapter to train on from: `pairs` of one rank and one `scale`, on what `source` offers.

    `fixed` are pairs that are part of the base here, such as that of the head.
    """

    source: AdaptedSource
    pairs: Pairs
    fixed: Pairs
    scale: float

    def scales(self) -> dict[str, float]:
        """The factor of B A by module."""
        return dict.fromkeys(self.pairs, self.scale)

    def target_modules(self) -> list[str]:
        """What `target_modules` says of the adapter that comes of it: endings where they do."""
        adapter, every = self.source.adapter, module_shapes(self.source.config).keys()
        mine = {*self.pairs, *self.fixed}
        embeddings = {m.rpartition(".")[2] for m in adapter.others.embeddings}
        return sorted({*shortest_names(mine, every), *embeddings})


def shortest_names(modules: Collection[str], every: Collection[str]) -> list[str]:
    """`modules` by the endings that all of `every` with them share, the others by whole names."""
    mine = set(modules)
    leaves = {module.rpartition(".")[2] for module in mine}
    whole = {leaf for leaf in leaves if {m for m in every if m.endswith(f".{leaf}")} <= mine}
    return sorted(whole | {m for m in mine if m.rpartition(".")[2] not in whole})
