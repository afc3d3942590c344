"""Distillation in chunks against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear.int8 import dequantize_int8, quantize_int8
from kernels.loss.linear_distillation import linear_distillation


def problem(rows: int = 13, vocab: int = 37, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, 24), (vocab, 24), (rows, 16), (vocab, 16)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def truth(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    student = F.log_softmax(hidden @ weight.T, 1)
    return F.kl_div(
        student, F.log_softmax(teacher @ teacher_weight.T, 1), log_target=True, reduction="sum"
    )


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_loss_and_gradient_equal_the_formula(chunk: int) -> None:
    hidden, weight, teacher, teacher_weight = problem()
    hidden.requires_grad_(True)
    want = truth(hidden, weight, teacher, teacher_weight) / 7
    (want_grad,) = torch.autograd.grad(want * 3, hidden)
    got = linear_distillation(hidden, weight, teacher, teacher_weight, 7, tokens_per_chunk=chunk)
    (got_grad,) = torch.autograd.grad(got * 3, hidden)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-10, atol=1e-13)


def test_weights_of_tokens_multiply_their_divergences() -> None:
    hidden, weight, teacher, teacher_weight = problem()
    weights = torch.linspace(0.0, 2.0, len(hidden), dtype=torch.float64)
    hidden.requires_grad_(True)
    log_p, log_q = F.log_softmax(hidden @ weight.T, 1), F.log_softmax(teacher @ teacher_weight.T, 1)
    want = (F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1) * weights).sum() / 7
    (want_grad,) = torch.autograd.grad(want, hidden)
    got = linear_distillation(hidden, weight, teacher, teacher_weight, 7, 4, weights)
    (got_grad,) = torch.autograd.grad(got, hidden)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-10, atol=1e-13)


def test_a_model_has_nothing_to_learn_from_itself() -> None:
    hidden, weight, *_ = problem(dtype=torch.float32)
    hidden.requires_grad_(True)
    loss = linear_distillation(hidden, weight, hidden.detach(), weight)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) < 1e-6


def test_heads_in_8_bit_rows_are_those_that_they_decode_to() -> None:
    hidden, weight, teacher, teacher_weight = problem(dtype=torch.float32)
    small, small_teacher = quantize_int8(weight), quantize_int8(teacher_weight)
    hidden.requires_grad_(True)
    got = linear_distillation(hidden, small, teacher, small_teacher)
    (got_grad,) = torch.autograd.grad(got, hidden)
    dense = [dequantize_int8(head, torch.float32) for head in (small, small_teacher)]
    want = linear_distillation(hidden, dense[0], teacher, dense[1])
    (want_grad,) = torch.autograd.grad(want, hidden)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grad, want_grad)


def test_what_cannot_be_distilled_is_refused() -> None:
    hidden, weight, teacher, teacher_weight = problem()
    with pytest.raises(ValueError, match="vocabulary"):
        linear_distillation(hidden, weight, teacher, teacher_weight[:-1])
    with pytest.raises(ValueError, match="tokens of the student"):
        linear_distillation(hidden, weight, teacher[:-1], teacher_weight)
    with pytest.raises(ValueError, match="frozen head"):
        linear_distillation(hidden, weight.requires_grad_(True), teacher, teacher_weight)
