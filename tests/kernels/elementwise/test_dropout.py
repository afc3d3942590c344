"""Dropout: one generator in Python, torch and Triton, and masks that are independent."""

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.elementwise import dropout
from kernels.elementwise.dropout import Seed
from kernels.runtime import random
from kernels.runtime.random import derived_seed

Mutant = Callable[[ModuleType, str, str], ModuleType]
KEYS = (0, 5, 0xFFFFFFFF, 2**40 + 12345678901, 2**63 - 1)
CPU = torch.device("cpu")


def philox(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox-4x32-10 in Python's integers, written from the paper's figure 2."""
    x, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        left, right = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [right >> 32 ^ x[1] ^ k[0], right, left >> 32 ^ x[3] ^ k[1], left]
        x = [word & 0xFFFFFFFF for word in x]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def survives(row: int, column: int, width: int, p: float, seed: Seed) -> bool:
    """The definition, an element at a time."""
    assert isinstance(seed.key, int)
    size = 8 * -(-width // 64)
    words = philox(seed.key, (column % size, seed.first_row + row, seed.site, 0))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return halves[column // size] >= round(65536 * p)


def wanted(rows: int, width: int, p: float, seed: Seed) -> list[list[bool]]:
    return [[survives(r, c, width, p, seed) for c in range(width)] for r in range(rows)]


def masks(seeds: list[Seed], rows: int, width: int, p: float) -> Tensor:
    """(seeds, rows * width), 1.0 where an element survives."""
    drawn = [dropout.keep_mask(rows, width, p, seed, CPU).flatten() for seed in seeds]
    return torch.stack(drawn).double()


def largest_correlation(of: Tensor) -> float:
    """The largest |correlation| of any two rows, in standard deviations of independent ones."""
    centred = of - of.mean(1, keepdim=True)
    normal = centred / centred.norm(dim=1, keepdim=True)
    pairs = (normal @ normal.T).fill_diagonal_(0.0)
    return float(pairs.abs().max()) * math.sqrt(of.shape[1])


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("p", "width"), [(0.05, 9), (0.5, 70), (0.999, 513)])
def test_both_draw_the_bits_of_the_definition(
    p: float, width: int, key: int, way: str, device: torch.device
) -> None:
    seed = Seed(key, site=7, first_row=2**31 - 1)
    ones = torch.ones(3, width, device=device)
    assert dropout.dropout(ones, p, seed).bool().tolist() == wanted(3, width, p, seed)


def test_the_words_are_the_published_ones() -> None:
    """Known answer of the authors' Random123 library."""
    answer = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, (0, 0, 0, 0)) == answer
    zero = torch.zeros((), dtype=torch.int64)
    assert [int(word) for word in random.philox(0, (zero, zero, zero, zero))] == answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (63, 3), (257,), (2, 1000), (3, 2, 70), (1, 8200)])
