"""Dropout: one generator in Python, torch and Triton."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.elementwise import dropout
from kernels.runtime.triton_support import jit, tl

Mutant = Callable[[ModuleType, str, str], ModuleType]
SEEDS = (0, 5, 0xFFFFFFFF, 2**40 + 12345678901, 2**63 - 1)


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def survives(index: int, p: float, seed: int) -> bool:
    """The generator in Python's integers."""
    bits = mix((index & 0xFFFFFFFF) ^ (seed & 0xFFFFFFFF))
    bits = mix((bits + (index >> 32) + (seed >> 32)) & 0xFFFFFFFF)
    return bits >= int(p * 2**32)


@jit
def survives_kernel(out_ptr, seed_ptr, first, threshold, n, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = dropout.survives(element + first, tl.load(seed_ptr), threshold)
    tl.store(out_ptr + element, keep.to(tl.int8), mask=element < n)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_torch_draws_the_bits_of_the_definition(p: float, seed: int) -> None:
    mask = dropout.keep_mask(300, p, seed, torch.device("cpu"))
    assert mask.tolist() == [survives(i, p, seed) for i in range(300)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 2**31 - 50, 2**32 - 50, 5 * 2**32 + 7])
def test_triton_draws_the_bits_of_the_definition_at_any_index(
    first: int, seed: int, triton_on: None, device: torch.device
) -> None:
    out = torch.empty(100, dtype=torch.int8, device=device)
    stored = torch.tensor(seed, device=device)
    survives_kernel[(1,)](out, stored, first, dropout.threshold(0.3), 100, BLOCK=128)
    assert out.bool().tolist() == [survives(first + i, 0.3, seed) for i in range(100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (63, 3), (257,), (2, 1000), (1025,)])
def test_triton_and_reference_agree_bit_for_bit(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    triton_on: None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = (torch.randn(shape, device=device) + 10).to(dtype)
    ours = dropout.dropout(x, 0.3, 7)
    monkeypatch.setenv("ENGINE_REFERENCE", "1")
    assert torch.equal(ours, dropout.dropout(x, 0.3, 7))


def test_chunks_of_the_reference_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dropout.keep_mask(1000, 0.5, 3, torch.device("cpu"))
    monkeypatch.setattr(dropout, "_CHUNK", 64)
    assert torch.equal(dropout.keep_mask(1000, 0.5, 3, torch.device("cpu")), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_surviving_elements_are_scaled_with_one_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(5000).to(dtype)
    y = dropout.dropout(x, 0.1, 1)
    mask = dropout.keep_mask(5000, 0.1, 1, torch.device("cpu"))
    want = torch.where(mask, x.double() / 0.9, 0.0)
    spacing = torch.finfo(dtype).eps * want.abs()
    assert ((y.double() - want).abs() <= 0.51 * spacing + 1e-7 * want.abs()).all()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_surviving_elements_is_one_minus_p(p: float) -> None:
    n = 400_000
    share = float(dropout.keep_mask(n, p, 11, torch.device("cpu")).double().mean())
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5


def test_masks_of_neighbouring_seeds_and_elements_are_uncorrelated() -> None:
    device = torch.device("cpu")
    masks = [dropout.keep_mask(200_000, 0.5, s, device).double() - 0.5 for s in (0, 1, 2**32)]
    pairs = [(masks[0], masks[1]), (masks[0], masks[2]), (masks[0][1:], masks[0][:-1])]
    for a, b in pairs:
        assert abs(float((a * b).mean()) * 4) < 5 / 200_000**0.5


def test_the_same_call_is_its_own_backward_pass(way: str, device: torch.device) -> None:
    x, dy = torch.randn(40, 7, device=device), torch.randn(40, 7, device=device)
    y = dropout.dropout(x, 0.4, 9)
    dx = dropout.dropout(dy, 0.4, 9)
    torch.testing.assert_close((y * dy).sum(), (x * dx).sum(), rtol=1e-5, atol=1e-5)


def test_strided_input_is_read_in_its_own_order(way: str, device: torch.device) -> None:
    x = torch.randn(6, 10, device=device)
    assert torch.equal(dropout.dropout(x.T, 0.5, 1), dropout.dropout(x.T.contiguous(), 0.5, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_in_memory_is_read_when_it_is_used(
    seed: int, way: str, device: torch.device
) -> None:
    x, stored = torch.randn(300, device=device), torch.tensor(1, device=device)
    dropout.dropout(x, 0.5, stored)
    stored.fill_(seed)
    assert torch.equal(dropout.dropout(x, 0.5, stored), dropout.dropout(x, 0.5, seed))


def test_no_dropout_returns_its_input_and_all_is_refused() -> None:
    x = torch.randn(3)
    assert dropout.dropout(x, 0.0, 1) is x
    with pytest.raises(ValueError, match="below 1"):
        dropout.dropout(x, 1.0, 1)


def test_nothing_is_computed_for_no_elements(way: str, device: torch.device) -> None:
    assert dropout.dropout(torch.ones(0, 3, device=device), 0.5, 1).shape == (0, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x *= 0x7FEB352D", "x *= 0x7FEB352F"),
        ("x ^= x >> 15", "x ^= x >> 14"),
        ("(index >> 32).to(tl.uint32) + (seed >> 32).to(tl.uint32)", "(index >> 32).to(tl.uint32)"),
        ("return bits >= threshold", "return bits < threshold"),
        ("x.to(tl.float32) * scale", "x.to(tl.float32)"),
    ],
)
def test_a_planted_fault_changes_bits(
    old: str, new: str, triton_on: None, device: torch.device, mutant: Mutant
) -> None:
    def drawn(module: ModuleType) -> Tensor:
        result: Tensor = module.dropout(torch.ones(3000, device=device), 0.5, 2**40 + 1)
        return result

    assert not torch.equal(drawn(mutant(dropout, old, new)), drawn(dropout))
