"""The inline PTX of NF4 decoding, run by an emulator."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.compile.ptx_emulator import PtxError, check_clobbers, run, statements
from kernels.nf4 import NF4_CODE
from kernels.nf4 import decode_ptx as nf4_decode

TABLES = {
    torch.bfloat16: nf4_decode.TABLE_BF16_PTX,
    torch.float16: nf4_decode.TABLE_FP16_PTX,
}


def bits(values: Tensor) -> NDArray[np.uint32]:
    """fp32 values as words."""
    return values.numpy().view(np.uint32)


def scales(count: int) -> Tensor:
    """Scales of every size and sign, the edges of fp32, bf16 and fp16 among them."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(count, generator=generator) * torch.pow(
        10.0, torch.randint(-12, 6, (count,), generator=generator)
    )
    edges = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 2**-126, 1e-40, 65504.0, 65520.0, 1e5, 3.3e38, -3.3e38, 6e-8, 2**-24]
    )
    return torch.cat([wide.float(), edges])


def expected(scale: Tensor, dtype: torch.dtype) -> NDArray[np.uint32]:
    """round(NF4_CODE[c] * scale) for all 16 codes, as 16-bit patterns (scales, 16)."""
    values = (NF4_CODE[None, :] * scale[:, None]).to(dtype)
    return values.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def table(scale: Tensor, dtype: torch.dtype) -> list[NDArray[np.uint32]]:
    return run(TABLES[dtype], 8, [bits(scale)])


@pytest.mark.parametrize("dtype", TABLES)
def test_byte_planes_are_the_sixteen_rounded_values(dtype: torch.dtype) -> None:
    scale = scales(20_000)
    planes = [
        np.stack([(word >> (8 * i)) & 0xFF for word in words for i in range(4)], axis=1)
        for words in (table(scale, dtype)[:4], table(scale, dtype)[4:])
    ]
    assert np.array_equal(planes[0] | (planes[1] << 8), expected(scale, dtype))


def test_scale_is_rounded_after_the_product_and_after_the_sum() -> None:
    generator = torch.Generator().manual_seed(2)
    value, nested, offset = torch.randn(3, 50_000, generator=generator)
    (result,) = run(nf4_decode.SCALE_PTX, 1, [bits(value), bits(nested), bits(offset)])
    assert np.array_equal(result, bits(value * nested + offset))
    fused = (value.double() * nested.double() + offset.double()).float()
    assert not torch.equal(fused, value * nested + offset)


@pytest.mark.parametrize("dtype", TABLES)
def test_planar_lookup_is_right_for_every_pair_of_words(dtype: torch.dtype) -> None:
    """All 65,536 words in the lower half with a random one above, then the other way round."""
    scale = scales(65_536 - 13)
    rows = np.arange(65_536)
    every = np.arange(65_536, dtype=np.uint32)
    other = np.random.default_rng(3).integers(0, 65_536, 65_536).astype(np.uint32)
    values = expected(scale, dtype)
    planes = table(scale, dtype)
    for low, high in ((every, other), (other, every)):
        word = (low | (high << 16)).astype(np.uint32)
        twice = [plane for plane in planes for _ in range(2)]
        alone = run(nf4_decode.PLANES_PTX, 4, [word, *planes])
        packed = run(nf4_decode.PACKED_PLANES_PTX, 4, [word, *twice])
        for plane in range(4):
            first = values[rows, (low >> (4 * plane)) & 15]
            second = values[rows, (high >> (4 * plane)) & 15]
            assert np.array_equal(alone[plane], first | (second << 16))
            assert np.array_equal(packed[plane], first | (second << 16))


@pytest.mark.parametrize("dtype", TABLES)
def test_column_lookup_joins_the_values_of_two_rows(dtype: torch.dtype) -> None:
    """Each row has every 16-bit word in either half once, beside random ones, and its own scale."""
    scale = scales(65_536 - 13)
    rows = np.arange(65_536)
    generator = np.random.default_rng(6)
    values, planes = expected(scale, dtype), table(scale, dtype)
    order = generator.permutation(65_536)
    other = [plane[order] for plane in planes]
    pairs = [plane for both in zip(planes, other, strict=True) for plane in both]
    every = np.arange(65_536, dtype=np.uint32)
    for shift in (0, 16):
        random = generator.integers(0, 65_536, (2, 65_536)).astype(np.uint32)
        first = ((every << shift) | (random[0] << (16 - shift))).astype(np.uint32)
        second = ((every[::-1] << shift) | (random[1] << (16 - shift))).astype(np.uint32)
        results = run(nf4_decode.COLUMNS_PTX, 8, [first, second, *pairs])
        for column, result in enumerate(results):
            low = values[rows, (first >> (4 * column)) & 15]
            high = values[order, (second >> (4 * column)) & 15]
            assert np.array_equal(result, low | (high << 16))


