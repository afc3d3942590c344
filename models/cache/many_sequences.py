"""Keys, values and states of many sequences that are decoded together.

A running sequence has a row of a band. A band holds rows of one capacity, a power of two, so one
attention call serves all of them and none is padded to more than twice its length. A sequence that
fills its row moves to the next band: its keys are copied as often as a growing list's. Rows that
are in use come first, so a batch reads views. A prompt is read into a `KVCache` of its own, which
joins a band when it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention.cached import batched_attention
from models.cache.one_sequence import DeltaState, KVCache
from models.config.model_config import ModelConfig

LEAST_ROW = 64
"""Tokens of the smallest row."""


def row_capacity(tokens: int) -> int:
    """Tokens that the row of a sequence of `tokens` has."""
    return max(LEAST_ROW, 1 << (tokens - 1).bit_length())


@dataclass(eq=False)
class CachedSequence:
    """A running sequence: `length` tokens, in the row `row` of the band `capacity`."""

    length: int
    capacity: int
    row: int = 0


class Band:
    """Rows of one capacity: (2, rows, kv_heads, capacity, head_dim) per attention layer."""

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.capacity, self.dtype, self.device = config, capacity, dtype, device
        self.members: list[CachedSequence] = []
        self.stores: list[Tensor] = []
        self.states: dict[int, DeltaState] = {}
        self.rows = 0

    def add(self, sequence: CachedSequence) -> None:
        """Give `sequence` the next row, whose contents are left to the caller."""
        if len(self.members) == self.rows:
            self._grow(max(1, 2 * self.rows))
        sequence.row, sequence.capacity = len(self.members), self.capacity
        self.members.append(sequence)

    def remove(self, sequence: CachedSequence) -> None:
        """Free a row; the last row in use takes its place. An empty band frees its memory."""
        last = self.members.pop()
        if last is not sequence:
            for store in self.stores:
                if store.numel():
                    store[:, sequence.row, :, : last.length] = store[:, last.row, :, : last.length]
            for state in self.states.values():
                state.inputs[sequence.row] = state.inputs[last.row]
                state.memory[sequence.row] = state.memory[last.row]
            last.row = sequence.row
            self.members[last.row] = last
        if not self.members:
            self.stores, self.states, self.rows = [], {}, 0

    def used_states(self, layer: int) -> DeltaState:
        """The states of a layer, of the rows in use; shares memory with the band."""
        state, used = self.states[layer], len(self.members)
        return DeltaState(state.inputs[:used], state.memory[:used])

    def _grow(self, rows: int) -> None:
        config = self.config
        linear = [kind == "linear_attention" for kind in config.layer_types]
        stores = [
            torch.zeros(  # what lies behind a sequence is masked, and must be finite
                (2, 0, 0, 0, 0)
                if skip
                else (2, rows, config.kv_heads(layer), self.capacity, config.head_dim),
                dtype=self.dtype,
                device=self.device,
            )
            for layer, skip in enumerate(linear)
        ]
        states = {
            layer: DeltaState.empty(config, self.dtype, self.device, rows)
            for layer, is_linear in enumerate(linear)
            if is_linear
        }
        for new, old in zip(stores, self.stores, strict=False):
            new[:, : old.shape[1]] = old
        for layer, earlier in self.states.items():
            states[layer].inputs[: self.rows] = earlier.inputs
            states[layer].memory[: self.rows] = earlier.memory
        self.stores, self.states, self.rows = stores, states, rows


class BatchCache:
    """The running sequences of one model, in bands."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._bands: dict[int, Band] = {}

    def bands(self) -> list[Band]:
        """Those with sequences, the smallest rows first."""
        return [band for _, band in sorted(self._bands.items()) if band.members]

    def running(self) -> list[CachedSequence]:
        """All sequences, in the order in which a pass takes their tokens."""
        return [sequence for band in self.bands() for sequence in band.members]

    def allocated_tokens(self) -> int:
        """Tokens that the allocated rows have memory for."""
        return sum(band.capacity * band.rows for band in self._bands.values())

    def join(self, cache: KVCache) -> CachedSequence:
        """Copy a sequence that was read by itself into a row."""
        sequence = CachedSequence(cache.length, 0)
        band = self._band(row_capacity(cache.length + 1))
        band.add(sequence)
        for store, own in zip(band.stores, cache.layers, strict=True):
            if store.numel():
                store[:, sequence.row, :, : cache.length] = own[:, : cache.length].transpose(1, 2)
        for layer, state in cache.states.items():
            band.states[layer].inputs[sequence.row] = state.inputs[0]
            band.states[layer].memory[sequence.row] = state.memory[0]
        return sequence

    def leave(self, sequence: CachedSequence) -> None:
        """Free a sequence's row. Rows of others may move."""
        self._bands[sequence.capacity].remove(sequence)

    def make_space(self) -> None:
        """Move every sequence whose row is full to a row of twice the size."""
        for sequence in self.running():
            if sequence.length == sequence.capacity:
                self._widen(sequence)

    def _widen(self, sequence: CachedSequence) -> None:
        before, row, length = self._bands[sequence.capacity], sequence.row, sequence.length
        band = self._band(2 * sequence.capacity)
        moved = CachedSequence(length, sequence.capacity, row)
        before.members[row] = moved  # stays until its contents are copied
        band.add(sequence)
        for new, old in zip(band.stores, before.stores, strict=True):
            if new.numel():
                new[:, sequence.row, :, :length] = old[:, row]
        for layer, state in before.states.items():
            band.states[layer].inputs[sequence.row] = state.inputs[row]
            band.states[layer].memory[sequence.row] = state.memory[row]
        before.remove(moved)

    def _band(self, capacity: int) -> Band:
        if capacity not in self._bands:
            self._bands[capacity] = Band(self._config, capacity, self._dtype, self._device)
        return self._bands[capacity]


