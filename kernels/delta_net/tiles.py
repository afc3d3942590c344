"""Chunk table, launch inputs and tile helpers of the gated delta kernels.

Queries, keys and values are read where they lie, (N, heads, D) with adjacent elements. Keys enter
products as they are; their norms, gates and decays scale rows in fp32 on either side of a product,
so that nothing is rounded twice. G is summed in fp32 inside every kernel from g.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from kernels.delta_net.gates import L2_EPS
from kernels.delta_net.operands import CHUNK, GatedDeltaInputs
from kernels.runtime.device import architecture, upload
from kernels.runtime.triton_support import jit, next_power_of_2, tl

MAX_SIZE = 128
"""Largest K and V the kernels take: larger tiles would not stay in registers."""


@dataclass(frozen=True)
class ChunkTable:
    """Document and chunk boundaries on the device, int32.

    bounds (D + 1,), `first` (D + 1,) the first chunk of every document, starts and ends (n,) the
    tokens of every chunk.
    """

    bounds: Tensor
    first: Tensor
    starts: Tensor
    ends: Tensor

    @property
    def documents(self) -> int:
        return self.bounds.shape[0] - 1

    @property
    def chunks(self) -> int:
        return self.starts.shape[0]


@lru_cache(maxsize=16)
def chunk_table(bounds: tuple[int, ...], device: torch.device) -> ChunkTable:
    """The table for documents between consecutive `bounds`; the same for every layer."""
    starts: list[int] = []
    ends: list[int] = []
    first = [0]
    for start, end in pairwise(bounds):
        starts += range(start, end, CHUNK)
        ends += [min(at + CHUNK, end) for at in range(start, end, CHUNK)]
        first.append(len(starts))
    made = (torch.tensor(part, dtype=torch.int32) for part in (bounds, first, starts, ends))
    return ChunkTable(*(upload(part, device) for part in made))


@dataclass(frozen=True)
class Launch:
    """The inputs of one call with adjacent elements, and 1 / norm of queries and keys, fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    q_rstd: Tensor
    k_rstd: Tensor
    table: ChunkTable

    @property
    def heads(self) -> int:
        """Value heads."""
        return int(self.v.shape[1])

    @property
    def group(self) -> int:
        """Value heads of a key head."""
        return self.heads // int(self.k.shape[1])

    @property
    def key(self) -> int:
        return int(self.k.shape[2])

    @property
    def value(self) -> int:
        return int(self.v.shape[2])

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel on this device."""
        return tile(kernel, architecture(self.k.device), self.key, self.value)

    def options(self, kernel: str) -> dict[str, int]:
        """Sizes, warps and stages, as every launch but the first and last takes them."""
        shape = self.tile(kernel)
        return {
            "KEY": self.key,
            "VALUE": self.value,
            "BLOCK_K": shape.keys,
            "BLOCK_V": shape.values,
            "num_warps": shape.warps,
            "num_stages": shape.stages,
        }

    def operations(self, *, states: int = 0, keys: int = 0, values: int = 0) -> float:
        """Floating-point operations of so many products in every chunk and head.

        Of a chunk's rows with a state (C, K, V), of pairs of tokens over keys (C, C, K), and over
        values (C, C, V).
        """
        each = states * self.key * self.value + CHUNK * (keys * self.key + values * self.value)
        return 2.0 * self.table.chunks * self.heads * CHUNK * each

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor on the device, in the dtype of k unless told."""
        return torch.empty(shape, dtype=dtype or self.k.dtype, device=self.k.device)


def prepare(x: GatedDeltaInputs) -> Launch:
    """Norms and layout. Raises `ValueError` on head sizes beyond `MAX_SIZE`."""
    q, k, v = x.q, x.k, x.v
    if max(k.shape[2], v.shape[2]) > MAX_SIZE:
        raise ValueError(
            f"head sizes K = {k.shape[2]} and V = {v.shape[2]}; the Triton kernels take at most "
            f"{MAX_SIZE}, ENGINE_REFERENCE=1 runs the plain torch reference"
        )
    q, k, v = (rows_adjacent(part.to(k.dtype)) for part in (q, k, v))
    norms = reciprocal_norm(q), reciprocal_norm(k)
    table = chunk_table(x.bounds, k.device)
    return Launch(q, k, v, x.g.contiguous(), x.beta.contiguous(), *norms, table)


def rows_adjacent(x: Tensor) -> Tensor:
    """x, or a copy of it, with adjacent elements in its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def reciprocal_norm(x: Tensor) -> Tensor:
    """1 / sqrt(sum x^2 + 1e-6) over the last dimension, fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    rstd: Tensor = norm.square_().add_(L2_EPS).rsqrt_()
    return rstd


@dataclass(frozen=True)
class Tile:
    """Columns of K and of V that a program takes at a time, its warps, its pipeline's depth."""

    keys: int
    values: int
    warps: int = 4
    stages: int = 2


