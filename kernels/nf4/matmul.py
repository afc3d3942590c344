"""Multiply by NF4 weights, forward and backward.

    y = x W^T + b,   dx = dy W

The fused product computes out^T = W x^T: as the left operand the weight is decoded straight into
the registers that the tensor-core instruction reads (wgmma with a register operand on sm_90,
mma.sync elsewhere), each element once per tile of x. A tile of 64 columns is one quantisation
block: its scale is decoded, its table of 16 values formed, its codes looked up
(`kernels.nf4.decode_ptx`), and the four planes (`kernels.nf4.planar`) go into four products
of width 16. Codes and x arrive through an asynchronous copy pipeline; scales are fetched two blocks
ahead. Where the tiles are fewer than the multiprocessors, the reduction is split: each part leaves
its fp32 sum in a buffer and the last to arrive adds them up in a fixed order, so that equal inputs
give equal bits. Bias is added in fp32, before the only rounding.

Where that does not pay (`kernels.nf4.tiles` decides), and always for the gradient, whose reduction
runs across scales, the weight is decoded into reused scratch and the vendor's library multiplies.
Neither way saves a decoded weight for backward. Source: Dettmers et al. 2023 (QLoRA,
arXiv 2305.14314).

The scratch, the partial sums and their counters are shared by all launches on a device: call these
functions from one stream.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from kernels.nf4.decode_ptx import INTERPRETED, code_scale, decode_planes
from kernels.nf4.dequantize_triton import (
    dequantize_planar,
    dequantize_reference,
    nested_arguments,
    nested_shift,
    nf4_dequantize,
    triton_dtype,
)
from kernels.nf4.planar import BLOCK, AnyNF4, PlanarNF4Weight
from kernels.nf4.tiles import (
    MatmulPlan,
    MatmulTile,
    matmul_plan,
    slab,
)
from kernels.runtime.device import architecture, multiprocessors
from kernels.runtime.dispatch import use_triton
from kernels.runtime.scratch import scratch
from kernels.runtime.triton_support import cdiv, jit, launch, on_device, tl

_COUNTERS = 1 << 16
_FEW_TOKENS = 512


def nf4_linear_reference(x: Tensor, weight: AnyNF4, bias: Tensor | None = None) -> Tensor:
    """The plain torch reference: x (..., K), weight (N, K) -> (..., N) in the dtype of x."""
    return functional.linear(x, dequantize_reference(weight, x.dtype), bias)


@jit
def nf4_matmul_kernel(
    x, codes, absmax, value_map, nested, offset, bias, out, partial, counters, m, rows, columns,
    ldx, ldo, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NESTED_SHIFT: tl.constexpr, NESTED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """One tile of out^T (rows, m), over one of `parts` shares of the columns.

    Grid (tiles, parts). Neighbouring programs share rows of the weight, so it is read once.
    """
    tile = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    tiles_m = tl.cdiv(m, BLOCK_M)
    token = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_inside = token < m
    row_inside = row < rows
    blocks = (columns // 64).to(tl.int64)
    share = tl.cdiv(blocks, parts)
    first = part * share
    last = tl.minimum(first + share, blocks)

    # Codes and scales are block-major: the next block of a row is `rows` further on.
    word = tl.arange(0, 16)
    absmax_at = absmax + first * rows + row
    codes_at = codes + (first * rows + row)[:, None] * 16 + word[None, :]
    x_at = x + token[None, :] * ldx + first * 64 + word[:, None]
    x_mask = token_inside[None, :]
    w_mask = row_inside[:, None]
    if NESTED:
        # Scales run two blocks ahead: a code is loaded in one step, decoded in the next and used in
        # the third, so that the two dependent loads stay off the path to the products.
        shift = tl.load(offset)
        scale_index = row * blocks + first
        inside = row_inside & (first < last)
        code = tl.load(absmax_at, mask=inside, other=0)
        scale = code_scale(code, value_map, nested, scale_index >> NESTED_SHIFT, shift, inside, PTX)
        absmax_at += rows
        code = tl.load(absmax_at, mask=row_inside & (first + 1 < last), other=0)
        absmax_at += rows
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        tile_codes = tl.load(codes_at, mask=w_mask, other=0)
        if NESTED:
            scale_index += 1
            later = tl.load(absmax_at, mask=row_inside & (block + 2 < last), other=0)
            next_scale = code_scale(
                code,
                value_map,
                nested,
                scale_index >> NESTED_SHIFT,
                shift,
                row_inside & (block + 1 < last),
                PTX,
            )
        else:
            scale = tl.load(absmax_at, mask=row_inside, other=0.0)
        # A block has one scale and four planes of 16 columns, the depth of one instruction.
        w0, w1, w2, w3 = decode_planes(tile_codes, scale[:, None], DTYPE, PTX)
        acc = tl.dot(w0, tl.load(x_at, mask=x_mask, other=0.0), acc)
        acc = tl.dot(w1, tl.load(x_at + 16, mask=x_mask, other=0.0), acc)
        acc = tl.dot(w2, tl.load(x_at + 32, mask=x_mask, other=0.0), acc)
        acc = tl.dot(w3, tl.load(x_at + 48, mask=x_mask, other=0.0), acc)
        if NESTED:
            scale = next_scale
            code = later
        codes_at += rows * 16
        absmax_at += rows
        x_at += 64

    if SPLIT:
        size: tl.constexpr = BLOCK_M * BLOCK_N
        local_m = tl.arange(0, BLOCK_M)
        local_n = tl.arange(0, BLOCK_N)
        # With n adjacent, as `out` has it, whoever adds up reads and stores whole lines.
        sums = partial + tile * parts * size
        mine = sums + part * size + local_m[None, :] * BLOCK_N + local_n[:, None]
        tl.store(mine, acc, mask=x_mask & w_mask)
        # Every thread's sums must be out before this program counts itself as arrived.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == parts - 1:
            inside_t = token_inside[:, None] & row_inside[None, :]
            each = sums + local_m[:, None] * BLOCK_N + local_n[None, :]
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # In the order of the parts, not of their arrival: equal inputs give equal bits.
            for _ in range(parts):
                # Past the first-level cache, which does not see other programs' stores.
                total += tl.load(each, mask=inside_t, other=0.0, cache_modifier=".cg")
                each += size
            if HAS_BIAS:
                total += tl.load(bias + row, mask=row_inside, other=0.0).to(tl.float32)[None, :]
            target = out + token[:, None] * ldo + row[None, :]
            if ACCUMULATE:
                total += tl.load(target, mask=inside_t, other=0.0).to(tl.float32)
            tl.store(target, total.to(DTYPE), mask=inside_t)
            # Zero again for the next launch, which shares the counters.
            tl.store(counters + tile, 0)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + row, mask=row_inside, other=0.0).to(tl.float32)[:, None]
        target = out + token[None, :] * ldo + row[:, None]
        if ACCUMULATE:
            acc += tl.load(target, mask=x_mask & w_mask, other=0.0).to(tl.float32)
        tl.store(target, acc.to(DTYPE), mask=x_mask & w_mask)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: AnyNF4, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.weight = weight
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        need_dx, _, need_dbias = ctx.needs_input_grad
        dx = nf4_linear_backward_input(dy, ctx.weight) if need_dx else None
        return dx, None, dy.flatten(0, -2).sum(0) if need_dbias else None


def nf4_linear(
    x: Tensor,
    weight: AnyNF4,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    accumulate: bool = False,
) -> Tensor:
    """x (..., K) times an NF4 weight (N, K) transposed, plus bias (N,): (..., N) in x's dtype.

    The gradient reaches x and bias. `out`, if given, is written and returned; it must have the
    result's shape and dtype and contiguous rows, and may be columns of a wider matrix, but then no
    gradient can be asked for. With `accumulate` what `out` holds is added before the result is
    rounded. x is bf16, fp16 or fp32. Raises ValueError for shapes, dtypes or devices that do not go
    together.
    """
    _check(x, weight, weight.shape[1])
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != x.device):
        raise ValueError(
            f"bias {tuple(bias.shape)} on {bias.device} does not fit a weight {weight.shape} "
            f"and x on {x.device}"
        )
    wants_gradient = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if out is None:
        if accumulate:
            raise ValueError("nf4_linear accumulates into an `out` that is given")
        if wants_gradient:
            y: Tensor = _NF4Linear.apply(x, weight, bias)
            return y
        return _linear(x, weight, bias)
    if wants_gradient:
        raise ValueError("nf4_linear cannot write into `out` and record a gradient")
    shape = (*x.shape[:-1], weight.shape[0])
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype} on {out.device}, "
            f"expected {shape} {x.dtype} on {x.device}"
        )
    return _linear(x, weight, bias, out, accumulate)


def nf4_linear_backward_input(dy: Tensor, weight: AnyNF4) -> Tensor:
    """The gradient of `nf4_linear` with respect to x: dy (..., N) -> (..., K) in dy's dtype."""
    _check(dy, weight, weight.shape[0])
    if not use_triton(dy):
        return dy @ dequantize_reference(weight, dy.dtype)
    flat = dy.reshape(-1, weight.shape[0])
    out = torch.empty(flat.shape[0], weight.shape[1], dtype=dy.dtype, device=dy.device)
    _through_scratch(flat, weight, out, forward=False)
    return out.view(*dy.shape[:-1], weight.shape[1])


