"""Which tensors, dimensions and indices each attention head owns.

`attention_heads` finds those of layers that hold `self_attn.q_proj`; `engine.pruning.delta_heads`
those of linear attention. A run prunes one kind, so that layers of the other are neither counted
nor scored and a fraction is one of real heads. Sizes are read off the tensors' shapes, with the
size of a head from the configuration: it is not always hidden_size / heads, and `q_proj` has twice
the rows where it also gives an output gate.

Exact removal of a head is in the columns of the output projection that read it. Its rows of
`q_proj` then matter no more, and neither do the rows of `k_proj` and `v_proj` once every query head
that reads them is gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from engine.errors import ConfigError, listing
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.pruning_record import TRUNKS

Indices = dict[str, tuple[int, Tensor]]
"""Tensor name -> the dimension, and the indices in it, that belong to pruned heads."""


@dataclass(frozen=True)
class Heads(ABC):
    """The heads of one layer: head h reads key/value head h // `group_size`.

    `trunk` is what the decoder's names begin with in the file. `room` holds the layer's tensors,
    `output` names the projection whose columns read the heads, `known` are the tensors that heads
    can be cut out of.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    trunk: str = field(default="model.", kw_only=True)

    room: ClassVar[str]
    output: ClassVar[str]
    known: ClassVar[frozenset[str]]

    @property
    def group_size(self) -> int:
        """Heads per key/value head."""
        return self.heads // self.kv_heads

    def group_of(self, head: int) -> int:
        """The key/value head that head `head` reads."""
        return head // self.group_size

    def members(self, group: int) -> range:
        """The heads that read key/value head `group`."""
        return range(group * self.group_size, (group + 1) * self.group_size)

    def groups(self, heads: Iterable[int]) -> set[int]:
        """The key/value heads that `heads` read."""
        return {self.group_of(head) for head in heads}

    def dead_groups(self, gone: set[int]) -> list[int]:
        """The key/value heads that nothing reads once the heads `gone` are pruned."""
        return sorted(set(range(self.kv_heads)) - self.groups(set(range(self.heads)) - gone))

    def name(self, projection: str, leaf: str = "weight") -> str:
        """The tensor's name in the source."""
        place = f"{self.trunk}layers.{self.layer}.{self.room}.{projection}"
        return f"{place}.{leaf}" if leaf else place

    @property
    def uncut(self) -> tuple[str, ...]:
        """Tensors of the layer that hold something of every head and cannot be cut."""
        return ()

    @abstractmethod
    def indices(self, gone: set[int], cut: bool) -> Indices:
        """What of each tensor belongs to the heads `gone`: to be put to zero, or to be `cut`."""

    @abstractmethod
    def counts(self, heads: int, kv_heads: int) -> dict[str, int]:
        """Keys of the configuration for layers of so many heads."""


def blocks(parts: Sequence[int], size: int, start: int = 0) -> Tensor:
    """Indices of blocks of `size`, counted from `start`."""
    return (start + torch.tensor(parts)[:, None] * size + torch.arange(size)).flatten()


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class AttentionHeads(Heads):
    """Query heads of softmax attention.

    `query_rows` are the rows of q_proj per head. `head_norm` says that q and k are normalised head
    by head, `joint_norm` that one norm spans all heads, so that rows of q_proj cannot be changed
    without changing the other heads.
    """

    query_rows: int
    head_norm: bool = False
    joint_norm: bool = False

    room = "self_attn"
    output = "o_proj"
    known = frozenset(
        {f"{name}.{leaf}" for name in _PROJECTIONS for leaf in ("weight", "bias")}
        | {"q_norm.weight", "k_norm.weight"}
    )

    @property
    def uncut(self) -> tuple[str, ...]:
        return (self.name("q_norm"),) if self.joint_norm else ()

    def indices(self, gone: set[int], cut: bool) -> Indices:
        """Columns of o_proj; rows of q_proj, and of k_proj and v_proj of groups without heads."""
        found: Indices = {self.name("o_proj"): (1, blocks(sorted(gone), self.head_dim))}
        if self.joint_norm:
            return found
        rows = {"q_proj": blocks(sorted(gone), self.query_rows)}
        groups = self.dead_groups(gone)
        if groups:
            rows |= dict.fromkeys(("k_proj", "v_proj"), blocks(groups, self.head_dim))
        for projection, index in rows.items():
            for leaf in ("weight", "bias"):
                found[self.name(projection, leaf)] = (0, index)
        return found

    def counts(self, heads: int, kv_heads: int) -> dict[str, int]:
        """With `head_dim` written out: it is hidden_size / heads no longer."""
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.head_dim,
        }


def attention_heads(source: ModelSource) -> list[AttentionHeads]:
    """The heads of every layer that has attention. Raises `ConfigError` where no layer has."""
    names = set(source.names())
    dim = source.config.head_dim
    found = []
    for layer in range(source.config.num_hidden_layers):
        trunk = trunk_of(names, f"layers.{layer}.self_attn.q_proj.weight")
        if trunk is None:
            continue
        prefix = f"{trunk}layers.{layer}.self_attn."
        heads = source.shape(f"{prefix}o_proj.weight")[1] // dim
        norm = f"{prefix}q_norm.weight"
        normed = norm in names
        joint = normed and source.shape(norm) != (dim,)
        found.append(
            AttentionHeads(
                layer=layer,
                heads=heads,
                kv_heads=source.shape(f"{prefix}k_proj.weight")[0] // dim,
                head_dim=dim,
                query_rows=source.shape(f"{prefix}q_proj.weight")[0] // heads,
                head_norm=normed and not joint,
                joint_norm=joint,
                trunk=trunk,
            )
        )
    if not found:
        raise ConfigError(f"{source.path} has no layer with attention heads to prune.")
    return found


def trunk_of(names: set[str], rest: str) -> str | None:
    """What stands before `rest` in the decoder's name of a tensor; None if it has none such."""
    return next((trunk for trunk in TRUNKS if trunk + rest in names), None)


def refuse_uncut(source: ModelSource, layers: Sequence[Heads]) -> None:
    """Raise `ConfigError` for tensors that hold something per head and cannot be cut.

    Removing rows and columns would leave them with the wrong size.
    """
    odd = [name for heads in layers for name in heads.uncut]
    known = {heads.name(leaf, "") for heads in layers for leaf in heads.known}
    rooms = tuple(heads.name("", "") for heads in layers)
    odd += [n for n in source.names() if n.startswith(rooms) and n not in known]
    if odd:
        raise ConfigError(
            f"{source.path}: heads cannot be cut out of {listing(odd)}. Use --mode zero, which "
            "keeps every shape."
        )
