"""Document boundaries of a packed batch, as every attention layer reads them.

Document d of a batch holds tokens bounds[d] to bounds[d + 1]. From these boundaries follow the
blocks of queries and keys that are computed together and, under a sliding window, their masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.attention.shared import SharedTokens
from kernels.elementwise.dropout import Seed

_WINDOW_BLOCK = 256

AttentionGradients = tuple[Tensor, Tensor, Tensor]
"""dq, dk, dv in the shapes of q, k, v."""


@dataclass(frozen=True)
class Block:
    """Queries [q0, q1) against keys [k0, q1); `mask` None means plain causal with k0 == q0."""

    q0: int
    q1: int
    k0: int
    mask: Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """Document boundaries of one packed batch, on the device and as host integers.

    A `frugal` batch prefers a small workspace to few calls. An open plan (`within`) is for launches
    that are recorded once and run again for other documents: only the device knows the boundaries.
    With `shared` the batch holds tokens once that two documents begin with, whose boundaries are
    those of all their tokens.
    """

    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    frugal: bool = False
    most: tuple[int, int] | None = None
    shared: SharedTokens | None = None
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, tokens: int, frugal: bool = False
    ) -> AttentionPlan:
        """Read boundaries (D + 1,); those on a GPU are waited for.

        Raises `ValueError` as `checked_bounds` does.
        """
        bounds = checked_bounds(cu_seqlens.tolist(), tokens)
        return cls(cu_seqlens.to(torch.int32), bounds, frugal)

    @classmethod
    def within(cls, cu_seqlens: Tensor, longest: int, frugal: bool = False) -> AttentionPlan:
        """An open plan of (D + 1,) int32 boundaries that rise or stay: documents may be empty.

        None has more than `longest` tokens. The boundaries are read when a kernel runs.
        """
        return cls(cu_seqlens, (), frugal, (cu_seqlens.shape[0] - 1, longest))

    @cached_property
    def whole(self) -> AttentionPlan:
        """The documents with all their tokens, none of them shared."""
        return replace(self, shared=None)

    @property
    def count(self) -> int:
        """Documents, the empty ones of an open plan included."""
        return len(self.bounds) - 1 if self.most is None else self.most[0]

    def documents(self) -> list[tuple[int, int]]:
        """(start, end) of every document. Raises `RuntimeError` for an open plan."""
        if self.most is not None:
            raise RuntimeError(
                "this attention reads document boundaries on the host, and only the device knows "
                "those of recorded launches; use the flash or efficient back end"
            )
        return list(pairwise(self.bounds))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document, or more for an open plan."""
        if self.most is not None:
            return self.most[1]
        return max(end - start for start, end in self.documents())

    @cached_property
    def equal_length(self) -> int | None:
        """Tokens of every document where all are known to be equally long, else None."""
        if self.most is not None:
            return None
        first = self.bounds[1]
        same = all(end - start == first for start, end in self.documents())
        return first if same else None

    def window(self, window: int | None) -> int | None:
        """`window`, or None where it hides nothing because every document fits in it."""
        return None if window is None or window >= self.longest else window

    def boundaries(self, device: torch.device) -> Tensor:
        """`cu_seqlens` on `device`, copied there at most once."""
        if self.cu_seqlens.device == device:
            return self.cu_seqlens
        key = ("boundaries", device)
        if key not in self._known:
            self._known[key] = self.cu_seqlens.to(device)
        boundaries: Tensor = self._known[key]
        return boundaries

    def blocks(self, window: int | None, like: Tensor) -> list[Block]:
        """Blocks that cover every query once, with masks in the dtype and on the device of `like`.

        Masks of equal shape are one tensor: within a long document all but the first are alike.
        """
        key = ("blocks", window, like.dtype, like.device)
        if key not in self._known:
            self._known[key] = self._make_blocks(window, like)
        blocks: list[Block] = self._known[key]
        return blocks

    def _make_blocks(self, window: int | None, like: Tensor) -> list[Block]:
        blocks: list[Block] = []
        masks: dict[tuple[int, int], Tensor] = {}
        for start, end in self.documents():
            if window is None or end - start <= window:
                blocks.append(Block(start, end, start, None))
                continue
            for q0 in range(start, end, _WINDOW_BLOCK):
                q1, k0 = min(q0 + _WINDOW_BLOCK, end), max(start, q0 - window + 1)
                shape = (q1 - q0, q0 - k0)
                if shape not in masks:
                    masks[shape] = window_mask(*shape, window, like)
                blocks.append(Block(q0, q1, k0, masks[shape]))
        return blocks


@dataclass(frozen=True)
class AttentionSettings:
    """What one attention computes besides its tensors.

    `window` counts the keys that a query sees, its own included; scores are multiplied by `scale`.
    `backend` "cpu" or one of `kernels.attention.table.BACKENDS` forces a back end; None chooses
    the best that works. With a `seed` each weight is zeroed with the probability `dropout` and the
    others divided by 1 - dropout (`kernels.attention.dropped`). Where these heads are a share of a
    layer's `all_heads`, from `first_head` on, masks are those of all.
    """

    plan: AttentionPlan
    window: int | None
    scale: float
    backend: str | None = None
    dropout: float = 0.0
    seed: Seed | None = None
    first_head: int = 0
    all_heads: int | None = None

    @property
    def hiding_window(self) -> int | None:
        """The window, or None where it hides nothing."""
        return self.plan.window(self.window)

    def blocks(self, like: Tensor) -> list[Block]:
        return self.plan.blocks(self.hiding_window, like)


def heads_first(x: Tensor, start: int, end: int, groups: int) -> Tensor:
    """Tokens `start:end` of x (N, H, D) as (1, H * groups, T, D)."""
    part = x[start:end].transpose(0, 1).unsqueeze(0)
    return part if groups == 1 else part.repeat_interleave(groups, dim=1)


def add_to_keys(total: Tensor, part: Tensor, block: Block) -> None:
    """Add part (1, H * groups, K, D) to the block's keys in total (N, H, D), in total's type.

    The query heads of a group are summed. It is the transpose of `heads_first` of keys.
    """
    summed = part.to(total.dtype).unflatten(1, (total.shape[1], -1)).sum(2)
    total[block.k0 : block.q1] += summed.squeeze(0).transpose(0, 1)


def checked_bounds(bounds: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The boundaries of documents. Raises `ValueError` unless they rise from 0 to `tokens`."""
    rising = all(a < b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or not rising:
        raise ValueError(
            f"cu_seqlens is {list(bounds)[:8]}; expected boundaries that rise strictly "
            f"from 0 to the number of tokens, {tokens}"
        )
    return tuple(bounds)


def window_mask(queries: int, lead: int, window: int, like: Tensor) -> Tensor:
    """Additive mask (queries, lead + queries): key column c is at distance lead + row - c."""
    row = torch.arange(queries, device=like.device).unsqueeze(1)
    column = torch.arange(lead + queries, device=like.device).unsqueeze(0)
    distance = lead + row - column
    hidden = (distance < 0) | (distance >= window)
    mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(hidden, float("-inf"))
