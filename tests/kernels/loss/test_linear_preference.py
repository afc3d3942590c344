"""Log-probabilities of sequences in chunks against whole logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels.loss.linear_preference as op
from kernels.linear.int8 import dequantize_int8, quantize_int8
from kernels.loss.linear_preference import sequence_log_probs, sequence_log_probs_reference

Accurate = Callable[[Tensor, Tensor, Tensor], None]
Slots = tuple[Tensor, tuple[int, int]]


def slots_of(counts: Sequence[int], device: torch.device | str = "cpu") -> Slots:
    longest = max(counts)
    slots = [row * longest + index for row, count in enumerate(counts) for index in range(count)]
    return torch.tensor(slots, device=device), (len(counts), longest)


def problem(
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    factors = torch.randn(rows, generator=generator)
    return (
        hidden.to(device, dtype),
        weight.to(device, dtype),
        targets.to(device),
        factors.to(device),
    )


def plain(
    parts: tuple[Tensor, ...], counts: Sequence[int], dtype: torch.dtype, trained: bool
) -> list[Tensor]:
    """The sums and the gradients of a loss over them, by autograd over whole logits."""
    hidden, weight, targets, factors = parts
    h, w = hidden.to(dtype).requires_grad_(True), weight.to(dtype).requires_grad_(trained)
    slots, shape = slots_of(counts, hidden.device)
    sums = sequence_log_probs_reference(h, w, targets, slots, shape)
    loss = (sums * factors[: len(counts)].to(sums.dtype)).sum()
    return [sums.detach(), *torch.autograd.grad(loss, (h, w) if trained else (h,))]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("counts", "width", "vocabulary", "per_chunk"),
    [((1,), 4, 1, None), ((63, 1, 0, 20), 32, 257, 64), ((40, 7), 16, 300, 17)],
)
def test_sums_and_gradients_are_accurate(
    counts: tuple[int, ...],
    width: int,
    vocabulary: int,
    per_chunk: int | None,
    dtype: torch.dtype,
    trained: bool,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    parts = problem(sum(counts), width, vocabulary, dtype, device)
    hidden, weight, targets, factors = parts
    h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(trained)
    sums = sequence_log_probs(h, w, targets, *slots_of(counts, device), per_chunk)
    assert sums.dtype == torch.float32
    loss = (sums * factors[: len(counts)]).sum()
    mine = [sums.detach(), *torch.autograd.grad(loss, (h, w) if trained else (h,))]
    other, truth = (plain(parts, counts, t, trained) for t in (dtype, torch.float64))
    for ours, theirs, exact in zip(mine, other, truth, strict=True):
        accurate(ours, theirs, exact)
    assert all(part.dtype == dtype for part in mine[1:])


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_pass_gradcheck(trained: bool) -> None:
    hidden, weight, targets, _ = problem(9, 5, 11, torch.float64)
    slots, shape = slots_of((4, 5))
    inputs = hidden.requires_grad_(True), weight.requires_grad_(trained)
    assert torch.autograd.gradcheck(
        lambda h, w: sequence_log_probs(h, w, targets, slots, shape, 4).square(), inputs
    )


def test_a_frozen_head_may_be_in_8_bit_rows() -> None:
    hidden, weight, targets, _ = problem(20, 16, 90, torch.float32)
    slots, shape = slots_of((9, 11))
    small = quantize_int8(weight)
    grads: list[Tensor] = []
    sums: list[Tensor] = []
    for head in (small, dequantize_int8(small, torch.float32)):
        h = hidden.clone().requires_grad_(True)
        sums.append(sequence_log_probs(h, head, targets, slots, shape, 8))
        grads += torch.autograd.grad(sums[-1].prod(), h)
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_nothing_to_train_gives_the_same_sums_without_a_gradient() -> None:
    hidden, weight, targets, _ = problem(12, 8, 30, torch.float32)
    slots, shape = slots_of((5, 7))
    h = hidden.clone().requires_grad_(True)
    with_gradient = sequence_log_probs(h, weight, targets, slots, shape)
    without = sequence_log_probs(hidden, weight, targets, slots, shape)
    torch.testing.assert_close(without, with_gradient.detach(), rtol=1e-6, atol=0)
    assert not without.requires_grad


def test_a_fault_in_the_backward_pass_is_noticed(
    mutant: Callable[[ModuleType, str, str], ModuleType], accurate: Accurate
) -> None:
    parts, counts = problem(10, 8, 40, torch.float32), (4, 6)
    hidden, weight, targets, factors = parts
    faulty = mutant(op, "slots // max(1, ctx.shape[1])", "0 * slots")
    h = hidden.clone().requires_grad_(True)
    sums = faulty.sequence_log_probs(h, weight, targets, *slots_of(counts))
    (grad,) = torch.autograd.grad((sums * factors[:2]).sum(), h)
    other, truth = (plain(parts, counts, t, False)[1] for t in (torch.float32, torch.float64))
    with pytest.raises(AssertionError):
        accurate(grad, other, truth)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets, _ = problem(6, 8, 10, torch.float32)
    slots, shape = slots_of((2, 4))
    with pytest.raises(ValueError, match="do not fit"):
        sequence_log_probs(hidden, weight, targets[:-1], slots, shape)
    with pytest.raises(ValueError, match="do not fit"):
        sequence_log_probs(hidden, weight[:, :-1], targets, slots, shape)
    with pytest.raises(ValueError, match="outside a vocabulary"):
        sequence_log_probs(hidden, weight, targets + 10, slots, shape)