def nf4_matmul(
    x: Tensor,
    weight: PlanarNF4Weight,
    bias: Tensor | None,
    out: Tensor,
    plan: MatmulPlan,
    *,
    accumulate: bool = False,
) -> None:
    """Launch the fused product: x (M, K) and out (M, N) bf16 or fp16 with contiguous rows.

    `plan.tile` must be set; `accumulate` as in `nf4_linear`. Raises ValueError where there are more
    tiles than counters, and for codes that are not aligned to the 16 bytes of one copy.
    """
    tile = plan.tile
    assert tile is not None
    if weight.codes.data_ptr() % 16 != 0:
        raise ValueError("the codes of a fused NF4 product must be aligned to 16 bytes")
    m, (rows, columns) = x.shape[0], weight.shape
    tiles = cdiv(m, tile.block_m) * cdiv(rows, tile.block_n)
    split = plan.split_k > 1
    partial, counters = _split_buffers(tile, tiles, plan.split_k, x.device) if split else (x, x)
    with on_device(x):
        launch(nf4_matmul_kernel, (tiles, plan.split_k), 2.0 * m * rows * columns)(
            x, weight.codes, weight.absmax, *nested_arguments(weight), x if bias is None else bias,
            out, partial, counters, m, rows, columns, x.stride(0), out.stride(0), plan.split_k,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, NESTED_SHIFT=nested_shift(weight),
            NESTED=weight.nested_absmax is not None, HAS_BIAS=bias is not None,
            ACCUMULATE=accumulate, SPLIT=split, DTYPE=triton_dtype(x.dtype), PTX=not INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _check(x: Tensor, weight: AnyNF4, width: int) -> None:
    if len(weight.shape) != 2 or x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"shape {tuple(x.shape)} does not fit an NF4 weight of {weight.shape}")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"an NF4 product takes bfloat16, float16 or float32, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}")


