"""The heads of Gated DeltaNet layers, a linear attention with rules of its own.

Value head j reads key head j // r, and its output is normalised head by head and gated:

    m = in_proj_qkv(h) = [q (Hk K) | k (Hk K) | v (Hv V)],    conv1d takes each channel of m alone
    z (Hv V), b (Hv), a (Hv),    A_log (Hv), dt_bias (Hv),    out_proj (H, Hv V)

or, in Qwen3-Next, in_proj_qkvz = [q | k | r v's | r z's] and in_proj_ba = [r b's | r a's] for one
key head after the other. Exact removal of value head j is in its columns of out_proj; its rows of v
and z then matter no more, nor q and k of a key head whose value heads are gone. What is cut also
loses its channels of conv1d and its entries of b, a, A_log and dt_bias. The norm is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.errors import ConfigError
from engine.model_sources.interface.model_source import ModelSource
from engine.pruning.head_slices import Heads, Indices, blocks, trunk_of


@dataclass(frozen=True)
class DeltaHeads(Heads):
    """Value heads; `kv_heads` are the key heads, `head_dim` is V and `key_dim` K."""

    key_dim: int
    joint: bool

    room = "linear_attn"
    output = "out_proj"
    known = frozenset(
        {f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a", "qkvz", "ba")}
        | {"conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight"}
    )

    def indices(self, gone: set[int], cut: bool) -> Indices:
        """Columns of out_proj and rows of the large projections; all that has heads if `cut`."""
        heads, groups = sorted(gone), self.dead_groups(gone)
        keys = self.kv_heads * self.key_dim
        channels = [blocks(heads, self.head_dim, 2 * keys)]
        if groups:
            channels += [blocks(groups, self.key_dim, start) for start in (0, keys)]
        mixed = torch.cat(channels)
        found: Indices = {self.name("out_proj"): (1, blocks(heads, self.head_dim))}
        if self.joint:
            found[self.name("in_proj_qkvz")] = (0, torch.tensor(self._joint_rows(heads, groups)))
        else:
            found[self.name("in_proj_qkv")] = (0, mixed)
            found[self.name("in_proj_z")] = (0, blocks(heads, self.head_dim))
        if cut:
            found[self.name("conv1d")] = (0, mixed)
            found |= self._entries(heads)
        return found

    def _entries(self, heads: list[int]) -> Indices:
        """What there is one of for each head."""
        each = torch.tensor(heads)
        found = {self.name(leaf, ""): (0, each) for leaf in ("A_log", "dt_bias")}
        if not self.joint:
            return found | {self.name(f"in_proj_{part}"): (0, each) for part in "ba"}
        size = self.group_size
        rows = [2 * size * (j // size) + part * size + j % size for j in heads for part in (0, 1)]
        return found | {self.name("in_proj_ba"): (0, torch.tensor(rows))}

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


def delta_heads(source: ModelSource) -> list[DeltaHeads]:
    """The heads of every DeltaNet layer. Raises `ConfigError` where there is none."""
    names, config = set(source.names()), source.config
    found = []
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}.linear_attn."
        trunk = trunk_of(names, f"{prefix}out_proj.weight")
        if trunk is None:
            continue
        found.append(
            DeltaHeads(
                layer=layer,
                heads=config.linear_num_value_heads,
                kv_heads=config.linear_num_key_heads,
                head_dim=config.linear_value_head_dim,
                key_dim=config.linear_key_head_dim,
                joint=f"{trunk}{prefix}in_proj_qkvz.weight" in names,
                trunk=trunk,
            )
        )
    if not found:
        raise ConfigError(f"{source.path} has no linear attention; leave out --heads delta.")
    return found
