"""8-bit rows: rounding, single rows, and an 8-bit head."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.linear import int8
from kernels.linear.int8 import dequantize_int8, quantize_int8, rows_int8
from kernels.loss.linear_cross_entropy import head_logits, linear_cross_entropy
from kernels.runtime.triton_support import launch

Accurate = Callable[[Tensor, Tensor, Tensor], None]
Mutant = Callable[[ModuleType, str, str], ModuleType]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (5, 257), (3, 2000), (1, 2049), (130, 16)])
def test_decoding_is_accurate_into_columns_of_a_wider_matrix(
    shape: tuple[int, int], dtype: torch.dtype, way: str, device: torch.device, accurate: Accurate
) -> None:
    packed = quantize_int8(matrix(*shape).to(device))
    memory = torch.full((shape[0], shape[1] + 16), torch.nan, dtype=dtype, device=device)
    out = dequantize_int8(packed, out=memory[:, : shape[1]])
    plain = packed.codes.to(dtype) * (packed.absmax.to(dtype) / 127).unsqueeze(1)
    truth = packed.codes.double() * (packed.absmax.double() / 127).unsqueeze(1)
    accurate(out, plain, truth)
    assert memory[:, shape[1] :].isnan().all()
    assert torch.equal(dequantize_int8(packed, dtype), out)


@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (5, 2000), (70, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_and_reference_decode_to_the_same_bits(
    shape: tuple[int, int],
    dtype: torch.dtype,
    triton_on: None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = quantize_int8(matrix(*shape).to(device))
    packed.absmax[0] = 0.0
    ours = dequantize_int8(packed, dtype)
    monkeypatch.setenv("ENGINE_REFERENCE", "1")
    assert torch.equal(ours, dequantize_int8(packed, dtype))


def test_a_slab_of_the_head_is_decoded_by_one_launch(
    triton_on: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def counted(kernel: Any, grid: tuple[int, ...], operations: float = 0.0) -> Any:
        launched.append((kernel.__name__, grid))
        return launch(kernel, grid, operations)

    monkeypatch.setattr(int8, "launch", counted)
    monkeypatch.setattr("kernels.loss.linear_cross_entropy._SLAB_BYTES", 1)  # 64 rows, the fewest
    monkeypatch.setattr("kernels.loss.linear_cross_entropy._GPU_SLAB_BYTES", 1)
    head = quantize_int8(matrix(130, 48).to(device))
    hidden = torch.randn(20, 48, device=device, requires_grad=True)
    labels = torch.randint(0, 130, (20,), device=device)
    linear_cross_entropy(hidden, head, labels, tokens_per_chunk=10).backward()
    # 2 chunks, logits and gradient, 3 slabs.
    assert [name for name, _ in launched] == ["dequantize_int8_kernel"] * 12


def test_rows_beyond_two_to_the_31_are_reached(triton_on: None, device: torch.device) -> None:
    stride = 2**30 + 16
    # numpy's memory is not touched until it is written, so this costs a few pages.
    memory = torch.from_numpy(np.empty(2 * stride + 64, dtype=np.float16)).to(device)
    packed = quantize_int8(matrix(3, 64).to(device))
    far = memory.as_strided((3, 64), (stride, 1))
    dequantize_int8(packed, out=far)
    assert torch.equal(far, dequantize_int8(packed, torch.float16))


def test_an_out_that_does_not_fit_is_refused() -> None:
    packed = quantize_int8(matrix(4, 6))
    for out in (torch.empty(4, 5), torch.empty(6, 4).T):
        with pytest.raises(ValueError, match="elements of a row adjacent"):
            dequantize_int8(packed, out=out)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask=row < rows, other=0.0), 127.0)", "mask=row < rows, other=0.0), 128.0)"),
        ("row[:, None] * codes_row", "row[:, None] * BLOCK"),
        ("target = out_ptr + row[:, None] * out_row", "target = out_ptr + row[:, None] * width"),
        ("cdiv(width, block)))", "width // block))"),
    ],
)
def test_a_planted_fault_breaks_the_rule(
    old: str, new: str, triton_on: None, device: torch.device, accurate: Accurate, mutant: Mutant
) -> None:
    packed = quantize_int8(matrix(5, 2100).to(device))
    memory = torch.zeros(5, 2116, device=device)
    out = mutant(int8, old, new).dequantize_int8(packed, out=memory[:, :2100])
    truth = packed.codes.double() * (packed.absmax.double() / 127).unsqueeze(1)
    with pytest.raises(AssertionError):
        accurate(out, truth.float(), truth)


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
