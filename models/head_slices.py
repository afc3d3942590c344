"""Which tensors, dimensions and indices each attention head owns.

`layer_heads` gives the heads of one layer by the configuration alone; names are those of the graph
(`models.tensor_layout.path_in_file` gives a file's). A head is taken out of the model exactly by
the columns of the output projection that read it. What else only it used then matters no more:

    softmax attention   its rows of q_proj, and the rows of k_proj and v_proj once no query head
                        reads them. q_proj has twice the rows where it also gives an output gate.
    Gated DeltaNet      value head j reads key head j // r, and with
                        m = in_proj_qkv(h) = [q (Hk K) | k (Hk K) | v (Hv V)], z (Hv V), b (Hv),
                        a (Hv), conv1d over each channel of m alone, A_log (Hv), dt_bias (Hv)
                        its rows of v and z, and q and k of a key head without value heads. Cutting
                        also takes channels of conv1d and entries of b, a, A_log and dt_bias; the
                        norm is shared. In Qwen3-Next in_proj_qkvz = [q | k | r v's | r z's] and
                        in_proj_ba = [r b's | r a's], one key head after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.config.model_config import ModelConfig

Indices = dict[str, tuple[int, Tensor]]
"""Tensor name -> the dimension, and the indices in it, that belong to pruned heads."""


@dataclass(frozen=True)
class HeadSlices(ABC):
    """The heads of one layer: head h reads key/value head h // `group_size`.

    `mixer` is the module that holds the layer's tensors, `output` the projection whose columns read
    the heads, `head_dim` columns each.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int

    mixer: ClassVar[str]
    output: ClassVar[str]

    @property
    def group_size(self) -> int:
        """Heads per key/value head."""
        return self.heads // self.kv_heads

    def members(self, group: int) -> range:
        """The heads that read key/value head `group`."""
        return range(group * self.group_size, (group + 1) * self.group_size)

    def groups(self, heads: Iterable[int]) -> set[int]:
        """The key/value heads that `heads` read."""
        return {head // self.group_size for head in heads}

    def unread_groups(self, pruned: set[int]) -> list[int]:
        """The key/value heads that nothing reads once the heads `pruned` are out."""
        return sorted(set(range(self.kv_heads)) - self.groups(set(range(self.heads)) - pruned))

    def module(self, projection: str) -> str:
        """The graph's path of a module of the layer's mixer."""
        return f"model.layers.{self.layer}.{self.mixer}.{projection}"

    def weight(self, projection: str) -> str:
        """The graph's name of a projection's weight."""
        return f"{self.module(projection)}.weight"

    def output_columns(self, heads: Iterable[int]) -> Tensor:
        """The columns of the output projection that read `heads`."""
        return _blocks(sorted(heads), self.head_dim)

    def by_head(self, output: Tensor) -> Tensor:
        """The output projection's weight (H, heads D) as (H, heads, D)."""
        by_head: Tensor = output.unflatten(1, (self.heads, self.head_dim))
        return by_head

    @abstractmethod
    def indices(self, pruned: set[int], cut: bool) -> Indices:
        """What of each tensor belongs to the heads `pruned`: to be put to zero, or to be `cut`."""

    @abstractmethod
    def counts(self, heads: int, kv_heads: int) -> dict[str, int]:
        """Keys of the configuration for layers of so many heads."""


@dataclass(frozen=True)
class AttentionHeads(HeadSlices):
    """Query heads of softmax attention.

    `query_rows` are the rows of q_proj per head. `head_norm` says that q and k are normalised head
    by head.
    """

    query_rows: int
    head_norm: bool = False

    mixer = "self_attn"
    output = "o_proj"

    def indices(self, pruned: set[int], cut: bool) -> Indices:
        """Columns of o_proj; rows of q_proj, and of k_proj and v_proj of groups without heads."""
        result: Indices = {self.weight("o_proj"): (1, self.output_columns(pruned))}
        rows = {"q_proj": _blocks(sorted(pruned), self.query_rows)}
        groups = self.unread_groups(pruned)
        if groups:
            rows |= dict.fromkeys(("k_proj", "v_proj"), _blocks(groups, self.head_dim))
        for projection, index in rows.items():
            for leaf in ("weight", "bias"):
                result[f"{self.module(projection)}.{leaf}"] = (0, index)
        return result

    def counts(self, heads: int, kv_heads: int) -> dict[str, int]:
        """With `head_dim` written out: it is hidden_size / heads no longer."""
        return {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.head_dim,
        }


@dataclass(frozen=True)
class DeltaHeads(HeadSlices):
    """Value heads of Gated DeltaNet; `kv_heads` are the key heads, `head_dim` is V, `key_dim` K."""

    key_dim: int
    joint: bool

    mixer = "linear_attn"
    output = "out_proj"

    def indices(self, pruned: set[int], cut: bool) -> Indices:
        """Columns of out_proj and rows of the large projections; all that has heads if `cut`."""
        heads, groups = sorted(pruned), self.unread_groups(pruned)
        keys = self.kv_heads * self.key_dim
        channels = [_blocks(heads, self.head_dim, 2 * keys)]
        if groups:
            channels += [_blocks(groups, self.key_dim, start) for start in (0, keys)]
        mixed = torch.cat(channels)
        result: Indices = {self.weight("out_proj"): (1, self.output_columns(heads))}
        if self.joint:
            result[self.weight("in_proj_qkvz")] = (0, torch.tensor(self._joint_rows(heads, groups)))
        else:
            result[self.weight("in_proj_qkv")] = (0, mixed)
            result[self.weight("in_proj_z")] = (0, _blocks(heads, self.head_dim))
        if cut:
            result[self.weight("conv1d")] = (0, mixed)
            result |= self._entries(heads)
        return result

    def _entries(self, heads: list[int]) -> Indices:
        """What there is one of for each head."""
        each = torch.tensor(heads)
        result = {self.module(leaf): (0, each) for leaf in ("A_log", "dt_bias")}
        if not self.joint:
            return result | {self.weight(f"in_proj_{part}"): (0, each) for part in "ba"}
        size = self.group_size
        rows = [2 * size * (j // size) + part * size + j % size for j in heads for part in (0, 1)]
        return result | {self.weight("in_proj_ba"): (0, torch.tensor(rows))}

    def _joint_rows(self, heads: list[int], groups: list[int]) -> list[int]:
        """Rows of in_proj_qkvz of value heads, and of key heads."""
        size, key, value = self.group_size, self.key_dim, self.head_dim
        width = 2 * key + 2 * size * value
        rows: list[int] = []
        for j in heads:
            v = width * (j // size) + 2 * key + value * (j % size)
            rows += [*range(v, v + value), *range(v + size * value, v + (size + 1) * value)]
        for group in groups:
            rows += range(width * group, width * group + 2 * key)
        return rows

    def counts(self, heads: int, kv_heads: int) -> dict[str, int]:
        return {"linear_num_value_heads": heads, "linear_num_key_heads": kv_heads}


def layer_heads(config: ModelConfig, layer: int) -> AttentionHeads | DeltaHeads:
    """The heads of layer `layer`: query heads of attention, value heads of Gated DeltaNet."""
    if config.layer_types[layer] == "linear_attention":
        return DeltaHeads(
            layer,
            config.linear_num_value_heads,
            config.linear_num_key_heads,
            config.linear_value_head_dim,
            config.linear_key_head_dim,
            config.linear_joint_projections,
        )
    return AttentionHeads(
        layer,
        config.heads(layer),
        config.kv_heads(layer),
        config.head_dim,
        config.head_dim * (2 if config.attention_gate else 1),
        config.qk_norm,
    )


def _blocks(parts: Sequence[int], size: int, start: int = 0) -> Tensor:
    """Indices of blocks of `size`, counted from `start`."""
    return (start + torch.tensor(parts)[:, None] * size + torch.arange(size)).flatten()
