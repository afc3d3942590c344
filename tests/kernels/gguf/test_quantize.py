"""GGUF's block formats, decoded by the `gguf` package, and the error that they leave."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gguf import FORMATS, quantize

# Root mean square error over the deviation of normal weights, about what llama.cpp's own
# quantisers leave.
LIMITS = {
    "q4_0": 0.086, "q5_0": 0.043, "q5_1": 0.038, "q8_0": 0.0056,
    "q4_k": 0.075, "q5_k": 0.038, "q6_k": 0.019,
}  # fmt: skip


def decoded(packed: Tensor, kind: str) -> Tensor:
    """What every reader of GGUF files makes of the bytes."""
    number = gguf.GGMLQuantizationType(FORMATS[kind].number)
    assert number.name.lower() == kind
    return torch.from_numpy(gguf.dequantize(packed.numpy(), number))


def relative(x: Tensor, y: Tensor) -> float:
    return float(((x - y).square().mean(-1).sqrt() / x.std(-1)).mean())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_what_other_programs_read(kind: str) -> None:
    x = torch.randn(24, 1024) * (torch.rand(24, 1) + 0.1) * 10.0 ** torch.randint(-2, 2, (24, 1))
    packed = quantize(x, kind)
    assert packed.shape == (24, 1024 // FORMATS[kind].size * FORMATS[kind].bytes)
    assert relative(x, decoded(packed, kind)) < LIMITS[kind]


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q5_1", "q8_0"])
def test_the_error_is_no_larger_than_that_of_the_package(kind: str) -> None:
    x = torch.randn(32, 512)
    number = gguf.GGMLQuantizationType(FORMATS[kind].number)
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), number), number))
    assert relative(x, decoded(quantize(x, kind), kind)) <= 1.001 * relative(x, theirs)


@pytest.mark.parametrize("kind", FORMATS)
def test_odd_blocks_are_finite_and_exact_where_they_can_be(kind: str) -> None:
    rows = torch.zeros(6, 256)
    rows[1] = 3.0
    rows[2] = -3.0
    rows[3, ::7] = 1e-7
    rows[4] = torch.arange(256) - 128.0
    rows[5, 0] = 6e4
    back = decoded(quantize(rows, kind), kind)
    assert torch.isfinite(back).all()
    assert torch.equal(back[0], rows[0])
    for row in (1, 2):
        assert torch.allclose(back[row], rows[row], rtol=2e-3)
    assert relative(rows[4:5], back[4:5]) < 0.1
    assert float((back[5, 1:].abs()).max()) <= 6e4 / 8


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q4_k", "q5_k", "q6_k"])
def test_inputs_that_matter_more_are_kept_better(kind: str) -> None:
    x = torch.randn(64, 512)
    importance = torch.where(torch.arange(512) % 8 == 0, 100.0, 0.01)
    plain, weighted = (decoded(quantize(x, kind, w), kind) for w in (None, importance))
    error = [float(((x - y).square() * importance).sum()) for y in (plain, weighted)]
    assert error[1] < 0.8 * error[0]


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"])
def test_inputs_silent_on_the_calibration_rows_have_weights_too(kind: str) -> None:
    x = torch.randn(16, 512)
    for silent in (512, 256, 40):
        importance = torch.rand(512)
        importance[:silent] = 0.0
        back = decoded(quantize(x, kind, importance), kind)
        assert relative(x[:, :silent], back[:, :silent]) < 2 * LIMITS[kind]


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q4_k", "q6_k"])
def test_only_the_ratios_of_importance_count(kind: str) -> None:
    x, importance = torch.randn(4, 256), torch.rand(256)
    expected = quantize(x, kind, importance)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(quantize(x, kind, importance * factor), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_of_the_weight_does_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(3, 256).to(dtype)
    assert torch.equal(quantize(x, "q4_k"), quantize(x.float(), "q4_k"))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 256)
    whole = quantize(x, "q6_k")
    monkeypatch.setattr("kernels.gguf.formats._CHUNK", 5 * 256)
    assert torch.equal(quantize(x, "q6_k"), whole)


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 256"):
        quantize(torch.zeros(2, 320), "q4_k")
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((1, 32), np.nan), "q8_0")
    with pytest.raises(KeyError):
        quantize(torch.zeros(1, 32), "q3_k")
