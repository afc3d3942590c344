"""Triton kernel that quantises whole blocks to NF4.

Maths and bit-exactness are those of `kernels.nf4.encode`: `absmax = max|w|` per block, the code of
an element is the number of the 15 thresholds below `w * (1 / absmax)`, and two codes share a byte,
the even element in the high nibble. Only whole blocks are done here: a short last one is divided by
its scale, and is left to the caller. A block with NaN or infinity gets an infinite scale, which the
caller refuses.
"""

from __future__ import annotations

from torch import Tensor

from kernels.runtime.triton_support import cdiv, jit, launch, on_device, tl

TILE = 2048
"""Elements per program, or one block if that is larger."""

NUM_WARPS = 4

_LARGEST = tl.constexpr(3.4028234663852886e38)
_SMALLEST_SCALE = tl.constexpr(1e-38)


@jit
def quantize_nf4_kernel(
    w, thresholds, packed, absmax, numel,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of BLOCK elements per program."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(w + index, mask=index < numel, other=0.0).to(tl.float32)
    size = tl.abs(value)
    largest = tl.max(size, axis=1)
    # A maximum passes NaN by, so what is not finite is looked for apart; as floats, because the
    # compiler takes a reduction of truth values through local memory.
    bad = tl.max(tl.where(size <= _LARGEST, 0.0, 1.0), axis=1)
    # Triton would take the bare subnormal literal for float64.
    floor = tl.full((BLOCKS,), _SMALLEST_SCALE, tl.float32)
    # Correctly rounded, as the reference's reciprocal is; Triton's plain division is not.
    scaled = value * tl.div_rn(1.0, tl.maximum(largest, floor))[:, None]
    # The nearest value's index is the number of midpoints below it.
    code = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for i in tl.static_range(15):
        code += (scaled > tl.load(thresholds + i)).to(tl.int32)
    # Two neighbours share a byte: they are paired in registers, so that whole bytes are stored.
    even, odd = tl.split(tl.reshape(code, (BLOCKS, BLOCK // 2, 2)))
    pair = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + pair, (even * 16 + odd).to(tl.uint8), mask=2 * pair < numel)
    scale = tl.where(bad == 0.0, largest, float("inf"))
    tl.store(absmax + block, scale, mask=block * BLOCK < numel)


def quantize_whole_blocks(
    flat: Tensor, thresholds: Tensor, block_size: int, packed: Tensor, absmax: Tensor
) -> None:
    """Write codes to `packed` and fp32 scales to `absmax` for all but a short last block.

    `flat` is contiguous, `thresholds` fp32 (15,).
    """
    count = flat.numel() // block_size
    if count == 0:
        return
    blocks = max(1, TILE // block_size)
    with on_device(flat):
        launch(quantize_nf4_kernel, (cdiv(count, blocks),))(
            flat, thresholds, packed, absmax, count * block_size,
            BLOCK=block_size, BLOCKS=blocks, num_warps=NUM_WARPS,
        )  # fmt: skip