def test_triton_and_reference_agree_bit_for_bit(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    triton_on: None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = (torch.randn(shape, device=device) + 10).to(dtype)
    ours = dropout.dropout(x, 0.3, Seed(7))
    monkeypatch.setenv("ENGINE_REFERENCE", "1")
    assert torch.equal(ours, dropout.dropout(x, 0.3, Seed(7)))


def test_chunks_of_the_reference_join_seamlessly(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dropout.keep_mask(100, 70, 0.5, Seed(3), CPU)
    monkeypatch.setattr(dropout, "_CHUNK", 48)
    assert torch.equal(dropout.keep_mask(100, 70, 0.5, Seed(3), CPU), whole)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 60),
    width=st.integers(1, 300),
    cut=st.integers(1, 59),
    key=st.integers(0, 2**63 - 1),
    site=st.integers(0, 5000),
)
def test_parts_of_the_rows_draw_what_the_whole_draws(
    rows: int, width: int, cut: int, key: int, site: int
) -> None:
    cut, seed = min(cut, rows - 1), Seed(key, site)
    parts = [
        dropout.keep_mask(cut, width, 0.3, seed, CPU),
        dropout.keep_mask(rows - cut, width, 0.3, seed.at(0, first_row=cut), CPU),
    ]
    assert torch.equal(torch.cat(parts), dropout.keep_mask(rows, width, 0.3, seed, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_surviving_elements_are_scaled_with_one_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(5, 1000).to(dtype)
    y = dropout.dropout(x, 0.1, Seed(1))
    mask = dropout.keep_mask(5, 1000, 0.1, Seed(1), CPU)
    want = torch.where(mask, x.double() / 0.9, 0.0)
    spacing = torch.finfo(dtype).eps * want.abs()
    assert ((y.double() - want).abs() <= 0.51 * spacing + 1e-7 * want.abs()).all()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_the_share_of_surviving_elements_varies_as_independent_draws_do(p: float) -> None:
    shares = masks([Seed(11, site) for site in range(300)], 4, 500, p).mean(1)
    deviation = (p * (1 - p) / 2000) ** 0.5
    assert abs(float(shares.mean()) - (1 - p)) < 5 * deviation / 300**0.5
    # The variance of 300 shares is itself known to one part in twelve.
    assert 0.6 < float(shares.var()) / deviation**2 < 1.5


def test_masks_of_all_sites_steps_and_micro_batches_are_uncorrelated() -> None:
    """Over all pairs of 144 sites, 30 steps and 30 micro-batches; 6 deviations is one in 10^9."""
    sites = [Seed(derived_seed(3, 0, 0), site) for site in range(144)]
    steps = [Seed(derived_seed(3, step, 0)) for step in range(1, 31)]
    micros = [Seed(derived_seed(3, 0, micro)) for micro in range(1, 31)]
    assert largest_correlation(masks([*sites, *steps, *micros], 16, 256, 0.5)) < 6


def test_how_much_a_token_loses_is_uncorrelated_between_sites() -> None:
    seeds = [Seed(derived_seed(9, 4, 1), site) for site in range(144)]
    lost = masks(seeds, 512, 64, 0.1).view(144, 512, 64).sum(2)
    assert largest_correlation(lost) < 6


def test_no_mask_is_another_in_another_order() -> None:
    """As many survive in each block of 2^k elements of two masks where one permutes the other."""
    drawn = masks([Seed(0, site) for site in range(64)], 1, 4096, 0.5)
    assert len(set(drawn.sum(1).tolist())) > 30


def test_neighbouring_rows_columns_and_keys_are_uncorrelated() -> None:
    drawn = dropout.keep_mask(500, 400, 0.5, Seed(2), CPU).double()
    other = dropout.keep_mask(500, 400, 0.5, Seed(3), CPU).double()
    high = dropout.keep_mask(500, 400, 0.5, Seed(2 + 2**32), CPU).double()
    size = dropout.segment(400)
    for a, b in (
        (drawn[1:], drawn[:-1]),
        (drawn[:, 1:], drawn[:, :-1]),
        (drawn[:, size:], drawn[:, :-size]),
        (drawn, other),
        (drawn, high),
    ):
        pair = torch.stack((a.flatten(), b.flatten()))
        assert largest_correlation(pair) < 5


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), first=st.tuples(*[st.integers(0, 2**32 - 1)] * 3))
def test_seeds_of_different_uses_differ(seed: int, first: tuple[int, int, int]) -> None:
    near = {derived_seed(seed, *first)}
    near |= {
        derived_seed(seed, *(v + (i == j) & 0xFFFFFFFF for j, v in enumerate(first)))
        for i in range(3)
    }
    near.add(derived_seed(seed ^ 1, *first))
    assert len(near) == 5
    assert all(0 <= value < 2**63 for value in near)


def test_the_same_call_is_its_own_backward_pass(way: str, device: torch.device) -> None:
    x, dy = torch.randn(40, 7, device=device), torch.randn(40, 7, device=device)
    y = dropout.dropout(x, 0.4, Seed(9))
    dx = dropout.dropout(dy, 0.4, Seed(9))
    torch.testing.assert_close((y * dy).sum(), (x * dx).sum(), rtol=1e-5, atol=1e-5)


def test_strided_input_is_read_in_its_own_order(way: str, device: torch.device) -> None:
    matrix = torch.randn(6, 100, device=device)
    for x in (matrix[:, :70], matrix.T, matrix[:, 20:80].unflatten(1, (6, 10))):
        assert torch.equal(
            dropout.dropout(x, 0.5, Seed(1)), dropout.dropout(x.contiguous(), 0.5, Seed(1))
        )


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_memory_is_read_when_it_is_used(key: int, way: str, device: torch.device) -> None:
    x, stored = torch.randn(300, device=device), torch.tensor(1, device=device)
    dropout.dropout(x, 0.5, Seed(stored))
    stored.fill_(key)
    assert torch.equal(dropout.dropout(x, 0.5, Seed(stored)), dropout.dropout(x, 0.5, Seed(key)))


def test_no_dropout_returns_its_input_and_all_is_refused() -> None:
    x = torch.randn(3)
    assert dropout.dropout(x, 0.0, Seed(1)) is x
    with pytest.raises(ValueError, match="below 1"):
        dropout.dropout(x, 1.0, Seed(1))
    assert torch.isfinite(dropout.dropout(torch.ones(9, 999), 1 - 1e-9, Seed(1))).all()


def test_nothing_is_computed_for_no_elements(way: str, device: torch.device) -> None:
    assert dropout.dropout(torch.ones(0, 3, device=device), 0.5, Seed(1)).shape == (0, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("counter = (row + first_row)", "counter = (row * 0 + first_row)"),
        ("zero + site.to(tl.uint32), zero\n", "zero, zero\n"),
        ("(x, y, draw + 3 * size, width, w1 >> 16", "(x, y, draw + 3 * size, width, w1 & low"),
        ("tl.where(bits >= threshold", "tl.where(bits < threshold"),
        ("values.to(tl.float32) * scale", "values.to(tl.float32)"),
    ],
)
def test_a_planted_fault_changes_bits(
    old: str, new: str, triton_on: None, device: torch.device, mutant: Mutant
) -> None:
    def drawn(module: ModuleType) -> Tensor:
        seed = module.Seed(2**40 + 1, 5, 3)
        result: Tensor = module.dropout(torch.ones(30, 300, device=device), 0.5, seed)
        return result

    assert not torch.equal(drawn(mutant(dropout, old, new)), drawn(dropout))
