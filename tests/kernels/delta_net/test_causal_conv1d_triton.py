"""The Triton causal convolution against float64 and the torch reference."""

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import AttentionPlan
from kernels.delta_net import causal_conv1d, causal_conv1d_triton

Accurate = Callable[[Tensor, Tensor, Tensor], None]
Mutant = Callable[[ModuleType, str, str], ModuleType]

# Documents of one token, and boundaries at and about the 64 tokens that one program walks.
BOUNDS = {
    1: (0, 1),
    63: (0, 1, 2, 4, 7, 63),
    131: (0, 62, 64, 66, 67, 131),
    257: (0, 62, 64, 65, 66, 128, 131, 257),
}

pytestmark = pytest.mark.usefixtures("triton_on")


def torch_conv(x: Tensor, weight: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """torch's own convolution, one document at a time, weight (C, 1, J)."""
    parts = []
    for start, end in pairwise(bounds):
        padded = F.pad(x[start:end].T, (weight.shape[-1] - 1, 0))
        parts.append(F.conv1d(padded, weight, groups=x.shape[1]).T)
    return F.silu(torch.cat(parts))


def inputs(
    tokens: int, channels: int, dtype: torch.dtype, device: torch.device, taps: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = (torch.randn(tokens, channels, device=device).to(dtype) for _ in range(2))
    return x, torch.randn(channels, 1, taps, device=device).to(dtype), dy


def check(
    accurate: Accurate,
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    taps: int = 4,
) -> None:
    x, weight, dy = inputs(tokens, channels, dtype, device, taps)
    bounds = BOUNDS[tokens]
    plan = AttentionPlan.from_cu_seqlens(torch.tensor(bounds), tokens)

    def run(kind: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [t.to(kind).detach().requires_grad_(True) for t in (x, weight)]
        if ours:
            y = causal_conv1d.causal_conv1d(leaves[0], leaves[1], plan)
        else:
            y = torch_conv(leaves[0], leaves[1], bounds)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))]

    for mine, plain, true in zip(
        run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True
    ):
        assert mine.dtype == dtype
        accurate(mine, plain, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 1), (1, 300), (63, 37), (257, 6)])
def test_values_and_gradients_are_accurate(
    tokens: int, channels: int, dtype: torch.dtype, device: torch.device, accurate: Accurate
) -> None:
    check(accurate, tokens, channels, dtype, device)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_fewer_taps_are_accurate(taps: int, device: torch.device, accurate: Accurate) -> None:
    check(accurate, 63, 5, torch.float32, device, taps)


def test_the_kernel_is_what_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = inputs(1, 2, torch.float32, device)
    monkeypatch.setattr(causal_conv1d_triton, "forward", lambda *given: "forward")
    monkeypatch.setattr(causal_conv1d_triton, "backward", lambda *given: "backward")
    outcome: list[object] = [
        causal_conv1d.causal_conv1d_forward(x, weight, (0, 1)),
        causal_conv1d.causal_conv1d_backward(dy, x, weight, (0, 1)),
    ]
    assert outcome == ["forward", "backward"]
    wide = causal_conv1d.causal_conv1d_forward(x.double(), weight.double(), (0, 1))
    assert wide.dtype == torch.float64


def test_more_taps_are_refused(device: torch.device) -> None:
    x, weight, dy = inputs(63, 2, torch.float32, device, taps=5)
    with pytest.raises(ValueError, match="5 taps"):
        causal_conv1d.causal_conv1d_forward(x, weight, (0, 63))
    with pytest.raises(ValueError, match="5 taps"):
        causal_conv1d.causal_conv1d_backward(dy, x, weight, (0, 63))


