"""One AdamW step on a slab against the written formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import adamw8bit
from kernels.adamw8bit import ROW, Moments, Piece, Update, adamw_slab_, may_step
from kernels.adamw8bit.dynamic_map import Rounding, dequantize_blocks, quantize_blocks
from kernels.runtime.random import philox_bits, round_stochastically

SIZES = [1, 63, 256, 257, 2000]


def make_update(step: int = 3, rounding: Rounding = "grid", weight_decay: float = 0.1) -> Update:
    return Update(1e-2, 0.9, 0.99, 1e-8, weight_decay, step, rounding)


def make_pieces(sizes: list[int]) -> list[Piece]:
    return [Piece(index, 0, size) for index, size in enumerate(sizes)]


def rows_of(parts: list[Tensor]) -> Tensor:
    """Parts one after the other, each padded to whole rows."""
    padded = [torch.nn.functional.pad(part, (0, -part.numel() % ROW)) for part in parts]
    return torch.cat(padded).view(-1, ROW)


def formula(p: Tensor, g: Tensor, m: Tensor, v: Tensor, update: Update) -> list[Tensor]:
    """The step in float64, as the module's docstring writes it."""
    p, g, m, v = (x.double() for x in (p, g, m, v))
    m = update.beta1 * m + (1 - update.beta1) * g
    v = update.beta2 * v + (1 - update.beta2) * g * g
    root = v.sqrt() / math.sqrt(1 - update.beta2**update.step) + update.eps
    step = update.lr / (1 - update.beta1**update.step) * m / root
    return [(1 - update.lr * update.weight_decay) * p - step, m, v]


@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_with_exact_moments_is_the_formula(grad_scale: float, weight_decay: float) -> None:
    update = make_update(weight_decay=weight_decay)
    params, grads = ([torch.randn(size) for size in SIZES] for _ in range(2))
    m, v = ([torch.randn(size) for size in SIZES] for _ in range(2))
    v = [part.square() for part in v]
    expected = [
        formula(*parts, update)
        for parts in zip(params, [g * grad_scale for g in grads], m, v, strict=True)
    ]
    moments = Moments(rows_of(m), rows_of(v))
    adamw_slab_(make_pieces(SIZES), params, grads, moments, update, grad_scale)
    for param, new in zip(params, expected, strict=True):
        torch.testing.assert_close(param.double(), new[0], rtol=1e-5, atol=1e-6)
    new_m, new_v = (rows_of([new[i].float() for new in expected]) for i in (1, 2))
    torch.testing.assert_close(moments.m, new_m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.v, new_v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounding", ["grid", "nearest"])
def test_a_step_with_8_bit_moments_uses_them_before_rounding(rounding: Rounding) -> None:
    update = make_update(rounding=rounding)
    params, grads = ([torch.randn(size) for size in SIZES] for _ in range(2))
    start_m, start_v = rows_of([torch.randn(s) for s in SIZES]), rows_of([g**2 for g in grads])
    m, m_absmax = quantize_blocks(start_m, signed=True, rounding=rounding)
    v, v_absmax = quantize_blocks(start_v, signed=False, rounding=rounding)
    old_m = dequantize_blocks(m, m_absmax, signed=True)
    old_v = dequantize_blocks(v, v_absmax, signed=False)
    grad_rows, param_rows = rows_of(grads), rows_of(params)
    new_p, new_m, new_v = formula(param_rows, grad_rows, old_m, old_v, update)
    moments = Moments(m, v, m_absmax, v_absmax)
    adamw_slab_(make_pieces(SIZES), params, grads, moments, update)
    row = 0
    for size, param in zip(SIZES, params, strict=True):
        expected = new_p[row : row + math.ceil(size / ROW)].flatten()[:size]
        torch.testing.assert_close(param.double(), expected, rtol=1e-5, atol=1e-6)
        row += math.ceil(size / ROW)
    torch.testing.assert_close(m_absmax.double(), new_m.abs().amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(v_absmax.double(), new_v.amax(1), rtol=1e-6, atol=0)
    for result, absmax, exact, signed in ((m, m_absmax, new_m, True), (v, v_absmax, new_v, False)):
        decoded = dequantize_blocks(result, absmax, signed=signed)
        error = (decoded - exact).abs().amax(1) / exact.abs().amax(1)
        assert error.max() < 0.008


def test_a_negative_moment_never_rounds_to_zero_with_nearest_rounding() -> None:
    grad = torch.full((ROW,), -1e-8)
    grad[0], grad[1] = 1.0, 1e-8
    moments = Moments(
        torch.zeros(1, ROW, dtype=torch.uint8),
        torch.zeros(1, ROW, dtype=torch.uint8),
        torch.zeros(1),
        torch.zeros(1),
    )
    update = make_update(step=1, rounding="nearest")
    adamw_slab_(make_pieces([ROW]), [torch.zeros(ROW)], [grad], moments, update)
    assert moments.m[0, :3].tolist() == [255, 127, 126]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_parameter_is_updated_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    update = make_update()
    wide = torch.randn(300).to(dtype).float()
    narrow, grad = wide.to(dtype), torch.randn(300).to(dtype)
    zeros = [torch.zeros(2, ROW) for _ in range(4)]
    adamw_slab_(make_pieces([300]), [wide], [grad.float()], Moments(*zeros[:2]), update)
    adamw_slab_(make_pieces([300]), [narrow], [grad], Moments(*zeros[2:]), update)
    assert torch.equal(narrow, wide.to(dtype))


def test_stochastic_rounding_is_right_on_average_and_repeats_itself() -> None:
    seed = 7
    value = torch.full((200_000,), 1.0 + 1 / 512)
    index = torch.arange(value.numel())
    rounded = round_stochastically(value, philox_bits(seed, index, 0, 1, 2))
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert rounded.double().mean().item() == pytest.approx(value[0].item(), abs=5e-5)
    assert torch.equal(rounded, round_stochastically(value, philox_bits(seed, index, 0, 1, 2)))
    other = round_stochastically(value, philox_bits(seed, index, 0, 1, 3))
    assert not torch.equal(rounded, other)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), index[:1000] * 9), exact)


