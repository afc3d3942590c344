"""Tile sizes of the NF4 kernels, by shape and architecture.

A product x W^T with x (M, K) and W (N, K) in NF4 runs in one of two ways:

* `fused`: the Triton product of `kernels.nf4.matmul`, which reads W in 4 bits (0.52 bytes per
  element) and decodes it between memory and tensor core. It spends 7 to 10 instructions per weight
  element and tile of M, so it wins where memory bounds the product (small M) or where tensor cores
  are slow compared with the other units (GeForce).
* `scratch`: W is decoded once into a reused buffer and the vendor's library multiplies. It moves
  2.5 + 2 bytes per element more, which a large M hides: about 3 % at M = 8,192 on an H200.

`DISPATCH` is the table of that choice. Its key is (architecture, M, N, K): the architecture as
major * 10 + minor of the compute capability, M an upper bound, N and K exact or 0 for any. Of the
rows that fit, the one with exact N and K wins over those without, then the one with the smallest
bound; beyond the largest bound the path is `scratch`. An architecture that is not listed takes the
rows of the nearest older one that is. Values are fused tiles, or None for `scratch`.

The general rows rest on the published crossovers of bitsandbytes' own fused kernel, which is built
on the same idea (M up to 128 on A100 and GeForce 30, 256 on GeForce 40 and 50, 64 on H100, 8 to 32
on B200), and on instruction counts (`bench/results/compile_report.md`) and rooflines, by which this
one should reach further on H100: at M = 128 and 14,336 x 4,096, 16 us of instruction issue and 19
us of tensor core at the same time, against 40 us for decoding alone. They are a starting point,
computed and not measured. `override` replaces rows while it is entered, and `DISPATCH` may be
edited; `engine bench` measures.

Nothing here is tuned while a model runs: a choice depends on the key alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from kernels.runtime.triton_support import cdiv


@dataclass(frozen=True)
class MatmulTile:
    """A fused program's share of out^T (N, M), its warps and its copy pipeline's depth."""

    block_n: int
    block_m: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DequantizeTile:
    """A decoding program's share: `rows` blocks at a time, `steps` times."""

    rows: int
    steps: int
    warps: int


@dataclass(frozen=True)
class MatmulPlan:
    """How one product runs: fused with `tile` and `split_k`, or through scratch (tile None)."""

    tile: MatmulTile | None
    split_k: int = 1


Key = tuple[int, int, int, int]

# One warp group decodes 128 rows straight into the registers its tensor-core instructions read.
_DECODE = MatmulTile(128, 16, 4, 5)
_SMALL = MatmulTile(128, 64, 4, 4)
_WIDE = MatmulTile(128, 128, 8, 3)
# With 99 KiB of shared memory per multiprocessor, fewer stages leave room for more programs.
_DECODE_99K = MatmulTile(128, 16, 4, 3)
_SMALL_99K = MatmulTile(128, 64, 4, 3)
# Two warps keep Blackwell data-centre parts on mma.sync: their own instruction reads W from tensor
# memory only, which costs 12 instructions per element to fill.
_DECODE_B200 = MatmulTile(64, 16, 2, 5)

DISPATCH: dict[Key, MatmulTile | None] = {
    (75, 0, 0, 0): None,
    (80, 16, 0, 0): _DECODE,
    (80, 64, 0, 0): _SMALL,
    (80, 128, 0, 0): _WIDE,
    (86, 16, 0, 0): _DECODE_99K,
    (86, 64, 0, 0): _SMALL_99K,
    (86, 128, 0, 0): _WIDE,
    (89, 16, 0, 0): _DECODE_99K,
    (89, 64, 0, 0): _SMALL_99K,
    (89, 256, 0, 0): _WIDE,
    (90, 16, 0, 0): _DECODE,
    (90, 64, 0, 0): _SMALL,
    (90, 128, 0, 0): _WIDE,
    (100, 16, 0, 0): _DECODE_B200,
    (120, 16, 0, 0): _DECODE_99K,
    (120, 64, 0, 0): _SMALL_99K,
    (120, 256, 0, 0): _WIDE,
}
"""The shipped table; see the module's docstring."""

SLAB_BYTES: dict[int, int] = {}
"""Most bytes of scratch a decoded weight may take, by architecture; whole weights where absent.

A slab that stays in a large L2 cache (16 to 24 MB of the 50 MB on H100, 72 MB on GeForce 4090)
spares the trip through memory, but cuts the product into smaller ones; which wins is unmeasured.
"""

SHARED_MEMORY = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
"""Bytes of shared memory one program may use, by architecture (CUDA C++ Programming Guide)."""

