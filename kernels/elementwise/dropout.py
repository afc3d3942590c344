"""Dropout with a mask that is recomputed from (seed, index).

The generator is counter-based: the 32-bit index of an element, keyed by the seed, goes through
two rounds of a 32-bit finaliser (multiply, xor-shift), and the element survives where the result is
at least p * 2^32. No state is advanced, so forward, recompute and backward draw the same mask,
and a resumed run draws the mask of the run that was interrupted. The Triton kernel and the torch
reference draw the same bits. Both read the seed from the device's memory where it lies there, so
that a recorded launch (a CUDA graph) draws another mask when another seed is written.

    bits = mix(mix(low32(index) ^ low32(seed)) + high32(index) + high32(seed)),   y = x / (1 - p)

Source of the finaliser's constants: C. Wellons, "Prospecting for Hash Functions" (2018, public
domain), the function known as lowbias32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import no_type_check

import torch
from torch import Tensor

from kernels.runtime.dispatch import use_triton
from kernels.runtime.simulation import equal_parts, once_per_shape
from kernels.runtime.triton_support import cdiv, jit, launch, on_device, tl, triton

Seed = int | Tensor
"""63 bits: a number, or int64 without dimensions on the device of what is dropped."""

_MUL1, _MUL2 = 0x7FEB352D, 0x846CA68B
_CHUNK = 1 << 17
BLOCK = 1024
"""Elements of one program."""


def _signed(word: int) -> int:
    """The 32 low bits of `word` as an int32 holds them."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _on(device: torch.device, seed: Seed) -> Tensor:
    """The seed in the device's memory."""
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def _xor_shift_(x: Tensor, shift: int, work: Tensor) -> None:
    """x ^= x >> shift with zeros shifted in, for x int32."""
    torch.bitwise_right_shift(x, shift, out=work)
    x.bitwise_xor_(work.bitwise_and_((1 << (32 - shift)) - 1))


def _mix_reference_(x: Tensor, work: Tensor) -> None:
    """The finaliser on int32, whose products wrap as those of uint32 do."""
    _xor_shift_(x, 16, work)
    _xor_shift_(x.mul_(_signed(_MUL1)), 15, work)
    _xor_shift_(x.mul_(_signed(_MUL2)), 16, work)


def _mask_chunks(
    numel: int, p: float, seed: Seed, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """(elements, mask) of every chunk, small enough for the cache; each mask is reused."""
    size = min(_CHUNK, numel)
    index = torch.arange(size, dtype=torch.int32, device=device)
    bits, work = torch.empty_like(index), torch.empty_like(index)
    keep = torch.empty(size, dtype=torch.bool, device=device)
    # Unsigned `bits >= threshold` is signed `bits ^ 2^31 >= threshold - 2^31`.
    least = int(p * 2**32) - 2**31
    # Only the 32 low bits of these words count; int32 keeps them as it wraps.
    seed = _on(device, seed)
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    for start in equal_parts(range(0, numel, _CHUNK)):
        # A chunk never crosses a multiple of 2^32, so the high word is one number.
        part = slice(0, min(_CHUNK, numel - start))
        x, spare = bits[part], work[part]
        torch.add(index[part], _signed(start), out=x)
        _mix_reference_(x.bitwise_xor_(low), spare)
        _mix_reference_(x.add_(high + (start >> 32)), spare)
        x.bitwise_xor_(_signed(1 << 31))
        yield slice(start, start + x.numel()), torch.ge(x, least, out=keep[part])


def keep_mask(numel: int, p: float, seed: Seed, device: torch.device) -> Tensor:
    """Boolean (numel,): True with probability 1 - p, a pure function of (seed, index)."""
    mask = torch.empty(numel, dtype=torch.bool, device=device)
    for part, keep in _mask_chunks(numel, p, seed, device):
        mask[part] = keep
    return mask


@once_per_shape(
    lambda x, *_: (x.shape, x.dtype, x.is_contiguous()),
    lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
def _dropout_reference(x: Tensor, p: float, seed: Seed) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    flat, out, scale = x.view(-1), y.view(-1), 1.0 / (1.0 - p)
    for part, keep in _mask_chunks(x.numel(), p, seed, x.device):
        torch.mul(flat[part], keep, out=out[part]).mul_(scale)
    return y


@jit
def mix(x):
    """The finaliser on a block of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@jit
def survives(index, seed, threshold):
    """Whether elements at int64 `index` survive; seed int64, threshold a word in int32."""
    bits = mix(((index ^ seed) & 0xFFFFFFFF).to(tl.uint32))
    bits = mix(bits + (index >> 32).to(tl.uint32) + (seed >> 32).to(tl.uint32))
    return bits >= threshold.to(tl.uint32, bitcast=True)


# One compiled kernel for every p, and for a seed at any address: neither changes the code.
@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed_ptr"])
@no_type_check
def dropout_kernel(x_ptr, y_ptr, seed_ptr, numel, scale, threshold, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    keep = survives(index, tl.load(seed_ptr), threshold)
    y = tl.where(keep, x.to(tl.float32) * scale, 0.0)
    tl.store(y_ptr + index, y.to(x.dtype), mask=inside)


def threshold(p: float) -> int:
    """The threshold as `survives` takes it."""
    return _signed(int(p * 2**32))


def _dropout_triton(x: Tensor, p: float, seed: Seed) -> Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        grid, stored_seed = (cdiv(x.numel(), BLOCK),), _on(x.device, seed)
        scale = 1.0 / (1.0 - p)
        with on_device(x):
            launch(dropout_kernel, grid)(
                x, y, stored_seed, x.numel(), scale, threshold(p), BLOCK=BLOCK, num_warps=4
            )
    return y


def dropout(x: Tensor, p: float, seed: Seed) -> Tensor:
    """x with each element zeroed with probability p < 1 and the rest divided by 1 - p.

    Linear in x with a fixed mask: the same call with the same seed is its own backward pass.
    """
    if p <= 0.0:
        return x
    if p >= 1.0:
        raise ValueError(f"dropout is {p}; expected a probability below 1")
    return _dropout_triton(x, p, seed) if use_triton(x) else _dropout_reference(x, p, seed)
