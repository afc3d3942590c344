"""NF4 against bitsandbytes on the CPU: the same bits in codes, scales and decoded values."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor

from kernels.adamw8bit.dynamic_map import Rounding, dynamic_map, quantize_blocks
from kernels.nf4 import BLOCK_SIZES, NF4_CODE, NF4Weight, dequantize, encode, quantize

pytestmark = pytest.mark.interop

SHAPES = [(1,), (2,), (63,), (64,), (257,), (7, 9), (3, 2000), (576, 192), (301, 1003), (5, 7, 13)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bits(w: Tensor, weight: NF4Weight, block_size: int, double_quant: bool) -> None:
    packed, state = bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )
    assert torch.equal(weight.packed, packed.view(-1))
    assert torch.equal(weight.absmax, state.absmax)
    if double_quant:
        assert weight.nested_absmax is not None
        assert weight.nested_offset is not None
        assert torch.equal(weight.nested_absmax, state.state2.absmax)
        assert torch.equal(weight.nested_offset, state.offset)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantised_bits_are_equal(
    shape: tuple[int, ...], dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    w = (torch.randn(shape) * 0.05).to(dtype)
    if len(shape) > 1:
        w[0] = 0
    assert_same_bits(w, quantize(w, block_size, double_quant), block_size, double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("numel", [2, 64, 1000, 576 * 192, 300_002])
def test_decoded_bits_are_equal(dtype: torch.dtype, double_quant: bool, numel: int) -> None:
    # Flat and of even length: for a matrix whose rows are not whole blocks, bitsandbytes 0.50's own
    # AVX-512 routine decodes with the scales of other blocks, and for odd lengths it compiles code.
    w = (torch.randn(numel) * 0.05).to(dtype)
    packed, state = bnb.quantize_4bit(w, compress_statistics=double_quant, quant_type="nf4")
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(dequantize(quantize(w, double_quant=double_quant)), theirs.view(-1))


def test_values_next_to_every_threshold_get_the_same_code() -> None:
    thresholds = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    bits = thresholds.view(torch.int32)[:, None] + torch.arange(-200, 201, dtype=torch.int32)
    values = bits.view(torch.float32).flatten()
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
    for scale in (1.0, 0.37, 123.4567, 3e-5):
        w = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1) * scale
        assert_same_bits(w, quantize(w, double_quant=False), 64, False)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_equal(signed: bool) -> None:
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_grid_rounding_is_bitsandbytes_cpu_rounding(signed: bool) -> None:
    edges = (torch.arange(65536, dtype=torch.float64) - 0.5).div(32767.5).sub(1).float()[1:]
    bits = edges.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    values = bits.view(torch.float32).nan_to_num(0.0).clamp(-1, 1).flatten()
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % 255)).view(-1, 255)
    for scale in (1.0, 0.37, 1e-6):
        x = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1) * scale
        theirs, state = bnb.quantize_blockwise(
            x, code=bnb.create_dynamic_map(signed), blocksize=256
        )
        codes, absmax = quantize_blocks(x, signed=signed, rounding="grid")
        assert torch.equal(codes, theirs)
        assert torch.equal(absmax, state.absmax)


def test_the_comparison_notices_another_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(values: Tensor, *, signed: bool, rounding: Rounding) -> tuple[Tensor, Tensor]:
        return quantize_blocks(values, signed=signed, rounding="nearest")

    monkeypatch.setattr(encode, "quantize_blocks", nearest)
    w = torch.randn(4096, 256)
    with pytest.raises(AssertionError):
        assert_same_bits(w, quantize(w), 64, True)
