"""The dynamic 8-bit map: entries, roundings, blocks of zeros and tiny numbers."""

from __future__ import annotations

import pytest
import torch

from kernels.adamw8bit.dynamic_map import (
    GRID_STEPS,
    Rounding,
    dequantize_blocks,
    dynamic_map,
    grid_table,
    midpoints,
    quantize_blocks,
)

SIGNED = [True, False]
ROUNDINGS: list[Rounding] = ["grid", "nearest"]


def nearest_by_distance(values: torch.Tensor, signed: bool) -> torch.Tensor:
    distance = (values.double()[..., None] - dynamic_map(signed).double()).abs()
    return distance.argmin(dim=-1).to(torch.uint8)


@pytest.mark.parametrize("signed", SIGNED)
def test_the_map_has_256_rising_values_with_zero_and_one(signed: bool) -> None:
    code = dynamic_map(signed)
    assert code.shape == (256,)
    assert (code.diff() > 0).all()
    assert code[-1] == 1.0
    assert code[127 if signed else 0] == 0.0
    assert code[0] == pytest.approx(-0.99296874 if signed else 0.0)
    assert code[128 if signed else 1] == pytest.approx(5.5e-7 if signed else 3.25e-7)


def test_the_signed_map_is_symmetric_but_for_one() -> None:
    code = dynamic_map(True)
    assert torch.equal(code[:127], -code[128:255].flip(0))


@pytest.mark.parametrize("signed", SIGNED)
def test_nearest_rounding_finds_the_nearest_entry(signed: bool) -> None:
    values = torch.cat([torch.rand(40, 255) * 2 - 1, torch.rand(40, 255).pow(8)])
    values = values if signed else values.abs()
    blocks = torch.cat([values, torch.ones(80, 1)], dim=1)
    codes, absmax = quantize_blocks(blocks, signed=signed, rounding="nearest")
    assert torch.equal(absmax, torch.ones(80))
    assert torch.equal(codes, nearest_by_distance(blocks, signed))


@pytest.mark.parametrize("signed", SIGNED)
def test_grid_rounding_finds_the_entry_nearest_to_the_grid_step(signed: bool) -> None:
    steps = torch.arange(GRID_STEPS, dtype=torch.float32) * 2 / (GRID_STEPS - 1) - 1
    assert torch.equal(grid_table(signed)[::17], nearest_by_distance(steps[::17], signed))
    values = torch.rand(50, 256) * 2 - 1 if signed else torch.rand(50, 256)
    values[:, 0] = 1
    codes, _ = quantize_blocks(values, signed=signed, rounding="grid")
    on_grid = steps[((values + 1) * 32767.5 + 0.5).long()]
    assert torch.equal(codes, nearest_by_distance(on_grid, signed))


@pytest.mark.parametrize("signed", SIGNED)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zeros_come_back_as_zeros(signed: bool, rounding: Rounding) -> None:
    values = torch.rand(3, 256)
    values[1] = 0
    codes, absmax = quantize_blocks(values, signed=signed, rounding=rounding)
    decoded = dequantize_blocks(codes, absmax, signed=signed)
    assert absmax[1] == 0
    assert torch.equal(decoded[1], torch.zeros(256))
    assert (decoded[0] - values[0]).abs().max() < 0.02


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("exponent", [-149, -140, -130, -126, -100, 0, 100, 127])
def test_blocks_of_any_magnitude_stay_finite(rounding: Rounding, exponent: int) -> None:
    values = torch.tensor(2.0**exponent, dtype=torch.float64).float() * torch.linspace(0, 1, 256)
    codes, absmax = quantize_blocks(values[None], signed=False, rounding=rounding)
    decoded = dequantize_blocks(codes, absmax, signed=False)
    assert torch.isfinite(decoded).all()
    if exponent >= -126:
        assert (decoded - values).abs().max() <= 0.02 * values.max()


def test_the_scratch_may_be_the_values_themselves() -> None:
    values = torch.randn(4, 256)
    expected = quantize_blocks(values.clone(), signed=True)
    overwritten = quantize_blocks(values, signed=True, scratch=values)
    assert torch.equal(overwritten[0], expected[0])
    assert torch.equal(overwritten[1], expected[1])


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="rounding"):
        quantize_blocks(torch.ones(1, 256), signed=True, rounding="down")  # type: ignore[arg-type]


def test_thresholds_lie_between_their_neighbours() -> None:
    for signed in SIGNED:
        code, threshold = dynamic_map(signed), midpoints(signed)
        assert ((code[:-1] < threshold) & (threshold < code[1:])).all()
