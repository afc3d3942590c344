"""The NF4 quantisation kernel gives the reference's bits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from kernels.nf4 import BLOCK_SIZES, NF4_CODE, encode, quantize
from kernels.nf4 import quantize_triton as nf4_quantize

pytestmark = pytest.mark.usefixtures("triton_on")

SHAPES = [(1,), (2,), (63,), (64,), (257,), (7, 9), (3, 2000), (33, 127), (4096, 3)]


def assert_same_bits(
    w: torch.Tensor, block_size: int, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = quantize(w, block_size, double_quant)
    with monkeypatch.context() as patch:
        patch.setenv("ENGINE_REFERENCE", "1")
        reference = quantize(w, block_size, double_quant)
    assert torch.equal(ours.packed, reference.packed)
    if not double_quant:
        assert torch.equal(ours.absmax, reference.absmax)
        return
    assert ours.nested_absmax is not None
    assert reference.nested_absmax is not None
    torch.testing.assert_close(ours.nested_absmax, reference.nested_absmax, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bits_are_those_of_the_reference(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    double_quant: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = (torch.randn(shape) * 0.05).to(device, dtype)
    if w.numel() > 128:
        w.view(-1)[64:128] = 0.0
    assert_same_bits(w, 64, double_quant, monkeypatch)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("numel", [5, 4096, 9001])
def test_every_block_size_works(
    block_size: int, numel: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_bits(torch.randn(numel, device=device), block_size, False, monkeypatch)


def test_values_next_to_every_threshold_get_the_reference_code(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    bits = thresholds.view(torch.int32)[:, None] + torch.arange(-30, 31, dtype=torch.int32)
    values = bits.view(torch.float32).flatten()
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
    for scale in (1.0, 0.37, 3e-5):
        w = torch.cat([torch.ones(len(blocks), 1), blocks], dim=1) * scale
        assert_same_bits(w.to(device), 64, False, monkeypatch)


# The interpreter warns where infinity meets the zero it is multiplied by.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 70, 299])
def test_a_weight_that_is_not_finite_is_refused(bad: float, at: int, device: torch.device) -> None:
    w = torch.randn(300, device=device)
    w[at] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(w)


def test_a_wrong_threshold_is_noticed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (NF4_CODE[1:] + NF4_CODE[:-1]).to(device) / 2
    wrong[7] += 0.02
    monkeypatch.setattr(encode, "_thresholds", lambda device: wrong)
    w = torch.randn(64, 64, device=device)
    encode._cells(torch.device("cpu"))
    with pytest.raises(AssertionError):
        assert_same_bits(w, 64, False, monkeypatch)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("even * 16 + odd", "odd * 16 + even"),
        ("scaled > tl.load(thresholds + i)", "scaled >= tl.load(thresholds + i)"),
        ("tl.static_range(15)", "tl.static_range(14)"),
        ("tl.div_rn(1.0, tl.maximum(largest, floor))", "1.0009765625 / tl.maximum(largest, floor)"),
        ("size = tl.abs(value)", "size = value"),
        ("tl.store(absmax + block, scale", "tl.store(absmax + block, largest + floor * 0 + 1.0"),
    ],
)
def test_a_planted_fault_in_the_kernel_is_noticed(
    old: str,
    new: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    """On values that are thresholds among others, in blocks of scale 1."""
    thresholds = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    w = torch.cat([torch.randn(49) / 4, thresholds]).repeat(5, 1)
    w[:, 0] = 1.0
    w[4, 0] = -1.0
    assert_same_bits(w.to(device), 64, False, monkeypatch)
    monkeypatch.setattr(encode, "quantize_whole_blocks", changed_launch(mutant, old, new))
    with pytest.raises(AssertionError):
        assert_same_bits(w.to(device), 64, False, monkeypatch)


def changed_launch(
    mutant: Callable[[ModuleType, str, str], ModuleType], old: str, new: str
) -> object:
    return mutant(nf4_quantize, old, new).quantize_whole_blocks
