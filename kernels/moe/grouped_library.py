"""Products of NF4 experts that are decoded for torch's grouped product.

The experts of one projection are decoded once into scratch, and `torch._grouped_mm` multiplies all
rows. That costs a write and a read of the whole decoded weight, and a copy of the rows where they
are gathered, which many rows per expert pay back: the library's product is faster than one that
decodes on the way.

`torch._grouped_mm` is a private function that torch documents nowhere, so nothing is taken for
granted: it may be absent, it refuses strides that are no multiple of 16 bytes, and it has a kernel
of its own for bfloat16 on Hopper alone. On other GPUs it is a loop that waits for the device to
learn the offsets, or a kernel whose launch fails in a way that a process does not survive, so there
it is never called. Where it may be called, it must first solve a small problem.
`ENGINE_REFERENCE=grouped_library` does without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from kernels.linear.decode import decode_weight
from kernels.moe.gathered import Gathered
from kernels.nf4.planar import PlanarNF4Weight
from kernels.runtime.device import architecture
from kernels.runtime.dispatch import use_triton
from kernels.runtime.scratch import scratch
from kernels.runtime.simulation import simulated_gpu
from kernels.runtime.trial import refusal, worst_error

_log = logging.getLogger(__name__)

_HOPPER = 90
_STRIDE_BYTES = 16
_TOLERANCE = 3e-2
"""Of the largest value, in bfloat16. Rows that went to another expert are wrong by about 1."""

_grouped_mm: Callable[..., Tensor] | None = getattr(torch, "_grouped_mm", None)


@dataclass(frozen=True, eq=False)
class ExpertProduct:
    """out = scale W_e x_m for every row m, or W_e^T x_m with `transpose`; added to out, if asked.

    `weight` is (E, out, in), `offsets` (E + 1,) int32 on the device; `out` has adjacent columns.
    """

    rows: Gathered
    weight: PlanarNF4Weight
    offsets: Tensor
    out: Tensor
    transpose: bool = False
    accumulate: bool = False
    scale: float = 1.0

    @property
    def rows_per_expert(self) -> int:
        """The mean, rounded down. No wait: how many each expert has is not asked."""
        return self.out.shape[0] // int(self.weight.shape[0])


def hopper_here() -> bool:
    """Whether a GPU of this machine may take the library's product; True where there is no GPU.

    A plan that is made without a GPU then counts what the larger way takes.
    """
    if not torch.cuda.is_available():
        return True
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return any(architecture(device) == _HOPPER for device in devices)


def suits(product: ExpertProduct) -> bool:
    """Whether the library's product takes this one: device, dtype and strides."""
    x, (_, height, width) = product.rows.matrix, product.weight.shape
    if x.dtype != torch.bfloat16 or not use_triton(x):
        return False
    if not strides_suit(product.rows, (int(height), int(width))):
        return False
    gpu = simulated_gpu()
    if gpu is not None:
        return gpu.multiplies_groups and _grouped_mm is not None
    return called_on(x.device) and solves(x.device) == "ok"


def called_on(device: torch.device) -> bool:
    """Whether the device is one on which torch's function may be called at all."""
    return device.type == "cuda" and architecture(device) == _HOPPER


def strides_suit(rows: Gathered, widths: tuple[int, int]) -> bool:
    """Whether all strides are multiples of 16 bytes, for a weight (E, *widths).

    Gathered rows become contiguous on the way, so theirs are not asked. torch takes some heights
    that are refused here; models have none of them.
    """
    x = rows.matrix
    step = _STRIDE_BYTES // x.itemsize
    strides: list[int] = [*widths]
    if rows.rows is None:
        strides += [int(x.stride(0)), int(x.storage_offset())]
        if x.stride(1) != 1:
            return False
    return all(stride % step == 0 for stride in strides)


def library_matmul(product: ExpertProduct) -> None:
    """Write, or add to, `product.out`. The caller has asked `suits`.

    The result is rounded once, and once more where it is scaled or added.
    """
    assert _grouped_mm is not None
    x, out = product.rows.all(), product.out
    count, height, width = (int(size) for size in product.weight.shape)
    flat = scratch("decoded.experts", (count * height, width), x.dtype, x.device)
    decode_weight(replace(product.weight, shape=(count * height, width)), x.dtype, out=flat)
    dense = flat.view(count, height, width)
    made = _grouped_mm(x, dense if product.transpose else dense.mT, offs=product.offsets[1:])
    if product.accumulate:
        out.add_(made, alpha=product.scale)
    elif product.scale == 1.0:
        out.copy_(made)
    else:
        torch.mul(made, product.scale, out=out)


@cache
def solves(device: torch.device) -> str:
    """ "ok", or why torch's grouped product does not serve on the device."""
    answer = _tried(device)
    if answer != "ok":
        _log.info("torch._grouped_mm is not used on %s: %s", device, answer)
    return answer


def _tried(device: torch.device) -> str:
    """Solve a small problem both ways round; one of its experts has no rows."""
    if _grouped_mm is None:
        return "this torch does not have it"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 64, 128, generator=generator, device="cpu").bfloat16()
    ends = torch.tensor([70, 70, 133], dtype=torch.int32, device="cpu")
    there = weight.to(device)
    for right in (weight.mT, weight):
        x = torch.randn(133, right.shape[1], generator=generator, device="cpu").bfloat16()
        try:
            got = _grouped_mm(
                x.to(device), there if right is weight else there.mT, offs=ends.to(device)
            ).cpu()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            # What this torch or this GPU cannot do: experts are then decoded on the way.
            return refusal(error)
        exact = torch.cat(
            [x[:70].double() @ right[0].double(), x[70:].double() @ right[2].double()]
        )
        worst = worst_error(got, exact)
        if not worst <= _TOLERANCE:
            return f"its product is wrong by {worst:.1e} of the largest value"
    return "ok"