def test_philox_gives_the_published_words() -> None:
    # Known answers of the authors' Random123 library, philox4x32 with 10 rounds.
    assert philox_bits(0, torch.tensor([0])).item() == 0x6627E8D5
    ones = 0xFFFFFFFF
    result = philox_bits(2**64 - 1, torch.tensor([ones]), ones, ones, ones)
    assert result.item() == 0x408F276D
    result = philox_bits(0x299F31D0A4093822, torch.tensor([0x243F6A88]), 0x85A308D3, 0x13198A2E,
                        0x03707344)  # fmt: skip
    assert result.item() == 0xD16CFE09


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_anywhere_is_seen(bad: float) -> None:
    tensors = [torch.randn(100), torch.zeros(0), torch.randn(7, 9).bfloat16()]
    assert may_step(tensors, 1.0, tensors)
    assert may_step([], 1.0, [])
    assert not may_step(tensors, torch.tensor(bad), [])
    tensors[2][3, 3] = bad
    assert not may_step(tensors, 1.0, [])
    assert not may_step([], 1.0, tensors)


def test_gradients_may_be_as_large_as_their_squares_and_moments_as_any() -> None:
    large = [torch.full((10,), 3e38)]
    assert may_step([], 1.0, large)
    assert not may_step(large, 1.0, large)
    assert may_step(large, 1e-30, large)
    assert not may_step([torch.ones(2)], torch.tensor(1e30), [])


def test_the_formula_check_notices_coupled_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw8bit.Update, "decay", 1.0)
    with pytest.raises(AssertionError):
        test_a_step_with_exact_moments_is_the_formula(1.0, 0.1)


def test_the_formula_check_notices_a_missing_bias_correction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adamw8bit.Update, "denominator_scale", 1.0)
    with pytest.raises(AssertionError):
        test_a_step_with_exact_moments_is_the_formula(1.0, 0.0)