_TILES = {
    "inverse": Tile(64, 16),
    "scan": Tile(MAX_SIZE, 32, stages=3),
    "output": Tile(64, 64),
    "writes_backward": Tile(64, 64),
    "reverse_scan": Tile(MAX_SIZE, 32, warps=8),
    "pairs": Tile(64, 32),
    "query": Tile(64, 32),
    "key": Tile(32, 32),
}
# Where products read shared memory (wgmma, tcgen05), registers hold larger sums.
_TILES_90 = {
    "pairs": Tile(64, 32, warps=8),
    "reverse_scan": Tile(MAX_SIZE, 32),
    "key": Tile(64, 32),
}


def tile(kernel: str, arch: int, key: int, value: int) -> Tile:
    """The tile of a kernel for heads of `key` and `value`: powers of two that fill registers.

    Raises `RuntimeError` below compute capability 8.0, where products have no tensor core to run
    on in these types.
    """
    if arch < 80:
        raise RuntimeError(
            "the gated delta kernels need compute capability 8.0 or newer; ENGINE_REFERENCE=1 "
            "runs the plain torch reference"
        )
    shape = _TILES[kernel]
    if arch in (90, 100, 103):
        shape = _TILES_90.get(kernel, shape)
    keys, values = (max(16, next_power_of_2(size)) for size in (key, value))
    return replace(shape, keys=min(shape.keys, keys), values=min(shape.values, values))


@jit
def chunk_tokens(starts, ends, group):
    """Chunk, value head and its key head of a program, the chunk's tokens, which there are."""
    # 64 bits from here on: token times stride may exceed 2^31 elements.
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(starts + chunk).to(tl.int64) + tl.arange(0, 64)
    return chunk, head, head // group, row, row < tl.load(ends + chunk)


@jit
def document_state(
    bounds, heads, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Columns of V, head, document of a program, its first token and the first behind it.

    And of the document's state: where its elements lie, those of any state, and which there are.
    """
    # The columns of V of one head are neighbouring programs: they read the same keys and T.
    column = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1).to(tl.int64)
    document = tl.program_id(2).to(tl.int64)
    start = tl.load(bounds + document).to(tl.int64)
    end = tl.load(bounds + document + 1).to(tl.int64)
    along_k = tl.arange(0, BLOCK_K)
    in_state = (along_k < KEY)[:, None] & (column < VALUE)[None, :]
    element = along_k[:, None] * VALUE + column[None, :]
    at_document = (document * heads + head) * KEY * VALUE + element
    return column, head, document, start, end, at_document, element, in_state


@jit
def load_rows(x, row, inside, stride, column, width):
    """Rows of x, the given columns, zero outside."""
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(x + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@jit
def load_head(x, row, inside, head, heads, column, width):
    """Rows of one head of a contiguous x (N, heads, width)."""
    return load_rows(x + head * width, row, inside, heads * width, column, width)


@jit
def store_head(x, row, inside, head, heads, column, width, values):
    """Write rows of one head of a contiguous x (N, heads, width), in its dtype."""
    mask = inside[:, None] & (column < width)[None, :]
    target = x + head * width + row[:, None] * (heads * width) + column[None, :]
    tl.store(target, values.to(x.dtype.element_ty), mask=mask)


@jit
def row_products(
    a, a_row, b, b_row, row, inside, KEY: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """a b^T (64, 64) of the same rows of a and b, (N, KEY) each, fp32."""
    sums = tl.zeros((64, 64), tl.float32)
    for at in range(0, KEY, BLOCK_K):
        column = at + tl.arange(0, BLOCK_K)
        left = load_rows(a, row, inside, a_row, column, KEY)
        right = load_rows(b, row, inside, b_row, column, KEY)
        sums += product(left, tl.trans(right))
    return sums


@jit
def square(i, matrix):
    """Where the elements of the 64 x 64 matrix number `matrix` lie; i is 0 to 63."""
    return matrix * 4096 + i[:, None] * 64 + i[None, :]


@jit
def load_scalars(x, row, inside, head, heads):
    """One fp32 number per row of x (N, heads), zero outside."""
    return tl.load(x + row * heads + head, mask=inside, other=0.0).to(tl.float32)


@jit
def log_decay(g, row, inside, head, heads):
    """G of consecutive rows, fp32; rows outside repeat the last value."""
    return tl.cumsum(load_scalars(g, row, inside, head, heads), 0)


@jit
def at_end(x, SIZE: tl.constexpr):
    """The last element of x (SIZE,)."""
    # A masked sum, because a tensor in registers cannot be indexed.
    return tl.sum(tl.where(tl.arange(0, SIZE) == SIZE - 1, x, 0.0), 0)


@jit
def decay_matrix(log, SIZE: tl.constexpr):
    """D (SIZE, SIZE): e^(G_i - G_j) for i >= j, else 0."""
    i = tl.arange(0, SIZE)
    lower = i[:, None] >= i[None, :]
    # Masked before the exponential: above the diagonal G_i - G_j is positive and may overflow.
    return tl.exp(tl.where(lower, log[:, None] - log[None, :], float("-inf")))


@jit
def product(a, b):
    """a b with fp32 sums; fp32 operands are not cut to tf32."""
    return tl.dot(a, b, input_precision="ieee")
