"""Measure a machine's bandwidth and matmul rate.

A call that must do F floating-point operations and move B bytes takes at least
max(F / peak, B / bandwidth) (Williams, Waterman and Patterson 2009, "Roofline"). The peak is that
of a large square matrix product in the call's dtype, on random data (zeros run faster); the
bandwidth that of a large copy, bytes read plus bytes written. A dtype whose product is not
measured has the peak of fp32.

On a CPU what fits its caches is moved faster, so the bandwidth there is that of a copy of as many
bytes as the call moves, and the peak the best of several sizes. Limits are the fastest of their
timings: a share above one would mean that the limit is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.benchmark.timing import measure

_CACHED = tuple(1 << power for power in range(14, 27, 2))
"""Bytes of the copies that fit a CPU's caches, or begin not to."""

_CPU_SIZES = (256, 512, 1024, 1536)
_ASSUMED_CACHE, _LARGEST_CACHE = 32 << 20, 64 << 20


@dataclass(frozen=True)
class Roofline:
    """Bytes per second of a copy, and floating-point operations per second by dtype name.

    `cached` are the bytes per second of copies of fewer bytes than fit a CPU's caches.
    """

    bandwidth: float
    flops: Mapping[str, float]
    cached: Mapping[int, float] = field(default_factory=dict)

    def peak(self, dtype: str) -> float:
        """Operations per second in `dtype`."""
        return self.flops.get(dtype, self.flops["float32"])

    def bandwidth_of(self, nbytes: float) -> float:
        """Bytes per second of a copy of so many bytes, the best of those that are about as large.

        Timings of small copies are mostly overhead, so a smaller call has the best of all.
        """
        near = [rate for size, rate in self.cached.items() if size >= nbytes / 4]
        return max(self.bandwidth, *near) if near else self.bandwidth

    def least_seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """The least time that the two ceilings allow."""
        return max(flops / self.peak(dtype), nbytes / self.bandwidth_of(nbytes))

    def bound(self, flops: float, nbytes: float, dtype: str) -> str:
        """Which ceiling it is: "memory" or "compute"."""
        memory = nbytes / self.bandwidth_of(nbytes)
        return "compute" if flops / self.peak(dtype) > memory else "memory"


def measure_roofline(device: torch.device, *, budget: float = 0.3, small: bool = False) -> Roofline:
    """Copy bandwidth and fp32 and bf16 matrix products of this machine.

    On a GPU the copy is 2 x 2 GiB and the product 8192^3; elsewhere, or if `small`, sizes that a
    processor core finishes at once.
    """
    large = device.type == "cuda" and not small
    sizes = (8192,) if large else (256, 512) if small else _CPU_SIZES
    rates = {
        str(dtype).removeprefix("torch."): max(
            _matmul_rate(size, dtype, device, budget / len(sizes)) for size in sizes
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    if large:
        return Roofline(_copy_rate(2 << 30, device, budget), rates)
    share = budget / len(_CACHED)
    cached = {size: _copy_rate(size // 2, device, share) for size in _CACHED}
    whole = (64 << 20) if small else 4 * last_level_cache()
    return Roofline(_copy_rate(whole, device, budget), rates, cached)


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache, 64 MiB at most; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        units = {"K": 1 << 10, "M": 1 << 20}
        if text[:-1].isdecimal() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return min(max(sizes, default=_ASSUMED_CACHE), _LARGEST_CACHE)


def _copy_rate(nbytes: int, device: torch.device, budget: float) -> float:
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * nbytes / measure(lambda: target.copy_(source), device, budget=budget).least


def _matmul_rate(size: int, dtype: torch.dtype, device: torch.device, budget: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    taken = measure(lambda: torch.mm(left, right, out=out), device, budget=budget)
    return 2.0 * size**3 / taken.least
