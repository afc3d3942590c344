"""Adafactor beside transformers', and Lion in 8 bits beside bitsandbytes' Lion in 32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optim import Adafactor, Lion8bit

transformers = pytest.importorskip("transformers")
from transformers.optimization import Adafactor as TheirAdafactor  # noqa: E402

pytestmark = pytest.mark.interop

SHAPES = [(64, 96), (70, 40), (3, 20, 30), (37,)]
LR, DECAY = 1e-2, 0.1


def pairs(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]
    return [nn.Parameter(v.clone()) for v in values], [nn.Parameter(v.clone()) for v in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_is_that_of_transformers(dtype: torch.dtype) -> None:
    ours, theirs = pairs(dtype)
    optimizer = Adafactor(ours, LR, DECAY)
    peer = TheirAdafactor(
        theirs, lr=LR, weight_decay=DECAY, scale_parameter=False, relative_step=False
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=draw).to(dtype)
            other.grad = one.grad.clone()
        optimizer.step()
        peer.step()
    narrow = dtype != torch.float32
    for one, other in zip(ours, theirs, strict=True):
        rtol, atol = (2**-7, 1e-3) if narrow else (1e-5, 1e-6)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_lion_is_bitsandbytes_lion() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours, theirs = pairs(torch.float32)
    optimizer = Lion8bit(ours, LR, (0.9, 0.99), DECAY)
    peer = bitsandbytes.optim.Lion8bit(theirs, lr=LR, betas=(0.9, 0.99), weight_decay=DECAY)
    draw = torch.Generator().manual_seed(1)
    for _ in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            other.grad = one.grad.clone()
        optimizer.step()
        peer.step()
    for one, other in zip(ours, theirs, strict=True):
        # A momentum whose code rounds another way may turn a sign near zero.
        different = (one - other).abs() > 1e-6
        assert float(different.float().mean()) < 2e-3
