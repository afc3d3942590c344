"""Packed attention against float64 truth: the CPU's way and the fallback."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention import (
    AttentionPlan,
    AttentionSettings,
    attention,
    attention_backward,
    attention_forward,
    cached_attention,
)

Accurate = Callable[[Tensor, Tensor, Tensor], None]
DOCUMENTS = (1, 63, 5, 300)


def plan_of(lengths: Sequence[int]) -> AttentionPlan:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return AttentionPlan.from_cu_seqlens(bounds, int(bounds[-1]))


def allowed(plan: AttentionPlan, window: int | None) -> Tensor:
    """(N, N): whether a query (row) sees a key (column), from the definition alone."""
    position = torch.arange(plan.bounds[-1])
    document = torch.bucketize(position, torch.tensor(plan.bounds), right=True)
    distance = position.unsqueeze(1) - position.unsqueeze(0)
    sees = (document.unsqueeze(1) == document.unsqueeze(0)) & (distance >= 0)
    return sees if window is None else sees & (distance < window)


def whole(
    values: Sequence[Tensor],
    plan: AttentionPlan,
    window: int | None,
    dtype: torch.dtype,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """out, dq, dk, dv in `dtype` by `attend` over all tokens at once, heads first."""
    q, k, v = (x.to(dtype).detach().requires_grad_(True) for x in values[:3])
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    out = attend(q.transpose(0, 1), wide_k, wide_v, allowed(plan, window)).transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3].to(dtype))]


def exact(values: Sequence[Tensor], plan: AttentionPlan, window: int | None) -> list[Tensor]:
    """The definition in float64."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        scores = (q @ k.transpose(1, 2)) * q.shape[2] ** -0.5
        p = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        return torch.matmul(p, v)

    return whole(values, plan, window, torch.float64, attend)


def plain(values: Sequence[Tensor], plan: AttentionPlan, window: int | None) -> list[Tensor]:
    """torch's attention under one dense mask, in the dtype of the values."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)

    return whole(values, plan, window, values[0].dtype, attend)


def problem(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v, do."""
    return [torch.randn(tokens, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads, heads)]


