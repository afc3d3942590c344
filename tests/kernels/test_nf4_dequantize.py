"""The Triton kernels decode NF4 to the very bits of the torch reference, for any shape."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from kernels import nf4_decode, nf4_dequantize
from kernels.nf4 import NF4_CODE, NF4Weight, dequantize, quantize
from kernels.nf4_dequantize import dequantize_planar
from kernels.nf4_layout import AnyNF4, has_planar_order, to_planar
from kernels.triton_support import tl

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1,), (2,), (63,), (257,), (2000,), (5, 63), (7, 64), (33, 320), (130, 128)]

pytestmark = pytest.mark.usefixtures("triton_on")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal down to the sign of zero."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def orders(weight: NF4Weight) -> list[AnyNF4]:
    return [weight, to_planar(weight)] if has_planar_order(weight) else [weight]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_bit_equal_to_the_reference(
    shape: tuple[int, ...], double_quant: bool, dtype: torch.dtype, device: torch.device
) -> None:
    weight = quantize(torch.randn(shape, device=device), double_quant=double_quant)
    expected = dequantize(weight, dtype)
    for order in orders(weight):
        assert same_bits(nf4_dequantize.nf4_dequantize(order, dtype), expected)
        if len(shape) == 2:
            turned = nf4_dequantize.nf4_dequantize(order, dtype, transposed=True)
            assert turned.is_contiguous()
            assert same_bits(turned, expected.T)


@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_every_block_size_is_bit_equal_to_the_reference(
    block_size: int, device: torch.device
) -> None:
    weight = quantize(torch.randn(67, 192, device=device), block_size)
    for order in orders(weight):
        for dtype in DTYPES:
            decoded = nf4_dequantize.nf4_dequantize(order, dtype)
            assert same_bits(decoded, dequantize(weight, dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # fp16 of 1e30
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7, 3e4, 1e30])
def test_tiny_and_huge_scales_round_as_the_reference_does(
    scale: float, device: torch.device
) -> None:
    weight = quantize(torch.randn(9, 128, device=device) * scale, double_quant=False)
    for order in orders(weight):
        for dtype in DTYPES:
            decoded = nf4_dequantize.nf4_dequantize(order, dtype)
            assert same_bits(decoded, dequantize(weight, dtype))


def test_scales_that_decode_below_zero_keep_their_sign(device: torch.device) -> None:
    """A block of zeros beside large ones may decode to a negative scale, and its zeros to -0."""
    values = torch.randn(40, 64, device=device)
    values[::3] = 0.0
    weight = quantize(values)
    expected = dequantize(weight, torch.bfloat16)
    for order in orders(weight):
        assert same_bits(nf4_dequantize.nf4_dequantize(order, torch.bfloat16), expected)


def test_rows_and_column_blocks_of_a_planar_weight(device: torch.device) -> None:
    weight = quantize(torch.randn(150, 320, device=device))
    expected = dequantize(weight, torch.float16)[37:139, 64:256]
    out = torch.empty(102, 192, dtype=torch.float16, device=device)
    dequantize_planar(to_planar(weight), out, rows=range(37, 139), blocks=range(1, 4))
    assert same_bits(out, expected)
    turned = torch.empty(192, 102, dtype=torch.float16, device=device)
    dequantize_planar(
        to_planar(weight), turned, rows=range(37, 139), blocks=range(1, 4), transposed=True
    )
    assert same_bits(turned, expected.T)


def test_nothing_beside_the_result_is_written(device: torch.device) -> None:
    weight = quantize(torch.randn(5, 192, device=device))
    for order in orders(weight):
        buffer = torch.full((2, 5 * 192 + 64), 7.0, dtype=torch.bfloat16, device=device)
        # An odd offset, so that the result is aligned to 2 bytes only.
        part = buffer[1, 1 : 1 + 5 * 192].view(5, 192)
        nf4_dequantize.nf4_dequantize(order, out=part)
        assert same_bits(part, dequantize(weight, torch.bfloat16))
        outside = torch.cat([buffer[0], buffer[1, :1], buffer[1, 1 + 5 * 192 :]])
        assert bool((outside == 7.0).all())


def test_a_result_that_does_not_fit_is_refused(device: torch.device) -> None:
    weight = quantize(torch.randn(4, 64, device=device))
    with pytest.raises(ValueError, match="expected 256"):
        nf4_dequantize.nf4_dequantize(weight, out=torch.empty(255, device=device))
    with pytest.raises(ValueError, match="contiguous"):
        nf4_dequantize.nf4_dequantize(weight, out=torch.empty(64, 4, device=device).T)
    with pytest.raises(ValueError, match="float64"):
        nf4_dequantize.nf4_dequantize(weight, torch.float64)
    with pytest.raises(ValueError, match="2-D"):
        nf4_dequantize.nf4_dequantize(quantize(torch.randn(64, device=device)), transposed=True)


def test_reference_is_taken_on_request(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("the kernel was launched")

    monkeypatch.setenv("ENGINE_REFERENCE", "1")
    monkeypatch.setattr(nf4_dequantize, "dequantize_planar", fail)
    monkeypatch.setattr(nf4_dequantize, "dequantize_flat", fail)
    weight = quantize(torch.randn(4, 64, device=device))
    for order in orders(weight):
        turned = nf4_dequantize.nf4_dequantize(order, torch.bfloat16, transposed=True)
        assert same_bits(turned, dequantize(weight, torch.bfloat16).T)


def sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take address space but no memory until they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # 0x4000: MAP_NORESERVE
    space = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(space, dtype=dtype)


@pytest.mark.skipif(not nf4_decode.INTERPRETED, reason="needs sparse memory, which a GPU lacks")
def test_flat_offsets_beyond_32_bits_reach_the_right_elements() -> None:
    weight = quantize(torch.randn(64), double_quant=False)
    chunk = (1 << 31) // 64 + 3
    numel = (chunk + 1) * 64
    packed, out = sparse(numel // 2, torch.uint8), sparse(numel, torch.float16)
    absmax = sparse(chunk + 1, torch.float32)
    packed[chunk * 32 :] = weight.packed
    absmax[chunk:] = weight.absmax
    nf4_dequantize.dequantize_flat_kernel[(1,)](
        *(packed, absmax, absmax, absmax, absmax, out, numel, numel, 1, chunk, chunk + 1),
        ROWS=2,
        STEPS=2,
        CHUNK=64,
        SCALE_SHIFT=0,
        NESTED=False,
        WORDS=False,
        TRANSPOSED=False,
        DTYPE=tl.float16,
        PTX=False,
    )
    assert same_bits(out[chunk * 64 :], dequantize(weight, torch.float16))


@pytest.mark.skipif(not nf4_decode.INTERPRETED, reason="needs sparse memory, which a GPU lacks")
@pytest.mark.parametrize("transposed", [False, True])
def test_planar_offsets_beyond_32_bits_reach_the_right_elements(transposed: bool) -> None:
    """Both the codes and the result lie more than 2^31 elements behind their pointers."""
    rows, block = 64, (1 << 31) // (64 * 16) + 5
    weight = quantize(torch.randn(rows, 64), double_quant=False)
    planar = to_planar(weight)
    codes = sparse((block + 1) * rows * 16, torch.int16)
    absmax = sparse((block + 1) * rows, torch.float32)
    codes[block * rows * 16 :] = planar.codes.view(-1)
    absmax[block * rows :] = planar.absmax.view(-1)
    ldo = (1 << 31) // 60
    out = sparse(64 * ldo, torch.float16)
    nf4_dequantize.dequantize_planar_kernel[(1, 1)](
        *(codes, absmax, absmax, absmax, absmax, out),
        *(rows, block + 1, 0, rows, block, block + 1, ldo),
        ROWS=64,
        STEPS=2,
        NESTED_SHIFT=8,
        NESTED=False,
        WORDS=False,
        TRANSPOSED=transposed,
        DTYPE=tl.float16,
        PTX=False,
    )
    result = out.view(64, ldo)[:, :64]
    expected = dequantize(weight, torch.float16)
    assert same_bits(result, expected.T if transposed else expected)


def test_the_tree_of_selections_holds_the_codebook(device: torch.device) -> None:
    """One block with scale 1 and every code in it, decoded by the twin and by the PTX."""
    codes = torch.arange(64, dtype=torch.uint8, device=device) % 16
    weight = NF4Weight(
        packed=(codes[::2] << 4) | codes[1::2],
        absmax=torch.ones(1, device=device),
        nested_absmax=None,
        nested_offset=None,
        shape=(1, 64),
        block_size=64,
        dtype=torch.float32,
    )
    for order in orders(weight):
        decoded = nf4_dequantize.nf4_dequantize(order, torch.float32)
        assert torch.equal(decoded.view(4, 16), NF4_CODE.to(device).expand(4, 16))
