"""NF4: nearest codes, decoding by formula, odd shapes and views."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.nf4 import (
    BLOCK_SIZES,
    NF4_CODE,
    NF4Weight,
    decode,
    dequantize,
    dequantize_rows,
    encode,
    quantize,
)
from kernels.runtime.scratch import release

SHAPES = [(1,), (2,), (63,), (64,), (65,), (257,), (7, 9), (3, 2000), (513, 127), (5, 7, 13)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def nibbles(weight: NF4Weight) -> Tensor:
    pairs = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1)
    return pairs.view(-1)[: weight.numel()].long()


def scales(weight: NF4Weight) -> Tensor:
    """The fp32 scale of every element, from the formula in the module's docstring."""
    per_block = weight.absmax
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        nested = weight.nested_absmax.repeat_interleave(256)[: per_block.numel()]
        per_block = dynamic_map(True)[per_block.long()] * nested + weight.nested_offset
    return per_block.repeat_interleave(weight.block_size)[: weight.numel()]


def assert_codes_are_nearest(w: Tensor, weight: NF4Weight) -> None:
    blocks = w.double().view(-1)
    scale = torch.stack([block.abs().amax() for block in blocks.split(weight.block_size)])
    scaled = blocks / scale.clamp(min=1e-38).repeat_interleave(weight.block_size)[: w.numel()]
    distance = (scaled[:, None] - NF4_CODE.double()).abs()
    chosen = distance.gather(1, nibbles(weight)[:, None]).squeeze(1)
    assert (chosen - distance.amin(dim=1)).amax() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_codes_are_nearest_and_decoding_is_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool
) -> None:
    w = (torch.randn(shape) * 0.05).to(dtype)
    weight = quantize(w, 64, double_quant)
    assert_codes_are_nearest(w, weight)
    expected = (NF4_CODE[nibbles(weight)] * scales(weight)).to(dtype).view(shape)
    decoded = dequantize(weight)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, expected)


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 9000),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 30),
)
def test_any_size_and_scale_round_trips(
    numel: int, block_size: int, double_quant: bool, seed: int, exponent: int
) -> None:
    w = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight = quantize(w, block_size, double_quant)
    assert weight.packed.numel() == math.ceil(numel / 2)
    assert weight.absmax.numel() == math.ceil(numel / block_size)
    assert_codes_are_nearest(w, weight)
    assert torch.equal(dequantize(weight), NF4_CODE[nibbles(weight)] * scales(weight))


def test_values_of_the_code_table_come_back_exactly() -> None:
    w = NF4_CODE.flip(0).repeat(4, 3) * 0.37
    weight = quantize(w, double_quant=False)
    assert torch.equal(nibbles(weight).view(4, 48), torch.arange(15, -1, -1).repeat(4, 3))
    assert torch.equal(dequantize(weight), w)


def test_the_even_element_is_in_the_high_nibble() -> None:
    assert quantize(torch.tensor([1.0, -1.0])).packed.tolist() == [0xF0]
    assert quantize(torch.tensor([-1.0, 1.0, 1.0])).packed.tolist() == [0x0F, 0xF7]


def test_every_threshold_is_decided_as_the_exact_search_decides_it() -> None:
    thresholds = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    cells = torch.arange(33, dtype=torch.float32) / 16 - 1
    near = torch.cat([thresholds, cells, NF4_CODE, torch.tensor([1e-9, -1e-9])])
    near = near[near != 0]
    bits = near.view(torch.int32)[:, None] + torch.arange(-300, 301, dtype=torch.int32)
    values = bits.view(torch.float32).flatten().clamp(-1, 1)
    values = torch.cat([values, torch.rand(200_000) * 2 - 1])
    codes = encode._nearest_code(values)
    assert torch.equal(codes, torch.bucketize(values, thresholds, out_int32=True))


@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_decode_to_zeros_whatever_surrounds_them(double_quant: bool) -> None:
    w = torch.randn(10, 64)
    w[3:5] = 0
    decoded = dequantize(quantize(w, double_quant=double_quant))
    assert torch.equal(decoded[3:5], torch.zeros(2, 64))
    assert torch.equal(dequantize(quantize(torch.zeros(1000))), torch.zeros(1000))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 128, 999])
