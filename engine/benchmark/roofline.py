"""Measure a machine's bandwidth and matmul rate.

A call that must do F floating-point operations and move B bytes takes at least
max(F / peak, B / bandwidth) (Williams, Waterman and Patterson 2009, "Roofline"). The peak is that
of a large square matrix product in the call's dtype, on random data (zeros run faster); the
bandwidth that of a large copy, bytes read plus bytes written. A dtype whose product is not
measured has the peak of fp32.

On a CPU small inputs stay in its caches, so that a share may exceed one there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.benchmark.timing import measure


@dataclass(frozen=True)
class Roofline:
    """Bytes per second of a copy, and floating-point operations per second by dtype name."""

    bandwidth: float
    flops: Mapping[str, float]

    def peak(self, dtype: str) -> float:
        """Operations per second in `dtype`."""
        return self.flops.get(dtype, self.flops["float32"])

    def least_seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """The least time that the two ceilings allow."""
        return max(flops / self.peak(dtype), nbytes / self.bandwidth)

    def bound(self, flops: float, nbytes: float, dtype: str) -> str:
        """Which ceiling it is: "memory" or "compute"."""
        return "compute" if flops / self.peak(dtype) > nbytes / self.bandwidth else "memory"


def measure_roofline(device: torch.device, *, budget: float = 0.3, small: bool = False) -> Roofline:
    """Copy bandwidth and fp32 and bf16 matrix products of this machine.

    On a GPU the copy is 2 x 2 GiB and the product 8192^3; elsewhere, or if `small`, sizes that a
    processor core finishes at once but that no longer fit its caches.
    """
    large = device.type == "cuda" and not small
    size = 8192 if large else 512
    return Roofline(
        _copy_rate((2 << 30) if large else (64 << 20), device, budget),
        {
            str(dtype).removeprefix("torch."): _matmul_rate(size, dtype, device, budget)
            for dtype in (torch.float32, torch.bfloat16)
        },
    )


def _copy_rate(nbytes: int, device: torch.device, budget: float) -> float:
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * nbytes / measure(lambda: target.copy_(source), device, budget=budget).median


def _matmul_rate(size: int, dtype: torch.dtype, device: torch.device, budget: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    taken = measure(lambda: torch.mm(left, right, out=out), device, budget=budget)
    return 2.0 * size**3 / taken.median
