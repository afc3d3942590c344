"""The Triton NF4 decoders give the bits of the reference."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.nf4 import NF4_CODE, NF4Weight, dequantize, quantize
from kernels.nf4 import decode_ptx as nf4_decode
from kernels.nf4 import dequantize_triton as nf4_dequantize
from kernels.nf4.dequantize_triton import dequantize_planar
from kernels.nf4.planar import AnyNF4, has_planar_order, to_planar
from kernels.nf4.tiles import transposed_tile
from kernels.runtime.device import multiprocessors
from kernels.runtime.triton_support import tl

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


def test_the_larger_transposed_tile_is_bit_equal_to_the_reference(device: torch.device) -> None:
    """As many blocks as make four rows per thread worth while, the last tile half empty."""
    rows = 600 * multiprocessors(device)
    assert transposed_tile(multiprocessors(device), rows * 4).rows == 512
    weight = quantize(torch.randn(rows, 256, device=device))
    turned = nf4_dequantize.nf4_dequantize(to_planar(weight), torch.bfloat16, transposed=True)
    assert same_bits(turned, dequantize(weight, torch.bfloat16).T)


def test_nothing_outside_the_result_is_written(device: torch.device) -> None:
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
    """Both the codes and the result lie more than 2^31 elements behind their pointers.

    So does the first column of the last nibble position from the first one.
    """
    rows, block = 64, (1 << 31) // (64 * 16) + 5
    weight = quantize(torch.randn(rows, 64), double_quant=False)
    planar = to_planar(weight)
    codes = sparse((block + 1) * rows * 16, torch.int16)
    absmax = sparse((block + 1) * rows, torch.float32)
    codes[block * rows * 16 :] = planar.codes.view(-1)
    absmax[block * rows :] = planar.absmax.view(-1)
    ldo = (1 << 31) // 40
    out = sparse(64 * ldo, torch.float16)
    given = (codes, absmax, absmax, absmax, absmax, out, rows, block + 1, 0, rows, block)
    shared = {"ROWS": 64, "NESTED_SHIFT": 8, "NESTED": False, "DTYPE": tl.float16, "PTX": False}
    if transposed:
        nf4_dequantize.dequantize_transposed_kernel[(1, 1)](*given, ldo, **shared)
    else:
        nf4_dequantize.dequantize_planar_kernel[(1, 1)](
            *given, block + 1, ldo, STEPS=2, WORDS=False, **shared
        )
    result = out.view(64, ldo)[:, :64]
    expected = dequantize(weight, torch.float16)
    assert same_bits(result, expected.T if transposed else expected)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("at2 = at0 + 32 * line", "at2 = at0 + 31 * line"),
        ("words >> (32 * half)", "words >> (16 * half)"),
        ("inside = row < last_row\n    at =", "inside = row <= last_row\n    at ="),
        ("+ at * 4", "+ at * 3"),
        ("local_block * 64 * line", "local_block * 32 * line"),
        ("block * rows + row\n    index = row", "block * rows + local_row\n    index = row"),
    ],
)
def test_a_planted_fault_in_the_transposed_kernel_shows(
    right: str,
    wrong: str,
    mutant: Callable[[ModuleType, str, str], ModuleType],
    device: torch.device,
) -> None:
    broken = mutant(nf4_dequantize, right, wrong)
    weight = quantize(torch.randn(40, 192, device=device))
    expected = dequantize(weight, torch.float16)[3:23, 64:].T
    # Poisoned, and wider than the result, so that a write beside it shows.
    for module, right_one in ((nf4_dequantize, True), (broken, False)):
        out = torch.full((129, 24), torch.nan, dtype=torch.float16, device=device)
        module.dequantize_planar(
            to_planar(weight), out[:128, :20], range(3, 23), range(1, 3), transposed=True
        )
        inside, outside = out[:128, :20], torch.cat([out[:128, 20:].flatten(), out[128]])
        good = same_bits(inside, expected) and bool(outside.isnan().all())
        assert good == right_one


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("block = chunk >> SCALE_SHIFT", "block = (chunk >> SCALE_SHIFT) // 2"),
        ("inside = chunk < last_chunk", "inside = chunk < last_chunk - 1"),
        ("mask=inside & (index < numel)", "mask=inside & (index < numel - 1)"),
        ("index % columns) * ldo", "index % columns) * (ldo - 1)"),
        ("+ 16 * part + tl", "+ 8 * part + tl"),
        ("target + 48, w3", "target + 48, w2"),
        ("first_block + start + step", "first_block + start"),
        ("rows + row\n        index", "rows + local_row\n        index"),
        ("block, block, inside, NESTED, 8", "block, block, inside, NESTED, 20"),
        ("at, index, inside, NESTED, NESTED_SHIFT", "at, index, inside, NESTED, 20"),
    ],
)
def test_a_planted_fault_in_the_other_kernels_shows(
    right: str,
    wrong: str,
    mutant: Callable[[ModuleType, str, str], ModuleType],
    device: torch.device,
) -> None:
    broken = mutant(nf4_dequantize, right, wrong)
    flat = quantize(torch.randn(135, 257, device=device), 128)
    planar = quantize(torch.randn(200, 192, device=device))
    for module, right_one in ((nf4_dequantize, True), (broken, False)):
        outs = [
            module.nf4_dequantize(flat, torch.float16),
            module.nf4_dequantize(flat, torch.float16, transposed=True).T,
            torch.full((150, 128), torch.nan, dtype=torch.float16, device=device),
        ]
        module.dequantize_planar(to_planar(planar), outs[2], range(50, 200), range(1, 3))
        expected = [dequantize(flat, torch.float16)] * 2
        expected.append(dequantize(planar, torch.float16)[50:, 64:])
        good = all(same_bits(a, b) for a, b in zip(outs, expected, strict=True))
        assert good == right_one


def test_transposed_codes_that_are_not_aligned_are_refused(device: torch.device) -> None:
    planar = to_planar(quantize(torch.randn(4, 64, device=device)))
    moved = torch.empty(planar.codes.numel() + 1, dtype=torch.int16, device=device)[1:]
    moved = moved.view_as(planar.codes).copy_(planar.codes)
    out = torch.empty(64, 4, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="aligned to 8 bytes"):
        dequantize_planar(replace(planar, codes=moved), out, transposed=True)


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
