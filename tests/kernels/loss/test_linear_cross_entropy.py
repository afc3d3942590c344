"""Head and loss in chunks against torch's own on whole logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.loss.cross_entropy import LossTerms
from kernels.loss.linear_cross_entropy import chunk_tokens, linear_cross_entropy

Accurate = Callable[[Tensor, Tensor, Tensor], None]


def loss_of(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: float | None = None, **options: Any
) -> Tensor:
    """The op's loss of the trained tokens among these."""
    trained = torch.nonzero(labels >= 0).squeeze(1)
    return linear_cross_entropy(hidden[trained], weight, labels[trained], num_items, **options)


def problem(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    labels[::3] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients by autograd over whole logits in `dtype`, the loss wide as ours is."""
    h, w = (x.to(dtype).detach().requires_grad_(True) for x in (hidden, weight))
    logits = (h @ w.T).to(torch.promote_types(dtype, torch.float32))
    count = max(1, int((labels >= 0).sum()))
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
    return [loss.detach(), *torch.autograd.grad(loss, (h, w))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "per_chunk"),
    [(2, 4, 1, None), (63, 32, 257, 64), (100, 64, 2000, 17), (257, 16, 63, 100)],
)
def test_loss_and_gradients_are_accurate(
    rows: int,
    width: int,
    vocabulary: int,
    per_chunk: int | None,
    dtype: torch.dtype,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    hidden, weight, labels = problem(rows, width, vocabulary, dtype, device)
    h, w = (x.clone().requires_grad_(True) for x in (hidden, weight))
    loss = loss_of(h, w, labels, tokens_per_chunk=per_chunk)
    mine = [loss.detach(), *torch.autograd.grad(loss, (h, w))]
    assert loss.dtype == torch.float32
    assert mine[1].dtype == mine[2].dtype == dtype
    for ours, other, truth in zip(
        mine,
        plain(hidden, weight, labels, dtype),
        plain(hidden, weight, labels, torch.float64),
        strict=True,
    ):
        accurate(ours, other, truth)


def test_terms_and_weights_pass_gradcheck_in_chunks(device: torch.device) -> None:
    hidden, weight, labels = problem(11, 5, 23, torch.float64, device)
    trained = torch.nonzero(labels >= 0).squeeze(1)
    weights = torch.rand(len(trained), device=device, dtype=torch.float64) * 2

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(
            h, w, labels[trained], 3.5, 4, weights, LossTerms(label_smoothing=0.1, z_loss=1e-2)
        )

    h, w = hidden[trained].requires_grad_(True), weight.requires_grad_(True)
    assert torch.autograd.gradcheck(loss, (h, w))
    logits = h @ w.T
    each = F.cross_entropy(logits, labels[trained], reduction="none", label_smoothing=0.1)
    each = (each + 1e-2 * logits.logsumexp(1).square()) * weights
    torch.testing.assert_close(loss(h, w), each.sum() / 3.5)


def test_loss_without_gradients_is_the_same(way: str, device: torch.device) -> None:
    hidden, weight, labels = problem(40, 16, 300, torch.float32, device)
    with_gradient = loss_of(hidden.clone().requires_grad_(True), weight, labels)
    without = loss_of(hidden, weight, labels)
    torch.testing.assert_close(without, with_gradient.detach(), rtol=1e-6, atol=0)


def test_a_frozen_head_gets_no_gradient_and_costs_two_products_a_chunk() -> None:
    hidden, weight, labels = problem(60, 8, 50, torch.float32, torch.device("cpu"))
    h = hidden.requires_grad_(True)
    with Counted() as counted:
        loss_of(h, weight, labels, 40.0, tokens_per_chunk=20).backward()
    assert counted.number("mm", "addmm") == 2 * 2
    assert weight.grad is None


def test_gradient_scales_with_that_of_the_loss() -> None:
    hidden, weight, labels = problem(30, 8, 50, torch.float32, torch.device("cpu"))
    h, w = hidden.requires_grad_(True), weight.requires_grad_(True)
    once = torch.autograd.grad(loss_of(h, w, labels, 7.0), (h, w))
    thrice = torch.autograd.grad(3 * loss_of(h, w, labels, 7.0), (h, w))
    torch.testing.assert_close(thrice, tuple(3 * g for g in once))


def test_no_trained_row_gives_zero_and_zero_gradients(way: str, device: torch.device) -> None:
    hidden, weight, labels = problem(5, 8, 50, torch.float32, device)
    h, w = hidden.requires_grad_(True), weight.requires_grad_(True)
    loss = loss_of(h, w, torch.full_like(labels, -100))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert h.grad is not None
    assert w.grad is not None
    assert not h.grad.any()
    assert not w.grad.any()


def test_fp16_gradients_of_a_large_batch_do_not_underflow(way: str, device: torch.device) -> None:
    hidden, weight, labels = problem(30, 16, 4000, torch.float16, device)
    many = 50_000.0
    h = hidden.clone().requires_grad_(True)
    loss_of(h, weight * 30, labels, many).backward()
    wide = hidden.double().requires_grad_(True)
    F.cross_entropy(
        wide @ (weight * 30).double().T, labels, ignore_index=-100, reduction="sum"
    ).backward()
    assert h.grad is not None
    assert wide.grad is not None
    error = (h.grad.double() * many - wide.grad).abs().max() / wide.grad.abs().max()
    assert float(error) < 5e-3


def test_a_label_outside_the_vocabulary_is_refused_on_a_cpu() -> None:
    hidden, weight, labels = problem(5, 8, 50, torch.float32, torch.device("cpu"))
    labels[1] = 50
    with pytest.raises(ValueError, match="label 50 is outside a vocabulary of 50"):
        loss_of(hidden, weight, labels)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, labels = problem(5, 8, 50, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, labels[:4])


def test_reference_passes_gradcheck() -> None:
    hidden, weight, labels = problem(7, 3, 5, torch.float64, torch.device("cpu"))
    h, w = hidden.requires_grad_(True), weight.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda h, w: loss_of(h, w, labels, tokens_per_chunk=2), (h, w))


def test_chunks_keep_to_their_budget() -> None:
    for itemsize in (2, 4):
        assert chunk_tokens(49152, itemsize, gpu=False) == 64 * 2**20 // (49152 * 4)
        assert chunk_tokens(10**9, itemsize, gpu=False) == 64


@pytest.mark.parametrize("vocab_size", [1000, 32000, 49152, 128256, 151936, 262144, 10**7])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_gpu_takes_multiples_of_1024_tokens(vocab_size: int, itemsize: int) -> None:
    tokens = chunk_tokens(vocab_size, itemsize, gpu=True)
    assert tokens % 1024 == 0
    assert tokens == 1024 or tokens * vocab_size * itemsize <= 256 * 2**20
    assert (tokens + 1024) * vocab_size * itemsize > 256 * 2**20


class Counted(TorchDispatchMode):
    """Counts the operations that run inside it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def number(self, *names: str) -> int:
        return sum(name in names for name in self.names)


@pytest.mark.parametrize("chunks", [1, 7])
def test_nothing_waits_for_the_device(chunks: int) -> None:
    hidden, weight, targets = problem(60, 8, 50, torch.float32, torch.device("cpu"))
    given = hidden.requires_grad_(True), weight, targets.abs() % 50, 40.0, -(-60 // chunks)
    with Counted() as counted:
        linear_cross_entropy(*given).backward()
    assert counted.number("nonzero") == 0
    assert counted.number("_local_scalar_dense", "item", "is_nonzero", "_assert_async") == 0
