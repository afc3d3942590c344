"""The planar order is a permutation of bitsandbytes' codes."""

from __future__ import annotations

import pytest
import torch

from kernels.nf4 import dequantize, quantize
from kernels.nf4.dequantize_triton import nf4_dequantize
from kernels.nf4.planar import from_planar, has_planar_order, to_planar

SHAPES = [(1, 64), (3, 64), (33, 320), (130, 192), (5000, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("double_quant", [True, False])
def test_there_and_back_is_the_same_weight(
    shape: tuple[int, int], block_size: int, double_quant: bool
) -> None:
    weight = quantize(torch.randn(shape), block_size, double_quant)
    back = from_planar(to_planar(weight))
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.absmax, weight.absmax)
    assert torch.equal(dequantize(back), dequantize(weight))
    assert (back.shape, back.block_size, back.dtype) == (shape, block_size, torch.float32)


def test_each_nibble_is_where_the_docstring_says() -> None:
    rows, columns = 5, 192
    weight = quantize(torch.randn(rows, columns))
    planar = to_planar(weight)
    flat = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).view(rows, columns)
    words = planar.codes.to(torch.int32) & 0xFFFF
    for block in range(columns // 64):
        for plane in range(4):
            first = 64 * block + 16 * plane
            nibbles = (words[block] >> (4 * plane)) & 15
            assert torch.equal(nibbles, flat[:, first : first + 16].to(torch.int32))
    assert torch.equal(planar.absmax.T.reshape(-1), weight.absmax)


def test_planar_order_takes_no_more_memory() -> None:
    weight = quantize(torch.randn(256, 512))
    assert to_planar(weight).nbytes == weight.nbytes


@pytest.mark.parametrize(
    ("shape", "block_size"), [((64,), 64), ((3, 63), 64), ((2, 32), 64), ((4, 64), 32)]
)
def test_a_weight_without_whole_blocks_is_refused(shape: tuple[int, ...], block_size: int) -> None:
    weight = quantize(torch.randn(shape), block_size)
    assert not has_planar_order(weight)
    with pytest.raises(ValueError, match="planar"):
        to_planar(weight)


def test_reference_decodes_the_planar_order_too() -> None:
    weight = quantize(torch.randn(7, 128))
    planar = to_planar(weight).to("cpu")
    assert planar.numel() == 7 * 128
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(nf4_dequantize(planar, dtype), dequantize(weight, dtype))
