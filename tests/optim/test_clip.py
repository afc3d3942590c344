"""Clipping scales what is too long, leaves the rest, and never spreads a NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from optim import clip_grad_norm


def with_grads(*grads: Tensor | None) -> list[nn.Parameter]:
    params = []
    for grad in grads:
        param = nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(3))
        param.grad = grad
        params.append(param)
    return params


def joint_norm(params: list[nn.Parameter]) -> float:
    total = sum(p.grad.double().square().sum().item() for p in params if p.grad is not None)
    return math.sqrt(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_long_gradient_is_cut_to_the_limit(dtype: torch.dtype) -> None:
    grads = [torch.randn(shape).to(dtype) for shape in [(7,), (33, 65), (1, 1), (512, 100)]]
    before = [grad.clone() for grad in grads]
    params = with_grads(*grads)
    length = joint_norm(params)
    norm = clip_grad_norm(params, 0.5)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(length, rel=1e-6)
    rounding = 2 * torch.finfo(dtype).eps
    assert joint_norm(params) == pytest.approx(0.5, rel=rounding)
    for param, old in zip(params, before, strict=True):
        assert param.grad is not None
        expected = old.double() * (0.5 / length)
        torch.testing.assert_close(param.grad.double(), expected, rtol=rounding, atol=1e-7)


def test_a_short_gradient_keeps_its_bits() -> None:
    grads = [torch.randn(10) * 1e-3, torch.randn(4, 4) * 1e-3]
    before = [grad.clone() for grad in grads]
    clip_grad_norm(with_grads(*grads), 1.0)
    assert all(torch.equal(now, old) for now, old in zip(grads, before, strict=True))


def test_a_zero_gradient_stays_zero() -> None:
    grad = torch.zeros(5)
    assert clip_grad_norm(with_grads(grad), 1.0).item() == 0.0
    assert torch.equal(grad, torch.zeros(5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_left_as_they_are(bad: float) -> None:
    grads = [torch.randn(5) * 100, torch.tensor([1.0, bad])]
    before = [grad.clone() for grad in grads]
    norm = clip_grad_norm(with_grads(*grads), 1.0)
    assert not torch.isfinite(norm)
    assert torch.equal(grads[0], before[0])
    assert grads[1][0] == 1.0


def test_an_infinite_limit_only_measures() -> None:
    grad = torch.full((4,), 3.0)
    assert clip_grad_norm(with_grads(grad), math.inf).item() == 6.0
    assert torch.equal(grad, torch.full((4,), 3.0))


def test_parameters_without_gradient_do_not_count() -> None:
    params = with_grads(torch.full((4,), 3.0), None)
    assert clip_grad_norm(iter(params), 6.0).item() == 6.0
    assert clip_grad_norm(with_grads(None), 1.0).item() == 0.0
    assert clip_grad_norm(params[0], 1.0).item() == 6.0


def test_many_small_values_add_up_even_if_they_are_bf16() -> None:
    grad = torch.full((1 << 20,), 1e-3, dtype=torch.bfloat16)
    norm = clip_grad_norm(with_grads(grad), 100.0)
    assert norm.item() == pytest.approx(grad[0].item() * 1024, rel=1e-6)


def test_large_gradients_do_not_overflow_the_norm() -> None:
    grads = [torch.full((4,), 1e30), torch.full((12,), 1e30)]
    assert clip_grad_norm(with_grads(*grads), 1.0).item() == pytest.approx(4e30)
    assert grads[0][0].item() == pytest.approx(0.25)


def test_the_same_gradients_give_the_same_bits() -> None:
    grads = [torch.randn(size) for size in (1000, 17, 65536)]
    norms = {clip_grad_norm(with_grads(*(g.clone() for g in grads)), 1.0).item() for _ in range(5)}
    assert len(norms) == 1


def test_a_limit_that_is_not_positive_is_refused() -> None:
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            clip_grad_norm(with_grads(torch.ones(2)), limit)
