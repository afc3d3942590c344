"""The causal depthwise convolution: values, gradients, packed documents, state."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import AttentionPlan
from kernels.delta_net.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_backward,
    causal_conv1d_forward,
    causal_conv1d_step,
    final_conv_state,
)

BOUNDS = (0, 1, 3, 6, 10, 73)


def torch_conv(x: Tensor, weight: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """torch's own convolution, one document at a time, weight (C, 1, J)."""
    parts = []
    for start, end in pairwise(bounds):
        padded = F.pad(x[start:end].T, (weight.shape[-1] - 1, 0))
        parts.append(F.conv1d(padded, weight, groups=x.shape[1]).T)
    return F.silu(torch.cat(parts))


def case(dtype: torch.dtype = torch.float64, channels: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = (torch.randn(BOUNDS[-1], channels).to(dtype) for _ in range(2))
    return x, torch.randn(channels, 1, 4).to(dtype), dy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torchs_convolution_of_each_document(dtype: torch.dtype) -> None:
    x, weight, dy = case(dtype)
    leaves = [t.detach().double().clone().requires_grad_() for t in (x, weight)]
    truth = torch_conv(leaves[0], leaves[1], BOUNDS)
    wanted = (truth.detach(), *torch.autograd.grad(truth, leaves, dy.double()))
    y = causal_conv1d_forward(x, weight, BOUNDS)
    results = (y, *causal_conv1d_backward(dy, x, weight, BOUNDS, need_dweight=True))
    for ours, exact in zip(results, wanted, strict=True):
        assert ours is not None
        assert ours.dtype == dtype
        assert ours.shape == exact.shape
        error = (ours.double() - exact).abs().max()
        assert float(error) <= 4 * torch.finfo(dtype).eps * float(exact.abs().max())


def test_gradcheck() -> None:
    x, weight, _ = case(channels=2)
    plan = AttentionPlan.from_cu_seqlens(torch.tensor((0, 1, 3, 9)), 9)
    leaves = (x[:9].requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: causal_conv1d(a, b, plan), leaves)


def test_a_document_does_not_feel_another_at_all() -> None:
    x, weight, dy = case(torch.float32)
    other = x.clone()
    other[:6], other[10:] = float("nan"), float("inf")
    for one, two in (
        (causal_conv1d_forward(t, weight, BOUNDS) for t in (x, other)),
        (causal_conv1d_backward(dy, t, weight, BOUNDS)[0] for t in (x, other)),
    ):
        assert torch.equal(one[6:10], two[6:10])


def test_the_weight_gradient_is_only_formed_where_wanted() -> None:
    x, weight, dy = case()
    assert causal_conv1d_backward(dy, x, weight, BOUNDS)[1] is None


def test_weights_with_and_without_the_middle_dimension_agree() -> None:
    x, weight, dy = case()
    flat = weight.squeeze(1)
    assert torch.equal(
        causal_conv1d_forward(x, weight, BOUNDS), causal_conv1d_forward(x, flat, BOUNDS)
    )
    _, dweight = causal_conv1d_backward(dy, x, weight, BOUNDS, need_dweight=True)
    _, dflat = causal_conv1d_backward(dy, x, flat, BOUNDS, need_dweight=True)
    assert dweight is not None
    assert dflat is not None
    assert torch.equal(dweight.squeeze(1), dflat)


@pytest.mark.parametrize("split", [1, 2, 3, 40])
def test_a_sequence_continues_from_its_state(split: int) -> None:
    x, weight, _ = case()
    whole = causal_conv1d_forward(x, weight, (0, 73))
    state = final_conv_state(x[:split], 4, (0, split))
    rest = causal_conv1d_forward(x[split:], weight, (0, 73 - split), state)
    torch.testing.assert_close(rest, whole[split:])
    later = final_conv_state(x[split:], 4, (0, 73 - split), state)
    assert torch.equal(later, x[None, -3:])


def test_steps_continue_what_a_prefill_began() -> None:
    x, weight, _ = case()
    whole = causal_conv1d_forward(x, weight, (0, 73))
    state = final_conv_state(x[:2], 4, (0, 2))
    steps = [causal_conv1d_step(x[i : i + 1], weight, state) for i in range(2, 73)]
    torch.testing.assert_close(torch.cat(steps), whole[2:])


def test_final_state_is_zero_before_a_short_document() -> None:
    x, _, _ = case()
    state = final_conv_state(x, 4, BOUNDS)
    assert state.shape == (5, 3, 6)
    assert torch.equal(state[0, 2], x[0])
    assert not state[0, :2].any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, _ = case()
    with pytest.raises(ValueError, match="do not fit"):
        causal_conv1d_forward(x, weight, (0, 72))
    with pytest.raises(ValueError, match="do not fit"):
        causal_conv1d_forward(x, weight[:5], BOUNDS)