@pytest.mark.parametrize("backend", ["cpu", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [(2, 2, 8, None), (4, 2, 64, None), (4, 1, 32, 3), (2, 1, 16, 40), (2, 2, 256, 299)],
)
def test_values_and_gradients_are_accurate(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    dtype: torch.dtype,
    backend: str,
    accurate: Accurate,
) -> None:
    plan = plan_of(DOCUMENTS)
    values = problem(sum(DOCUMENTS), heads, kv_heads, dim, dtype)
    q, k, v = (x.clone().requires_grad_(True) for x in values[:3])
    out = attention(q, k, v, plan, window=window, backend=backend)
    assert out.is_contiguous()
    mine = [out.detach(), *torch.autograd.grad(out, (q, k, v), values[3])]
    wanted = zip(plain(values, plan, window), exact(values, plan, window), strict=True)
    for ours, (other, truth) in zip(mine, wanted, strict=True):
        accurate(ours, other, truth)


def test_short_documents_in_16_bits_are_as_exact_as_in_fp32() -> None:
    """They are computed in fp32 on a CPU, as the values are, and rounded once."""
    q, k, v, do = problem(96, 4, 2, 32, torch.bfloat16)
    settings = AttentionSettings(plan_of((60, 36)), None, 32**-0.5, "cpu")
    out, saved = attention_forward(q, k, v, settings)
    wide, _ = attention_forward(q.float(), k.float(), v.float(), settings)
    assert torch.equal(out, wide.to(torch.bfloat16))
    mine = attention_backward(do, q, k, v, out, saved, settings)
    want = attention_backward(
        do.float(), q.float(), k.float(), v.float(), out.float(), saved, settings
    )
    for got, exactly in zip(mine, want, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, exactly.to(torch.bfloat16))


@pytest.mark.parametrize("backend", ["cpu", "documents"])
def test_a_window_of_one_sees_only_its_own_token(backend: str) -> None:
    q, k, v, _ = problem(40, 4, 2, 8)
    out, _ = attention_forward(q, k, v, AttentionSettings(plan_of((30, 10)), 1, 0.3, backend))
    torch.testing.assert_close(out, v.repeat_interleave(2, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "documents"])
@pytest.mark.parametrize("fault", ["document", "window", "future"])
def test_a_wrong_mask_breaks_the_rule(fault: str, backend: str, accurate: Accurate) -> None:
    lengths, window = (20, 40), 9
    values = problem(60, 2, 1, 16)
    q, k, v, _ = values
    wrong = plan_of((60,)) if fault == "document" else plan_of(lengths)
    off = {"window": window + 1, "document": window, "future": None}[fault]
    out, _ = attention_forward(q, k, v, AttentionSettings(wrong, off, 0.25, backend))
    other, truth = (f(values, plan_of(lengths), window)[0] for f in (plain, exact))
    with pytest.raises(AssertionError):
        accurate(out, other, truth)


@pytest.mark.parametrize("backend", ["cpu", "documents"])
@pytest.mark.parametrize("window", [None, 30])
def test_gradients_can_be_written_into_column_blocks(window: int | None, backend: str) -> None:
    q, k, v, do = problem(70, 4, 2, 16)
    plan = plan_of((50, 20))
    settings = AttentionSettings(plan, window, 0.25, backend)
    out, saved = attention_forward(q, k, v, settings)
    want = attention_backward(do, q, k, v, out, saved, settings)
    joined = torch.empty(70, 8 * 16)
    dq, dk, dv = (x.unflatten(1, (-1, 16)) for x in joined.split((64, 32, 32), 1))
    attention_backward(do, q, k, v, out, saved, settings, (dq, dk, dv))
    for got, wanted in zip((dq, dk, dv), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["cpu", "documents"])
@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck_passes(window: int | None, backend: str) -> None:
    q, k, v = (torch.randn(9, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    plan = plan_of((4, 5))
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, plan, window=window, backend=backend), (q, k, v)
    )


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v, _ = problem(4, 3, 2, 8)
    with pytest.raises(ValueError, match="Hkv dividing Hq"):
        attention(q, k, v, plan_of((4,)))


@pytest.mark.parametrize("bounds", [[0], [1, 4], [0, 3], [0, 2, 2, 4], [0, 5, 4]])
def test_boundaries_that_do_not_rise_to_the_last_token_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="rise strictly"):
        AttentionPlan.from_cu_seqlens(torch.tensor(bounds), 4)


def test_a_plan_makes_its_blocks_and_masks_once() -> None:
    plan, like = plan_of((2000, 100)), torch.ones(1)
    blocks = plan.blocks(300, like)
    assert plan.blocks(300, like) is blocks
    masks = {id(b.mask) for b in blocks if b.mask is not None}
    assert len([b for b in blocks if b.mask is not None]) == 8
    # One shape at the start, one where the window has begun, one in between, one at the end.
    assert len(masks) == 4
    assert blocks[-1].mask is None
    assert plan.longest == 2000
    assert plan.equal_length is None
    assert plan_of((5, 5)).equal_length == 5
    assert plan.window(2000) is None
    assert plan.window(1999) == 1999


class Counted(TorchDispatchMode):
    """Names of the operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["cpu", "documents"])
def test_layers_neither_read_the_device_nor_rebuild_the_plan(backend: str) -> None:
    q, k, v, do = problem(600, 2, 1, 8)
    plan = plan_of((600,))

    def layer() -> None:
        settings = AttentionSettings(plan, 100, 0.3, backend)
        out, saved = attention_forward(q, k, v, settings)
        attention_backward(do, q, k, v, out, saved, settings)

    layer()
    with Counted() as counted:
        layer()
    forbidden = {"_local_scalar_dense", "nonzero", "arange", "masked_fill_"}
    assert not forbidden & set(counted.names)


@pytest.mark.parametrize("window", [None, 4, 50])
@pytest.mark.parametrize("newest", [1, 3, 12])
def test_cached_attention_is_the_end_of_the_whole(newest: int, window: int | None) -> None:
    q, k, v, _ = problem(12, 4, 2, 8)
    whole, _ = attention_forward(q, k, v, AttentionSettings(plan_of((12,)), window, 0.4))
    last = cached_attention(q[-newest:], k, v, window, 0.4)
    torch.testing.assert_close(last, whole[-newest:], rtol=1e-5, atol=1e-6)
