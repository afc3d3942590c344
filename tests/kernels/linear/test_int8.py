"""8-bit rows: rounding, single rows, and an 8-bit head."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.linear import int8
from kernels.linear.int8 import dequantize_int8, quantize_int8, rows_int8
from kernels.loss.linear_cross_entropy import head_logits, linear_cross_entropy

Accurate = Callable[[Tensor, Tensor, Tensor], None]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, columns) * torch.rand(rows, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_is_rounded_to_the_nearest_of_its_255_steps(dtype: torch.dtype) -> None:
    weight = matrix(37, 63, dtype)
    weight[5] = 0.0
    packed = quantize_int8(weight)
    assert packed.codes.abs().amax() == 127 and packed.shape == (37, 63)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    apart = (dequantize_int8(packed, torch.float64) - weight.double()).abs()
    assert bool((apart <= step * 0.5001).all())
    assert bool((dequantize_int8(packed)[5] == 0).all())


def test_slabs_and_another_device_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(100, 32)
    whole = quantize_int8(weight)
    monkeypatch.setattr(int8, "_SLAB_ROWS", 7)
    for parts in (quantize_int8(weight), quantize_int8(weight, torch.device("cpu"))):
        assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.absmax, whole.absmax)
    assert torch.equal(dequantize_int8(whole), dequantize_int8(quantize_int8(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_single_rows_are_those_of_the_whole(dtype: torch.dtype) -> None:
    packed = quantize_int8(matrix(50, 24))
    index = torch.tensor([3, 49, 3, 0])
    assert torch.equal(rows_int8(packed, index, dtype), dequantize_int8(packed, dtype)[index])
    assert rows_int8(packed, index[:0]).shape == (0, 24)


@pytest.mark.parametrize("vocabulary", [1, 63, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_with_a_head_of_8_bit_rows(
    vocabulary: int, dtype: torch.dtype, accurate: Accurate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.loss.linear_cross_entropy._SLAB_BYTES", 1)  # 64 rows, the fewest
    head = quantize_int8(matrix(vocabulary, 48, dtype))
    labels = torch.randint(0, vocabulary, (70,))
    labels[::4] = -100
    result = []
    values = torch.randn(70, 48).to(dtype)
    for kind in (None, dtype, torch.float64):
        hidden = values.to(kind or dtype, copy=True).requires_grad_(True)
        weight = head if kind is None else dequantize_int8(head, dtype).to(kind)
        trained = torch.nonzero(labels >= 0).squeeze(1)
        loss = linear_cross_entropy(hidden[trained], weight, labels[trained], tokens_per_chunk=32)
        loss.backward()
        assert hidden.grad is not None
        result.append((loss.detach(), hidden.grad))
    for ours, plain, truth in zip(*result, strict=True):
        accurate(ours, plain, truth)


def test_logits_of_a_head_of_8_bit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.loss.linear_cross_entropy._SLAB_BYTES", 1)
    hidden, head = torch.randn(5, 16).double(), quantize_int8(matrix(130, 16))
    expected = hidden @ dequantize_int8(head, torch.float64).T
    torch.testing.assert_close(head_logits(hidden, head), expected, rtol=1e-12, atol=1e-12)
    buffer = torch.full((5, 130), float("nan"), dtype=torch.float64)
    assert head_logits(hidden, head, buffer) is buffer
    torch.testing.assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, dtype=torch.int32)])
def test_only_matrices_of_numbers_with_a_point_are_quantised(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="floating-point matrix"):
        quantize_int8(weight)
