"""Rotary embedding, reference and Triton, against float64."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.elementwise import rope

Accurate = Callable[[Tensor, Tensor, Tensor], None]
Mutant = Callable[[ModuleType, str, str], ModuleType]


def tables(tokens: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = torch.rand(tokens, dim // 2, device=device) * 6
    return angles.cos(), angles.sin()


def formula(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The rotation as Hugging Face's Llama computes it, in the dtype of x."""
    cos, sin = (torch.cat((t, t), -1).unsqueeze(1).to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    half_turned = torch.cat((-second, first), -1)
    return x * cos + half_turned * (-sin if inverse else sin)


def heads_of(matrix: Tensor, q_heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """q and k as neighbouring column blocks of one matrix."""
    q, k = matrix[:, : (q_heads + kv_heads) * dim].split((q_heads * dim, kv_heads * dim), 1)
    return q.unflatten(1, (q_heads, dim)), k.unflatten(1, (kv_heads, dim))


def check(
    module: ModuleType,
    accurate: Accurate,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    inverse: bool = False,
) -> None:
    tokens, q_heads, kv_heads, dim = shape
    matrix = torch.randn(tokens, (q_heads + 2 * kv_heads) * dim, device=device).to(dtype)
    cos, sin = tables(tokens, dim, device)
    rotated = matrix.clone()
    q, k = heads_of(rotated, q_heads, kv_heads, dim)
    module.rope_qk_(q, k, cos, sin, inverse=inverse)
    for mine, before in zip((q, k), heads_of(matrix, q_heads, kv_heads, dim), strict=True):
        truth = formula(before.double(), cos, sin, inverse)
        accurate(mine, formula(before, cos, sin, inverse), truth)
    untouched = (q_heads + kv_heads) * dim
    assert torch.equal(rotated[:, untouched:], matrix[:, untouched:])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (63, 4, 2, 64), (5, 32, 8, 128), (7, 5, 5, 80), (3, 2, 1, 256)]
)
def test_rotation_is_accurate(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    inverse: bool,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    check(rope, accurate, shape, dtype, device, inverse)


def test_one_tensor_turns_as_the_pair_does(way: str, device: torch.device) -> None:
    cos, sin = tables(9, 32, device)
    q, k = torch.randn(9, 3, 32, device=device), torch.randn(9, 1, 32, device=device)
    alone = [rope.rope_(x.clone(), cos, sin) for x in (q, k)]
    rope.rope_qk_(q, k, cos, sin)
    torch.testing.assert_close(alone, [q, k], rtol=0, atol=1e-6)


def test_tensors_apart_turn_as_neighbours_do(way: str, device: torch.device) -> None:
    cos, sin = tables(9, 32, device)
    matrix = torch.randn(9, 4 * 32, device=device)
    q, k = (x.contiguous() for x in heads_of(matrix, 3, 1, 32))
    rope.rope_qk_(q, k, cos, sin)
    rope.rope_qk_(*heads_of(matrix, 3, 1, 32), cos, sin)
    torch.testing.assert_close(list(heads_of(matrix, 3, 1, 32)), [q, k], rtol=0, atol=1e-6)


def test_out_receives_the_rotation_and_the_source_stays(way: str, device: torch.device) -> None:
    cos, sin = tables(9, 32, device)
    q, k = torch.randn(9, 3, 32, device=device), torch.randn(9, 1, 32, device=device)
    before = q.clone(), k.clone()
    joined = torch.empty(9, 4 * 32 + 8, device=device)
    rope.rope_qk_(q, k, cos, sin, inverse=True, out=heads_of(joined, 3, 1, 32))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    rope.rope_qk_(q, k, cos, sin, inverse=True)
    torch.testing.assert_close(list(heads_of(joined, 3, 1, 32)), [q, k], rtol=0, atol=1e-6)


def test_part_of_a_head_can_be_turned(way: str, device: torch.device) -> None:
    cos, sin = tables(5, 16, device)
    x = torch.randn(5, 2, 64, device=device)
    want = rope.rope_(x[..., :16].contiguous(), cos, sin)
    rest = x[..., 16:].clone()
    rope.rope_(x[..., :16], cos, sin)
    torch.testing.assert_close(x[..., :16], want, rtol=0, atol=1e-6)
    assert torch.equal(x[..., 16:], rest)


def test_turning_back_restores_the_values(way: str, device: torch.device) -> None:
    cos, sin = tables(5, 64, device)
    x = torch.randn(5, 2, 64, device=device)
    back = rope.rope_(rope.rope_(x.clone(), cos, sin), cos, sin, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.randn(5, 2, 64)
    cos, sin = tables(5, 32, x.device)
    with pytest.raises(ValueError, match="do not fit"):
        rope.rope_(x, cos, sin)


def test_tokens_beyond_two_to_the_31_are_reached(triton_on: None, device: torch.device) -> None:
    stride = 2**30 + 8
    # numpy's memory is not touched until it is written, so these 4 GiB cost three pages.
    memory = torch.from_numpy(np.empty(2 * stride + 64, dtype=np.float16)).to(device)
    x = memory.as_strided((3, 2, 32), (stride, 32, 1))
    x.copy_(torch.randn(3, 2, 32))
    cos, sin = tables(3, 32, device)
    want = rope.rope_(x.clone(), cos, sin)
    assert torch.equal(rope.rope_(x, cos, sin), want)


def test_reference_passes_gradcheck() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in tables(3, 8, x.device))
    assert torch.autograd.gradcheck(lambda x: rope.rope(x, cos, sin), (x,))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("first * cos - second * sin", "first * cos + second * sin"),
        ("second * cos + first * sin", "second * cos"),
        ("        sin = -sin", "        cos = -cos"),
        ("groups = cdiv(q.shape[1], heads) + cdiv(k.shape[1], heads)", "groups = 1"),
    ],
)
def test_a_planted_fault_breaks_the_rule(
    old: str, new: str, triton_on: None, device: torch.device, accurate: Accurate, mutant: Mutant
) -> None:
    broken = mutant(rope, old, new)
    with pytest.raises(AssertionError):
        check(broken, accurate, (5, 4, 2, 32), torch.float32, device, inverse=True)
