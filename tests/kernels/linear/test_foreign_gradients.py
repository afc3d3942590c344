"""What the engine did not make is never written to: tensors that autograd hands over."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.linear.columns import copied, output_columns
from kernels.linear.lora import lora_linear, lora_qkv, project_backward
from kernels.linear.projection import Projection
from kernels.linear.swiglu_mlp import lora_mlp
from kernels.nf4 import quantize

ROWS, WIDTH = 6, 64
Op = Callable[[Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True, params=["apart", "joined"])
def adapters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters beside the base product, as on a CPU, and within it, as on a GPU."""
    if request.param == "joined":
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
        monkeypatch.delenv("ENGINE_REFERENCE", raising=False)
        monkeypatch.setenv("ENGINE_INTERPRET", "1")


def adapted(out: int, inputs: int = WIDTH, rank: int = 4, quantized: bool = True) -> Projection:
    weight = torch.randn(out, inputs)
    a, b = torch.randn(rank, inputs).requires_grad_(), torch.randn(out, rank).requires_grad_()
    return Projection(quantize(weight) if quantized else weight, None, a, b, scale=0.5)


def _linear(out: int, quantized: bool) -> Op:
    projection = adapted(out, quantized=quantized)
    return lambda x: (lora_linear(x, projection),)


def _qkv(out: int, quantized: bool) -> Op:
    group = adapted(out, quantized=quantized), adapted(32), adapted(32)
    return lambda x: lora_qkv(x, *group)


def _mlp(out: int, quantized: bool) -> Op:
    gate, up = adapted(out, quantized=quantized), adapted(out)
    down = adapted(WIDTH, out, quantized=quantized)
    return lambda x: (lora_mlp(x, gate, up, down),)


@pytest.mark.parametrize("make", [_linear, _qkv, _mlp])
@pytest.mark.parametrize("out", [32, 64, 128])
@pytest.mark.parametrize("spare", [4, 16, 17])
@pytest.mark.parametrize("quantized", [True, False])
def test_neighbours_of_a_gradient_stay_bit_equal(
    make: Callable[[int, bool], Op], out: int, spare: int, quantized: bool
) -> None:
    """dy is columns of a wider matrix, as wide as if the rest were spare columns for adapters."""
    op = make(out, quantized)
    x = torch.randn(ROWS, WIDTH).requires_grad_()
    ys = op(x)
    whole = torch.randn(ROWS, sum(y.shape[1] for y in ys) + spare)
    before = whole.clone()
    dys = whole[:, : whole.shape[1] - spare].split([y.shape[1] for y in ys], 1)
    (dx,) = torch.autograd.grad(ys, x, dys)
    assert torch.equal(whole, before)
    (alone,) = torch.autograd.grad(op(x), x, [dy.clone() for dy in dys])
    torch.testing.assert_close(dx, alone, rtol=1e-5, atol=1e-4)


def test_an_input_within_a_wider_matrix_stays_as_it_is() -> None:
    op = _qkv(128, True)
    whole = torch.randn(ROWS, WIDTH + 48)
    before = whole.clone()
    op(whole[:, :WIDTH])
    assert torch.equal(whole, before)


def test_a_gradient_used_elsewhere_is_what_it_was_without_adapters_inside() -> None:
    """As when an output is concatenated with as many more columns as its adapter's rank."""
    projection = adapted(32)
    x = torch.randn(ROWS, WIDTH).requires_grad_()
    other = torch.randn(ROWS, 4).requires_grad_()
    factor = torch.randn(ROWS, 36)
    late = torch.tanh(other)  # made before y, so that its gradient is used after that of y
    (torch.cat((lora_linear(x, projection), late), 1) * factor).sum().backward()
    want = factor[:, 32:] * (1 - late.detach().square())
    assert other.grad is not None
    torch.testing.assert_close(other.grad, want)


def test_only_columns_lend_their_spare_ones() -> None:
    """The engine's own matrix is written behind its blocks, and only there."""
    projection = adapted(32)
    x, dy = torch.randn(ROWS, WIDTH), torch.randn(ROWS, 32)
    own = copied((dy,), (projection,))
    own.whole[:, 32:].fill_(7.0)
    with torch.no_grad():
        project_backward(own, x, (projection,), {})
    assert torch.equal(own.matrix, dy)
    changed = not bool((own.whole[:, 32:] == 7.0).all())
    assert changed == own.lends(16)
    assert own.lends(16) == (output_columns(2, (projection,), x).whole.shape[1] == 48)
