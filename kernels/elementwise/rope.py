"""Rotary position embedding, in place on q and k.

Pairs are (i, i + D/2) inside each head ("rotate half"):

    q1' = q1 cos - q2 sin,    q2' = q2 cos + q1 sin

cos and sin are (N, D/2), one row per token, already scaled by the attention factor that some rope
types define. The map is a rotation times that factor, so the backward pass is the same map with
the sign of sin turned: `inverse=True`. A partial rotation passes a view of the rotated columns.
Source: Su et al. 2021, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.elementwise.rope_compiled import rotate_rows_, rotates_rows
from kernels.runtime.dispatch import use_triton
from kernels.runtime.lanes import takes_lanes
from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """On a CPU, by the compiled loop where it is worth it."""
    if takes_lanes(x) and rotates_rows(x, cos, sin):
        if not x.is_meta:
            rotate_rows_(x, cos, sin, inverse)
    else:
        _rotate_reference(x, cos, sin, inverse)


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    sign = -1.0 if inverse else 1.0
    if x.dtype == cos.dtype:
        first, second = x[..., :half], x[..., half:]
        before = first.clone()
        first.mul_(cos).addcmul_(second, sin, value=-sign)
        second.mul_(cos).addcmul_(before, sin, value=sign)
        return
    first, second = x[..., :half].to(cos.dtype), x[..., half:].to(cos.dtype)
    x[..., :half] = (first * cos).addcmul_(second, sin, value=-sign)
    x[..., half:] = second.mul_(cos).addcmul_(first, sin, value=sign)


def _joined(q: Tensor, k: Tensor) -> Tensor | None:
    """The one (N, Hq + Hkv, D) tensor of which q and k are neighbouring heads, if there is one."""
    adjacent = (
        q.dtype == k.dtype
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        and q.stride() == k.stride()
        and k.storage_offset() == q.storage_offset() + q.shape[1] * q.stride(1)
    )
    if not adjacent:
        return None
    heads = q.shape[1] + k.shape[1]
    return q.as_strided((q.shape[0], heads, q.shape[2]), q.stride(), q.storage_offset())


@jit
def _rotate_heads(
    source_ptr, target_ptr, cos, sin, head, heads, half, source_head, target_head,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Both halves are loaded before either is stored: the target may be the source.
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads)[:, None] & (column < half)
    at = source_ptr + head[:, None] * source_head + column
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + half, mask=inside, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    at = target_ptr + head[:, None] * target_head + column
    tl.store(at, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(at + half, (second * cos + first * sin).to(dtype), mask=inside)


@jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, q_heads, k_heads, half, q_token, q_head,
    k_token, k_head, q_out_token, q_out_head, k_out_token, k_out_head, cos_token, sin_token,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    # As wide as a tile of heads, so that they are loaded in the layout in which they are used.
    column = tl.broadcast_to(column, (HEADS, BLOCK))
    inside = column < half
    cos = tl.load(cos_ptr + token * cos_token + column, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_token + column, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    # One launch for q and k: the first programs of a token rotate heads of q, the others of k.
    q_groups = tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        _rotate_heads(
            q_ptr + token * q_token, q_out_ptr + token * q_out_token, cos, sin,
            group * HEADS + tl.arange(0, HEADS), q_heads, half, q_head, q_out_head, BLOCK,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + token * k_token, k_out_ptr + token * k_out_token, cos, sin,
            (group - q_groups) * HEADS + tl.arange(0, HEADS), k_heads, half, k_head, k_out_head,
            BLOCK,
        )  # fmt: skip


def tile(half: int, heads: int) -> tuple[int, int, int]:
    """Heads of one program, its columns (both powers of two) and warps, for D/2 = `half`."""
    block = next_power_of_2(half)
    return min(next_power_of_2(heads), max(1, 1024 // block)), block, 4


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    tokens, half = x.shape[0], x.shape[-1] // 2
    shapes = x.dim() == 3 and x.shape[2] == 2 * half and cos.shape == sin.shape == (tokens, half)
    if not shapes:
        raise ValueError(
            f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit; "
            "expected (N, heads, D) with D even and twice (N, D/2)"
        )


def _rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: tuple[Tensor, Tensor]
) -> None:
    for x in (q, k, cos, sin, *out):
        if x.stride(-1) != 1:
            raise ValueError(f"strides {x.stride()}: elements of a head must be adjacent")
    half = q.shape[-1] // 2
    heads, block, warps = tile(half, max(q.shape[1], k.shape[1]))
    groups = cdiv(q.shape[1], heads) + cdiv(k.shape[1], heads)
    if not groups or not q.shape[0]:
        return
    with on_device(q):
        launch(rope_kernel, (q.shape[0], groups))(
            q, k, *out, cos, sin, q.shape[1], k.shape[1], half, q.stride(0), q.stride(1),
            k.stride(0), k.stride(1), out[0].stride(0), out[0].stride(1), out[1].stride(0),
            out[1].stride(1), cos.stride(0), sin.stride(0),
            INVERSE=inverse, HEADS=heads, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def rope_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    inverse: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q (N, Hq, D) and k (N, Hkv, D) in place by cos, sin (N, D/2), in one launch.

    q and k may be views with any strides between tokens and heads, such as column blocks of one
    matrix. With `out`, the rotated values go there and q and k keep theirs. Arithmetic is in the
    dtype of cos (fp32 or wider). Raises `ValueError` where the shapes do not fit.
    """
    _check(q, cos, sin)
    _check(k, cos, sin)
    q_out, k_out = (q, k) if out is None else out
    if use_triton(q):
        _rope_triton(q, k, cos, sin, inverse, (q_out, k_out))
        return q_out, k_out
    if out is not None:
        q_out.copy_(q)
        k_out.copy_(k)
    both = _joined(q_out, k_out)
    for x in (q_out, k_out) if both is None else (both,):
        _rotate(x, cos, sin, inverse)
    return q_out, k_out


def rope_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate x (N, heads, D) in place by cos, sin (N, D/2) and return it.

    Arithmetic in the dtype of cos (fp32 or wider); x keeps its dtype.
    """
    _check(x, cos, sin)
    if use_triton(x):
        none = x[:, :0]
        _rope_triton(x, none, cos, sin, inverse, (x, none))
    else:
        _rotate(x, cos, sin, inverse)
    return x


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, sin)
        return rope_(x.clone(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        return rope_(dy.clone(), cos, sin, inverse=True), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated copy of x (N, heads, D), with a gradient for x."""
    y: Tensor = _Rope.apply(x, cos, sin)
    return y