def _linear(
    x: Tensor,
    weight: AnyNF4,
    bias: Tensor | None,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    if not use_triton(x):
        y = nf4_linear_reference(x, weight, bias)
        if out is None:
            return y
        return out.add_(y) if accumulate else out.copy_(y)
    n, k = weight.shape
    if out is None:
        out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    flat_x, flat_out = x.reshape(-1, k), out.view(-1, n)
    m = flat_x.shape[0]
    if m == 0:
        return out
    device = x.device
    plan = matmul_plan(architecture(device), multiprocessors(device), m, n, k)
    fits = x.dtype != torch.float32 and flat_x.stride(1) == 1 and flat_out.stride(1) == 1
    if plan.tile is not None and isinstance(weight, PlanarNF4Weight) and fits:
        nf4_matmul(flat_x, weight, bias, flat_out, plan, accumulate=accumulate)
    else:
        _through_scratch(flat_x, weight, flat_out, forward=True, accumulate=accumulate)
        if bias is not None:
            flat_out += bias
    return out


def _through_scratch(
    x: Tensor, weight: AnyNF4, out: Tensor, *, forward: bool, accumulate: bool = False
) -> None:
    """out = x W^T, or x W with `forward` false, a slab of W decoded at a time.

    A slab is a run of W's lines along the output (rows forward, columns backward), so that every
    element of `out` is one sum, rounded once.
    """
    n, k = weight.shape
    arch, size = architecture(x.device), x.element_size()
    beta = float(accumulate)
    if not isinstance(weight, PlanarNF4Weight):
        whole = nf4_dequantize(weight, out=scratch("nf4 weight", (n, k), x.dtype, x.device))
        torch.addmm(out, x, whole.T if forward else whole, beta=beta, out=out)
    elif forward:
        step = slab(arch, n, k * size, BLOCK)
        for start in range(0, n, step):
            rows = range(start, min(start + step, n))
            part = scratch("nf4 weight", (len(rows), k), x.dtype, x.device)
            dequantize_planar(weight, part, rows=rows)
            own = out[:, rows.start : rows.stop]
            torch.addmm(own, x, part.T, beta=beta, out=own)
    else:
        step = slab(arch, k, n * size, BLOCK)
        for start in range(0, k, step):
            stop = min(start + step, k)
            part = scratch("nf4 weight", (n, stop - start), x.dtype, x.device)
            dequantize_planar(weight, part, blocks=range(start // BLOCK, stop // BLOCK))
            own = out[:, start:stop]
            torch.addmm(own, x, part, beta=beta, out=own)


def _split_buffers(
    tile: MatmulTile, tiles: int, parts: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Space for the partial sums, and the counters, which every launch leaves at zero."""
    if tiles > _COUNTERS:
        raise ValueError(f"a split product of {tiles} tiles has only {_COUNTERS} counters")
    size = tiles * parts * tile.block_m * tile.block_n
    return scratch("nf4 partial sums", (size,), torch.float32, device), _counters(device)


def most_partial_sums(arch: int, units: int, rows: int, columns: int) -> int:
    """The most elements of partial sums that any number of tokens needs, for W (rows, columns).

    Few tokens need them and many do not; they stay, so a plan counts them whatever its tokens are.
    """
    most = 0
    for tokens in range(1, _FEW_TOKENS + 1):
        plan = matmul_plan(arch, units, tokens, rows, columns)
        if plan.tile is not None and plan.split_k > 1:
            block = plan.tile.block_m, plan.tile.block_n
            tiles = cdiv(tokens, block[0]) * cdiv(rows, block[1])
            most = max(most, tiles * plan.split_k * block[0] * block[1])
    return most


@cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)


def fused_pays(x: Tensor, weight: PlanarNF4Weight) -> bool:
    """Whether `nf4_linear` multiplies x (M, K) by the codes directly instead of decoding first."""
    if not use_triton(x) or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    device, (width, depth) = x.device, weight.shape
    plan = matmul_plan(architecture(device), multiprocessors(device), x.shape[0], width, depth)
    return plan.tile is not None