def test_a_weight_that_is_not_finite_is_refused(bad: float, at: int) -> None:
    w = torch.randn(1000)
    w[at] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(w)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        quantize(torch.zeros(4, dtype=torch.int8))
    with pytest.raises(ValueError, match="block_size"):
        quantize(torch.zeros(4), block_size=48)
    with pytest.raises(ValueError, match="empty"):
        quantize(torch.zeros(0, 3))
    weight = quantize(torch.randn(6, 10))
    with pytest.raises(ValueError, match="expected 60"):
        dequantize(weight, out=torch.zeros(59))
    with pytest.raises(ValueError, match="expected 60"):
        dequantize(weight, dtype=torch.float32, out=torch.zeros(6, 10, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(weight, out=torch.zeros(10, 6).t())
    with pytest.raises(ValueError, match="int32"):
        dequantize(weight, dtype=torch.int32)
    with pytest.raises(ValueError, match="rows 2:7"):
        dequantize_rows(weight, 2, 7)


@pytest.mark.parametrize("columns", [64, 100, 127, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_rows_of_the_whole(columns: int, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(300, columns))
    whole = dequantize(weight, dtype=dtype)
    for start, stop in [(0, 300), (0, 1), (7, 7), (1, 4), (299, 300), (33, 290)]:
        assert torch.equal(dequantize_rows(weight, start, stop, dtype=dtype), whole[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_out_is_written_whole_at_any_alignment(dtype: torch.dtype, offset: int) -> None:
    weight = quantize(torch.randn(31, 65))
    buffer = torch.full((31 * 65 + 8,), 7.0, dtype=dtype)
    out = buffer[offset : offset + 31 * 65].view(31, 65)
    result = dequantize(weight, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, dequantize(weight, dtype=dtype))
    assert (buffer[:offset] == 7).all()
    assert (buffer[offset + 31 * 65 :] == 7).all()


def test_weights_larger_than_a_slab_match_their_parts() -> None:
    columns = 64 * 256
    w = torch.randn(40, columns)
    whole = quantize(w, double_quant=False)
    parts = [quantize(part.contiguous(), double_quant=False) for part in w.split(7)]
    assert torch.equal(whole.packed, torch.cat([part.packed for part in parts]))
    assert torch.equal(whole.absmax, torch.cat([part.absmax for part in parts]))
    decoded = torch.cat([dequantize(part) for part in parts])
    assert torch.equal(dequantize(whole), decoded)
    assert torch.equal(dequantize(whole, dtype=torch.bfloat16), decoded.bfloat16())


def test_a_transposed_weight_is_quantised_in_its_own_order() -> None:
    w = torch.randn(48, 80)
    assert torch.equal(dequantize(quantize(w.t())), dequantize(quantize(w.t().contiguous())))


def test_double_quantisation_costs_4_127_bits_per_element() -> None:
    weight = quantize(torch.randn(4096, 1024))
    assert weight.nbytes * 8 / weight.numel() == pytest.approx(4.127, abs=0.001)
    moved = weight.to("cpu")
    assert moved.shape == weight.shape
    assert torch.equal(dequantize(moved), dequantize(weight))


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor any operation gives out that is no view of an input."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        out = (kwargs or {}).get("out")
        if (
            isinstance(result, Tensor)
            and out is None
            and result.untyped_storage().data_ptr() not in known
        ):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_temporary_memory_does_not_grow_with_the_weight() -> None:
    w = torch.randn(1 << 23).bfloat16()
    with LargestTensor() as seen:
        weight = quantize(w, double_quant=False)
    assert seen.nbytes == weight.packed.nbytes == 1 << 22
    out = torch.empty(1 << 23)
    release()
    with LargestTensor() as seen:
        dequantize(weight, out=out)
    assert 0 < seen.nbytes <= 1 << 20


@pytest.fixture
def replaced_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Tensor], None]]:
    caches = (decode._pair_table, encode._cells)

    def replace(code: Tensor) -> None:
        for module in (decode, encode):
            monkeypatch.setattr(module, "NF4_CODE", code)
        for cache in caches:
            cache.cache_clear()

    yield replace
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("entry", range(16))
def test_a_wrong_entry_of_the_code_table_is_noticed(
    entry: int, replaced_code: Callable[[Tensor], None]
) -> None:
    wrong = NF4_CODE.clone()
    wrong[entry] += 0.01
    replaced_code(wrong)
    w = torch.randn(64, 64)
    weight = quantize(w, double_quant=False)
    decoded = dequantize(weight).view(-1)
    formula = NF4_CODE[nibbles(weight)] * scales(weight)
    assert not torch.equal(decoded, formula)


def test_swapped_nibbles_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(codes: Tensor, out: Tensor) -> None:
        pairs = codes.to(torch.uint8).view(-1, 2)
        torch.add(pairs[:, 0], pairs[:, 1], alpha=16, out=out)

    monkeypatch.setattr(encode, "_pack", swapped)
    w = torch.randn(64, 64)
    with pytest.raises(AssertionError):
        assert_codes_are_nearest(w, quantize(w))
