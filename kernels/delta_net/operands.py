"""Inputs, saved activations and gradients of the gated delta rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64
"""Tokens per chunk."""


def wide(x: Tensor) -> Tensor:
    """x in fp32 or wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@dataclass(frozen=True)
class GatedDeltaInputs:
    """q, k (N, Hk, K) before their norm; v (N, Hv, V); g, beta (N, Hv) from `gates_forward`.

    `bounds` as `AttentionPlan.bounds`; `initial_state` (D, Hv, K, V) or None for zero. Raises
    `ValueError` if the shapes do not fit.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    bounds: tuple[int, ...]
    initial_state: Tensor | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        q, k, v, tokens = self.q, self.k, self.v, self.bounds[-1]
        fits = q.shape == k.shape and q.shape[0] == tokens == v.shape[0]
        fits = fits and v.shape[1] % q.shape[1] == 0
        if not fits or not self.g.shape == self.beta.shape == v.shape[:2]:
            raise ValueError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, "
                f"g {tuple(self.g.shape)}, beta {tuple(self.beta.shape)} do not fit {tokens} "
                "tokens; expected twice (N, Hk, K), then (N, Hv, V) with Hk dividing Hv, and "
                "twice (N, Hv)"
            )

    @property
    def documents(self) -> int:
        return len(self.bounds) - 1

    @property
    def q_scale(self) -> float:
        """What scales a query after its norm: K^-1/2."""
        return float(self.q.shape[-1] ** -0.5)


@dataclass(frozen=True)
class GatedDeltaSaved:
    """What backward reads besides the inputs: `inverse` (T), and unless trimmed S and v'."""

    inverse: Tensor
    states: Tensor | None = None
    writes: Tensor | None = None

    def trim(self) -> GatedDeltaSaved:
        """Without S and v', which backward then computes again."""
        return replace(self, states=None, writes=None)


class GatedDeltaGradients(NamedTuple):
    """dq, dk (N, Hk, K), dv (N, Hv, V) in the dtypes of q, k, v; dg, dbeta (N, Hv) fp32 or wider.

    `d_initial_state` (D, Hv, K, V), fp32 or wider.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor
    d_initial_state: Tensor