@dataclass(frozen=True)
class BatchPass:
    """The cache of one pass: a token of every running sequence, then prompts' next tokens.

    `prompts` are caches and the numbers of tokens that the pass adds to them.
    """

    bands: Sequence[Band]
    prompts: Sequence[tuple[KVCache, int]] = ()
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _indices: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def positions(self) -> list[int]:
        """The position of every token of the pass in its sequence."""
        running = [member.length for band in self.bands for member in band.members]
        return running + [
            cache.length + index for cache, tokens in self.prompts for index in range(tokens)
        ]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float
    ) -> Tensor:
        """As `KVCache.attend`, of the tokens of all sequences (N, heads, head_dim)."""
        out, start = torch.empty_like(q), 0
        for band in self.bands:
            rows = slice(start, start + len(band.members))
            start = rows.stop
            self._store(band, layer, k[rows], v[rows])
            store, longest = band.stores[layer], _longest(band)
            first = _first_seen(band, window)
            keys, values = store[:, : len(band.members), :, first:longest]
            mask = self._mask(band, window, q)
            out[rows] = batched_attention(q[rows], keys, values, mask, scale)
        for cache, tokens in self.prompts:
            rows = slice(start, start + tokens)
            start = rows.stop
            out[rows] = cache.attend(layer, q[rows], k[rows], v[rows], window, scale)
        return out

    def delta_states(self, layer: int) -> list[tuple[slice, DeltaState]]:
        """As `KVCache.delta_states`."""
        parts, start = list[tuple[slice, DeltaState]](), 0
        for band in self.bands:
            rows = slice(start, start + len(band.members))
            parts.append((rows, band.used_states(layer)))
            start = rows.stop
        for cache, tokens in self.prompts:
            parts.append((slice(start, start + tokens), cache.states[layer]))
            start += tokens
        return parts

    def advance(self) -> None:
        """Count the tokens of the pass as cached."""
        for band in self.bands:
            for member in band.members:
                member.length += 1
        for cache, tokens in self.prompts:
            cache.advance(tokens)

    def _store(self, band: Band, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the new keys and values (n, kv_heads, head_dim) behind the cached ones."""
        heads = k.shape[1]
        index = self._indices.get((band.capacity, heads))
        if index is None:
            row = torch.arange(len(band.members))[:, None] * heads + torch.arange(heads)
            lengths = torch.tensor([member.length for member in band.members])
            index = (row * band.capacity + lengths[:, None]).flatten().to(k.device)
            self._indices[(band.capacity, heads)] = index
        for part, values in zip(band.stores[layer], (k, v), strict=True):
            part.view(-1, k.shape[2]).index_copy_(0, index, values.reshape(-1, k.shape[2]))

    def _mask(self, band: Band, window: int | None, like: Tensor) -> Tensor | None:
        """What is added to the scores (n, 1, 1, keys): 0, and -inf where a key is not seen."""
        key = (band.capacity, window)
        if key not in self._masks:
            last = torch.tensor([member.length for member in band.members], device=like.device)
            seen = torch.arange(_first_seen(band, window), _longest(band), device=like.device)
            hidden = seen > last[:, None]
            if window is not None:
                hidden |= seen <= last[:, None] - window
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask[:, None, None] if bool(hidden.any()) else None
        return self._masks[key]


def _longest(band: Band) -> int:
    """Keys of the longest sequence of a band, the new one included."""
    return 1 + max(member.length for member in band.members)


def _first_seen(band: Band, window: int | None) -> int:
    """The first key that any sequence of a band sees through a window."""
    shortest = 1 + min(member.length for member in band.members)
    return 0 if window is None else max(0, shortest - window)
