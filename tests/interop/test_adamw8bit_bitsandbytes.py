"""AdamW8bit against bitsandbytes' on the CPU, side by side over sixty steps of a falling rate."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from optim import AdamW8bit, lr_at

pytestmark = pytest.mark.interop

STEPS = 60
SHAPES = [(64, 64), (16, 576), (4096,), (100, 101), (3, 1367), (300, 257)]
SMALL_SHAPES = [(192, 16), (4095,), (7,), (1,)]


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=draw) * 0.05 for shape in shapes]
    return [nn.Parameter(value.to(dtype)) for value in values]


def gradient(index: int, step: int, like: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + index)
    grad = torch.randn(like.shape, generator=draw) * 10.0 ** -(index % 4)
    if index % 3 == 1:
        # Whole blocks, and single elements, that some steps do not reach.
        grad.view(-1)[: like.numel() // 2] = 0.0
        grad.view(-1)[step::7] = 0.0
    return grad.to(like.dtype)


def run_both(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, **ours_only: str
) -> tuple[AdamW8bit, list[nn.Parameter], bitsandbytes.optim.AdamW8bit, list[nn.Parameter]]:
    ours, theirs = make_params(shapes, dtype), make_params(shapes, dtype)
    optimizer = AdamW8bit(ours, lr=1e-3, weight_decay=0.01, **ours_only)  # type: ignore[arg-type]
    reference = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-3, weight_decay=0.01)
    for step in range(STEPS):
        rate = lr_at(step, base=1e-3, warmup=5, total=STEPS)
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad, other.grad = (gradient(index, step, one) for _ in range(2))
        optimizer.step()
        reference.step()
    return optimizer, ours, reference, theirs


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_scales_and_parameters_are_equal_bit_for_bit(
    dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled loop rounds the root correctly, which torch's and so bitsandbytes' does not."""
    monkeypatch.setenv("ENGINE_REFERENCE", "0" if compiled else "1")
    optimizer, ours, reference, theirs = run_both(SHAPES, dtype)
    for one, other in zip(ours, theirs, strict=True):
        mine, peer = optimizer.state[one], reference.state[other]
        assert torch.equal(mine["exp_avg"], peer["state1"].view(-1))
        assert torch.equal(mine["exp_avg_sq"], peer["state2"].view(-1))
        assert torch.equal(mine["exp_avg_absmax"], peer["absmax1"])
        assert torch.equal(mine["exp_avg_sq_absmax"], peer["absmax2"])
        if compiled and dtype == torch.float32:
            assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(one, other)


def test_small_parameters_keep_equal_moments_and_follow_within_rounding() -> None:
    optimizer, ours, reference, theirs = run_both(SMALL_SHAPES, torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        mine, peer = optimizer.state[one], reference.state[other]
        torch.testing.assert_close(mine["exp_avg"], peer["state1"].view(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(mine["exp_avg_sq"], peer["state2"].view(-1), rtol=1e-6, atol=0)
        # They divide by sqrt(v) + eps sqrt(1 - b2^t), we as the formula is written.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_the_comparison_notices_the_other_rounding() -> None:
    optimizer, ours, reference, theirs = run_both(SHAPES[:1], torch.float32, rounding="nearest")
    mine, peer = optimizer.state[ours[0]], reference.state[theirs[0]]
    assert not torch.equal(mine["exp_avg"], peer["state1"].view(-1))