def check_state(accurate: Accurate, depth: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, _ = inputs(63, 37, dtype, device)
    state = torch.randn(5, depth, 37, device=device).to(dtype)

    def whole(kind: torch.dtype) -> Tensor:
        """torch's convolution of every document behind its state."""
        parts = []
        for document, (start, end) in enumerate(pairwise(BOUNDS[63])):
            joined = torch.cat((state[document, depth - 3 :], x[start:end])).to(kind)
            y = torch_conv(joined, weight.to(kind), (0, joined.shape[0]))
            parts.append(y[3:])
        return torch.cat(parts)

    outcome = causal_conv1d.causal_conv1d_forward(x, weight, BOUNDS[63], state)
    accurate(outcome, whole(dtype), whole(torch.float64))


@pytest.mark.parametrize("depth", [3, 4])
def test_values_from_a_state_are_accurate(
    depth: int, device: torch.device, accurate: Accurate
) -> None:
    check_state(accurate, depth, torch.float16, device)


@pytest.mark.parametrize("shape", [(4, 3, 2), (5, 2, 2), (5, 3, 1)])
def test_a_state_that_does_not_fit_is_refused(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight, _ = inputs(63, 2, torch.float32, device)
    with pytest.raises(ValueError, match="state"):
        causal_conv1d.causal_conv1d_forward(
            x, weight, BOUNDS[63], torch.zeros(shape, device=device)
        )


@pytest.mark.parametrize("split", [1, 2, 70])
def test_a_sequence_continues_from_its_state(split: int, device: torch.device) -> None:
    x, weight, _ = inputs(73, 6, torch.float32, device)
    whole = causal_conv1d.causal_conv1d_forward(x, weight, (0, 73))
    state = causal_conv1d.final_conv_state(x[:split], 4, (0, split))
    rest = causal_conv1d.causal_conv1d_forward(x[split:], weight, (0, 73 - split), state)
    torch.testing.assert_close(rest, whole[split:], rtol=1e-6, atol=1e-6)


def test_column_blocks_give_what_contiguous_tensors_give(device: torch.device) -> None:
    matrix = torch.randn(63, 100, device=device)
    x, dy = matrix[:, 3:40], matrix[:, 50:87]
    weight = torch.randn(37, 4, device=device)
    y = causal_conv1d.causal_conv1d_forward(x, weight, BOUNDS[63])
    outcome = causal_conv1d.causal_conv1d_backward(dy, x, weight, BOUNDS[63], need_dweight=True)
    for apart in (x.contiguous(), x.T.contiguous().T):
        other = dy.T.contiguous().T
        wanted = causal_conv1d.causal_conv1d_backward(
            other, apart, weight, BOUNDS[63], need_dweight=True
        )
        assert torch.equal(y, causal_conv1d.causal_conv1d_forward(apart, weight, BOUNDS[63]))
        assert torch.equal(outcome[0], wanted[0])
        assert outcome[1] is not None
        assert wanted[1] is not None
        assert outcome[1].shape == weight.shape
        assert torch.equal(outcome[1], wanted[1])


def test_a_document_does_not_feel_another_at_all(device: torch.device) -> None:
    x, weight, dy = inputs(131, 3, torch.float32, device)
    bounds, own = BOUNDS[131], slice(64, 66)
    other, other_dy = x.clone(), dy.clone()
    for tensor in (other, other_dy):
        tensor[: own.start], tensor[own.stop :] = float("nan"), float("nan")
    results = [
        (
            causal_conv1d.causal_conv1d_forward(one, weight, bounds)[own],
            causal_conv1d.causal_conv1d_backward(above, one, weight, bounds)[0][own],
        )
        for one, above in ((x, dy), (other, other_dy))
    ]
    for clean, neighbour in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, neighbour)


@pytest.mark.parametrize("runs", [1, 256])
def test_the_weight_gradient_uses_every_token_once(
    runs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no weight silu' is 1/2 everywhere, so that every sum is exact."""
    monkeypatch.setattr(causal_conv1d_triton, "_DWEIGHT_RUNS", runs)
    ones = torch.ones(131, 2, device=device)
    bounds = BOUNDS[131]
    _, dweight = causal_conv1d.causal_conv1d_backward(
        ones, ones, torch.zeros(2, 4, device=device), bounds, need_dweight=True
    )
    lengths = [end - start for start, end in pairwise(bounds)]
    wanted = [sum(max(0, length - j) for length in lengths) / 2 for j in (3, 2, 1, 0)]
    assert dweight is not None
    assert dweight.tolist() == [wanted, wanted]


def test_nothing_is_computed_for_no_tokens(device: torch.device) -> None:
    x, weight, dy = inputs(0, 3, torch.float32, device)
    assert causal_conv1d.causal_conv1d_forward(x, weight, (0, 0)).shape == (0, 3)
    dx, dweight = causal_conv1d.causal_conv1d_backward(dy, x, weight, (0, 0), need_dweight=True)
    assert dx.shape == (0, 3)
    assert dweight is not None
    assert not dweight.any()


def test_rows_beyond_two_to_the_31_are_reached(device: torch.device) -> None:
    stride = 2**30 + 8
    # numpy's memory is not touched until it is written, so these 4 GiB cost three pages.
    memory = torch.from_numpy(np.empty(2 * stride + 64, dtype=np.float16)).to(device)
    x = memory.as_strided((3, 64), (stride, 1))
    x.copy_(torch.randn(3, 64))
    weight = torch.randn(64, 4, device=device).half()
    y = causal_conv1d.causal_conv1d_forward(x, weight, (0, 3))
    assert torch.equal(y, causal_conv1d.causal_conv1d_forward(x.clone(), weight, (0, 3)))
    got, _ = causal_conv1d.causal_conv1d_backward(x, x, weight, (0, 3))
    want, _ = causal_conv1d.causal_conv1d_backward(x.clone(), x.clone(), weight, (0, 3))
    assert torch.equal(got, want)


def test_positions_say_where_a_token_stands(device: torch.device) -> None:
    document, position = causal_conv1d_triton.token_positions((0, 1, 3, 6), device)
    assert document.tolist() == [0, 1, 1, 2, 2, 2]
    assert position.tolist() == [0, 0, 1, 0, 1, 2]
    assert causal_conv1d_triton.token_positions((0, 1, 3, 6), device)[0] is document


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(row - BACK) * x_row", "row * x_row"),
        ("at = weight_ptr + column * TAPS + (TAPS - 1 - BACK)", "at = weight_ptr + column * TAPS"),
        ("reach = tl.minimum(position, TAPS - 1)", "reach = TAPS - 1"),
        ("y = a / (1.0 + tl.exp(-a))", "y = a"),
        ("s * (1.0 + a * (1.0 - s))", "s"),
        ("own = tl.where(step < run, da, 0.0)", "own = da"),
        ("g2 += w2 * tl.where(reach >= 2, da, 0.0)", "g2 += w2 * da"),
        ("for step in range(run + 3)", "for step in range(run)"),
        ("done = known & (step >= 3)", "done = known & (step >= 4)"),
        ("        x3 = x2\n", "        x3 = x1\n"),
        ("tl.store(share + channels, dw1", "tl.store(share + channels, dw2"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_planted_fault_breaks_the_rule(
    old: str,
    new: str,
    device: torch.device,
    accurate: Accurate,
    mutant: Mutant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = mutant(causal_conv1d_triton, old, new)
    monkeypatch.setattr(causal_conv1d, "causal_conv1d_triton", changed)
    with pytest.raises(AssertionError):
        check(accurate, 131, 2, torch.float32, device)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("depth + depth + position - BACK", "depth + depth - BACK"),
        ("document.to(tl.int64) * depth", "0 * depth"),
        ("far = inside & (position < BACK)", "far = inside & (position < 1)"),
    ],
)
def test_a_planted_fault_in_the_state_breaks_the_rule(
    old: str,
    new: str,
    device: torch.device,
    accurate: Accurate,
    mutant: Mutant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = mutant(causal_conv1d_triton, old, new)
    monkeypatch.setattr(causal_conv1d, "causal_conv1d_triton", changed)
    with pytest.raises(AssertionError):
        check_state(accurate, 3, torch.float32, device)