_PROGRAMS_PER_SM = 4
_LEAST_BLOCKS_PER_SPLIT = 4
_MOST_SPLITS = 16
_DEQUANTIZE_WAVES = 4


def matmul_plan(arch: int, multiprocessors: int, m: int, n: int, k: int) -> MatmulPlan:
    """How x (m, k) times W (n, k)^T in bf16 or fp16 runs; fused only for k a multiple of 64."""
    tile = _lookup(arch, m, n, k) if k % 64 == 0 else None
    if tile is None:
        return MatmulPlan(None)
    tiles = cdiv(n, tile.block_n) * cdiv(m, tile.block_m)
    return MatmulPlan(tile, split_k(tiles, multiprocessors, k // 64))


def split_k(tiles: int, multiprocessors: int, blocks: int) -> int:
    """Into how many parts the reduction over `blocks` blocks of 64 columns is cut.

    A power of two, so that `tiles` programs become enough to fill every multiprocessor, while each
    part keeps enough blocks to fill its copy pipeline. 1 where the tiles alone are enough.
    """
    parts = 1
    wanted = multiprocessors * _PROGRAMS_PER_SM
    while (
        tiles * parts * 2 <= wanted
        and blocks >= parts * 2 * _LEAST_BLOCKS_PER_SPLIT
        and parts < _MOST_SPLITS
    ):
        parts *= 2
    return parts


def slab(arch: int, lines: int, line_bytes: int, multiple: int) -> int:
    """How many of `lines` rows or columns of a weight are decoded at a time.

    `line_bytes` is the size of one decoded line. All lines where `SLAB_BYTES` sets no limit, else a
    multiple of `multiple`.
    """
    limit = SLAB_BYTES.get(_listed(arch))
    if limit is None or lines * line_bytes <= limit:
        return lines
    return max(limit // line_bytes // multiple, 1) * multiple


def dequantize_tile(multiprocessors: int, blocks: int) -> DequantizeTile:
    """The tile that decodes `blocks` blocks of 64 elements.

    One block per pair of threads and step; four steps share the address arithmetic where that still
    leaves several programs for every multiprocessor.
    """
    steps = 4 if blocks >= multiprocessors * _DEQUANTIZE_WAVES * 64 * 4 else 2
    return DequantizeTile(64, steps, 4)


def dequantize_tiles() -> tuple[DequantizeTile, ...]:
    """Every tile that `dequantize_tile` can return."""
    return tuple(DequantizeTile(64, steps, 4) for steps in (2, 4))


def transposed_tile(multiprocessors: int, blocks: int) -> DequantizeTile:
    """The tile that decodes `blocks` blocks of 64 elements to a transposed result.

    Four neighbouring rows per thread, stored as 8 bytes; two where that would leave too few
    programs for every multiprocessor.
    """
    four = blocks >= multiprocessors * _DEQUANTIZE_WAVES * 512
    return DequantizeTile(512 if four else 256, 1, 4)


def transposed_tiles() -> tuple[DequantizeTile, ...]:
    """Every tile that `transposed_tile` can return."""
    return tuple(DequantizeTile(rows, 1, 4) for rows in (256, 512))


def matmul_tiles(arch: int) -> tuple[MatmulTile, ...]:
    """Every fused tile that `matmul_plan` can return for `arch`."""
    tiles = (tile for key, tile in DISPATCH.items() if key[0] == _listed(arch))
    return tuple(dict.fromkeys(tile for tile in tiles if tile is not None))


@contextmanager
def override(rows: Mapping[Key, MatmulTile | None]) -> Iterator[None]:
    """Add or replace rows of `DISPATCH` while the context is entered."""
    before = dict(DISPATCH)
    DISPATCH.update(rows)
    try:
        yield
    finally:
        DISPATCH.clear()
        DISPATCH.update(before)


def _listed(arch: int) -> int:
    """The newest architecture in the table that is not newer than `arch`."""
    return max((key[0] for key in DISPATCH if key[0] <= arch), default=0)


def _lookup(arch: int, m: int, n: int, k: int) -> MatmulTile | None:
    listed = _listed(arch)
    best: Key | None = None
    for key in DISPATCH:
        fits = key[0] == listed and m <= key[1] and key[2] in (0, n) and key[3] in (0, k)
        if fits and (best is None or _rank(key) < _rank(best)):
            best = key
    return None if best is None else DISPATCH[best]


def _rank(key: Key) -> tuple[int, int]:
    """Smaller is more specific: exact N and K before any, then the smaller bound on M."""
    return (key[2] == 0) + (key[3] == 0), key[1]