@pytest.mark.parametrize("dtype", TABLES)
def test_byte_lookup_is_right_for_every_byte_at_every_position(dtype: torch.dtype) -> None:
    scale = scales(65_536 - 13)
    rows = np.arange(65_536)
    values = expected(scale, dtype)
    planes = table(scale, dtype)
    generator = np.random.default_rng(4)
    packed = generator.integers(0, 2**32, 65_536, dtype=np.uint64).astype(np.uint32)
    for position in range(4):
        every = (rows % 256).astype(np.uint32) << (8 * position)
        word = ((packed & ~np.uint32(0xFF << (8 * position))) | every).astype(np.uint32)
        operands = [word, *planes]
        for index, result in enumerate(run(nf4_decode.WORDS_PTX, 4, operands)):
            byte = (word >> (8 * index)) & 0xFF
            even, odd = values[rows, byte >> 4], values[rows, byte & 15]
            assert np.array_equal(result, even | (odd << 16))


@pytest.mark.parametrize(
    ("ptx", "constraints"),
    [
        (nf4_decode.TABLE_BF16_PTX, nf4_decode.TABLE_CONSTRAINTS),
        (nf4_decode.TABLE_FP16_PTX, nf4_decode.TABLE_CONSTRAINTS),
        (nf4_decode.WORDS_PTX, nf4_decode.LOOKUP_CONSTRAINTS),
        (nf4_decode.PLANES_PTX, nf4_decode.LOOKUP_CONSTRAINTS),
        (nf4_decode.PACKED_PLANES_PTX, nf4_decode.PACKED_PLANES_CONSTRAINTS),
        (nf4_decode.COLUMNS_PTX, nf4_decode.COLUMNS_CONSTRAINTS),
        (nf4_decode.SCALE_PTX, nf4_decode.SCALE_CONSTRAINTS),
    ],
)
def test_no_output_register_is_written_while_inputs_are_read(ptx: str, constraints: str) -> None:
    check_clobbers(ptx, constraints)
    operands = {int(match) for match in re.findall(r"\$(\d+)", ptx)}
    assert max(operands) < len(constraints.split(","))


def test_a_missing_early_clobber_raises() -> None:
    with pytest.raises(PtxError, match="before the last input"):
        check_clobbers(nf4_decode.PLANES_PTX, nf4_decode.LOOKUP_CONSTRAINTS.replace("&", ""))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0xae8c", "0xbf9d"),
        ("0x6240", "0x7351"),
        ("0xd8", "0xca"),
        ("0x77777777", "0xffffffff"),
        ("0x0031", "0x0032"),
    ],
)
def test_a_planted_fault_in_the_lookup_shows(right: str, wrong: str) -> None:
    scale = torch.full((4096,), 1.7)
    word = np.random.default_rng(5).integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32)
    operands = [word, *table(scale, torch.bfloat16)]
    good = run(nf4_decode.PLANES_PTX, 4, operands)
    broken = nf4_decode.PLANES_PTX.replace(right, wrong, 1)
    assert broken != nf4_decode.PLANES_PTX
    bad = run(broken, 4, operands)
    assert any(not np.array_equal(a, b) for a, b in zip(good, bad, strict=True))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x9d8c", "0xbfae"),
        ("0x5140", "0x7362"),
        ("x, y, 0x5410", "y, x, 0x5410"),
        ("$9, 0x77777777", "$8, 0x77777777"),
        ("shl.b32 t, $9", "shl.b32 t, $8"),
        ("$11, $13", "$10, $12"),
        ("s1, s1, 16", "s1, s1, 12"),
    ],
)
def test_a_planted_fault_in_the_column_lookup_shows(right: str, wrong: str) -> None:
    generator = np.random.default_rng(7)
    words = generator.integers(0, 2**32, (2, 4096), dtype=np.uint64).astype(np.uint32)
    tables = [table(torch.full((4096,), scale), torch.bfloat16) for scale in (1.7, -0.3)]
    pairs = [plane for both in zip(*tables, strict=True) for plane in both]
    good = run(nf4_decode.COLUMNS_PTX, 8, [*words, *pairs])
    broken = nf4_decode.COLUMNS_PTX.replace(right, wrong, 1)
    assert broken != nf4_decode.COLUMNS_PTX
    bad = run(broken, 8, [*words, *pairs])
    assert any(not np.array_equal(a, b) for a, b in zip(good, bad, strict=True))


def test_emulator_refuses_what_it_does_not_know() -> None:
    with pytest.raises(PtxError, match="unknown instruction"):
        run("{ shf.l.wrap.b32 $0, $1, $1, 3; }", 1, [np.zeros(1, np.uint32)])
    with pytest.raises(PtxError, match="read before it is written"):
        run("{ .reg .b32 a; and.b32 $0, a, $1; }", 1, [np.zeros(1, np.uint32)])
    assert statements("{ .reg .b16 a, b; mov.b32 $0, {a, b}; }") == [("mov.b32", ["$0", "{a, b}"])]


def test_emulated_prmt_copies_bytes_and_spreads_signs() -> None:
    a, b = np.array([0x8070_6050], np.uint32), np.array([0xF0E0_D0C0], np.uint32)
    assert run("{ prmt.b32 $0, $1, $2, 0x7420; }", 1, [a, b])[0] == 0xF0C0_7050
    assert run("{ prmt.b32 $0, $1, $2, 0xFB8A; }", 1, [a, b])[0] == 0xFFFF_0000
