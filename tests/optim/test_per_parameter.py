"""Lion, Adafactor and Muon by their formulas in float64, and their state as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.adamw8bit.dynamic_map import dynamic_map
from optim import Adafactor, Lion8bit, Muon, StepInBackward, StepOptimizer
from optim.muon import is_hidden_matrix, orthogonal

SHAPES = [(64, 96), (70, 40), (3, 20, 30), (37,)]
LR, DECAY = 0.01, 0.1


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(drawn(shape, i).to(dtype)) for i, shape in enumerate(SHAPES)]


def muon(params: list[nn.Parameter]) -> Muon:
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "muon": False}]
    return Muon(groups, LR, DECAY)


MAKERS: dict[str, Callable[[list[nn.Parameter]], StepOptimizer]] = {
    "lion8bit": lambda params: Lion8bit(params, LR, (0.9, 0.99), DECAY),
    "adafactor": lambda params: Adafactor(params, LR, DECAY),
    "muon": muon,
}


def advance(optimizer: StepOptimizer, params: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for index, param in enumerate(params):
            param.grad = drawn(tuple(param.shape), 100 * step + index + 7).to(param.dtype)
        optimizer.step(grad_scale=0.5)


@pytest.mark.parametrize("name", MAKERS)
def test_a_stopped_optimizer_goes_on_to_the_same_bits(name: str) -> None:
    whole, part, again = parameters(), parameters(), parameters()
    advance(MAKERS[name](whole), whole, 0, 5)
    before, after = MAKERS[name](part), MAKERS[name](again)
    advance(before, part, 0, 2)
    state = {key: tensor.clone() for key, tensor in before.state_tensors().items()}
    for one, other in zip(again, part, strict=True):
        one.data.copy_(other.data)
    after.load_state_tensors(state)
    advance(after, again, 2, 5)
    assert all(torch.equal(one, other) for one, other in zip(again, whole, strict=True))
    with pytest.raises(ValueError, match="on one side only"):
        after.load_state_tensors({})
    state["layout"][1] += 1
    with pytest.raises(ValueError, match="other sizes"):
        after.load_state_tensors(state)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bad", ["gradient", "scale", "huge gradient", "state"])
def test_a_step_that_is_not_finite_changes_nothing(name: str, bad: str) -> None:
    params = parameters()
    optimizer = MAKERS[name](params)
    advance(optimizer, params, 0, 1)
    before = [p.detach().clone() for p in params]
    if bad == "state":
        floats = [t for t in optimizer.state_tensors().values() if t.is_floating_point()]
        floats[-1].view(-1)[-1] = math.inf
    state = {key: tensor.clone() for key, tensor in optimizer.state_tensors().items()}
    grad = params[1].grad
    assert grad is not None
    if "gradient" in bad:
        grad[3, 4] = 1e30 if "huge" in bad else math.inf  # a square that fp32 does not hold
    optimizer.step(grad_scale=torch.tensor(math.nan if bad == "scale" else 1.0))
    assert all(torch.equal(one, other) for one, other in zip(params, before, strict=True))
    for key, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, state[key]) != (key == "skipped_steps"), key


def joint(factors: list[Tensor], params: list[nn.Parameter]) -> Tensor:
    """A loss whose gradients are the factors."""
    return torch.stack([(f * p).sum() for f, p in zip(factors, params, strict=True)]).sum()


@pytest.mark.parametrize("name", MAKERS)
def test_steps_in_backward_are_those_of_one_step(name: str) -> None:
    params, plain = parameters(), parameters()
    optimizer, whole = MAKERS[name](params), MAKERS[name](plain)
    inside = StepInBackward(optimizer, [[params[3]], [params[1], params[0]], [params[2]]])
    for step in range(2):
        factors = [drawn(shape, 50 + step) for shape in SHAPES]
        with inside.stepping(torch.tensor(1.0)):
            joint(factors, params).backward()
        joint(factors, plain).backward()
        whole.step()
        whole.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(params, plain, strict=True))


@pytest.mark.parametrize("name", ["lion8bit", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_follow_the_fp32_update_rounded_once(
    name: str, dtype: torch.dtype
) -> None:
    narrow = parameters(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    one, other = MAKERS[name](narrow), MAKERS[name](wide)
    for index, (a, b) in enumerate(zip(narrow, wide, strict=True)):
        a.grad = drawn(tuple(a.shape), index).to(dtype)
        b.grad = a.grad.float()
    one.step()
    other.step()
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(narrow, wide, strict=True))


def test_lion_moves_by_the_sign_of_its_momentum_in_eight_bits() -> None:
    params = parameters()
    optimizer = Lion8bit(params, LR, (0.9, 0.99), DECAY)
    truth = [p.detach().double() for p in params]
    momenta = [torch.zeros_like(t) for t in truth]
    for step in range(4):
        for index, param in enumerate(params):
            grad = drawn(tuple(param.shape), 10 * step + index).double()
            param.grad = grad.float()
            sign = torch.sign(0.9 * momenta[index] + 0.1 * grad)
            truth[index] = truth[index] * (1 - LR * DECAY) - LR * sign
            momentum = 0.99 * momenta[index] + 0.01 * grad
            momenta[index] = through_eight_bits(momentum) if param.numel() >= 4096 else momentum
        optimizer.step()
    for param, wanted in zip(params, truth, strict=True):
        torch.testing.assert_close(param.double(), wanted, rtol=0, atol=1e-6)
    codes = optimizer.state[params[0]]["exp_avg"]
    assert (codes.dtype, codes.shape) == (torch.uint8, (24, 256))


def through_eight_bits(momentum: Tensor) -> Tensor:
    """Blocks of 256 rounded to the nearest value of the signed map, in float64."""
    blocks = momentum.reshape(-1, 256)
    largest = blocks.abs().amax(1, keepdim=True)
    values = dynamic_map(True).double()
    nearest = ((blocks / largest).unsqueeze(-1) - values).abs().argmin(-1)
    return (values[nearest] * largest).view(momentum.shape)


def test_adafactor_is_its_formula() -> None:
    params = parameters()
    optimizer = Adafactor(params, LR, DECAY)
    truth = [p.detach().double() for p in params]
    rows, columns = ([torch.zeros(()).double()] * 4 for _ in range(2))
    for step in range(1, 4):
        beta = 1.0 - step**-0.8
        for index, param in enumerate(params):
            grad = drawn(tuple(param.shape), 10 * step + index).double()
            param.grad = grad.float()
            square = grad**2 + 1e-30
            if param.ndim == 1:
                rows[index] = beta * rows[index] + (1 - beta) * square
                update = grad / rows[index].sqrt()
            else:
                rows[index] = beta * rows[index] + (1 - beta) * square.mean(-1, keepdim=True)
                columns[index] = beta * columns[index] + (1 - beta) * square.mean(-2, keepdim=True)
                share = rows[index] * columns[index] / rows[index].mean(-2, keepdim=True)
                update = grad / share.sqrt()
            update /= update.square().mean().sqrt().clamp(min=1.0)
            truth[index] = truth[index] * (1 - LR * DECAY) - LR * update
        optimizer.step()
    for param, wanted in zip(params, truth, strict=True):
        torch.testing.assert_close(param.double(), wanted, rtol=1e-5, atol=1e-6)
    named = optimizer.state_tensors()
    assert named["0.exp_avg_sq_row"].shape == (64,)
    assert named["2.exp_avg_sq_col"].shape == (3, 30)


def test_muons_updates_have_singular_values_near_one() -> None:
    for shape in SHAPES[:3]:
        values = torch.linalg.svdvals(orthogonal(drawn(shape, 3)).float())
        assert 0.5 < float(values.min()) <= float(values.max()) < 1.3
    both = orthogonal(drawn(SHAPES[2], 3))
    each = [orthogonal(drawn(SHAPES[2], 3)[i]) for i in range(3)]
    torch.testing.assert_close(both, torch.stack(each), rtol=0.02, atol=0.02)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torchs_and_its_rest_is_adamw(dtype: torch.dtype) -> None:
    flat = [shape for shape in SHAPES if len(shape) != 3]
    ours, theirs = ([nn.Parameter(drawn(s, 1).to(dtype)) for s in flat] for _ in range(2))
    groups: list[dict[str, Any]] = [{"params": ours[:2]}, {"params": ours[2:], "muon": False}]
    optimizer = Muon(groups, LR, DECAY)
    peer = torch.optim.Muon(theirs[:2], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW(theirs[2:], lr=LR, weight_decay=DECAY)
    for step in range(4):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            one.grad = drawn(tuple(one.shape), 10 * step + index).to(dtype)
            other.grad = one.grad.clone()
        for each in (optimizer, rest, peer):
            each.step()
    exact = dtype == torch.float32
    for one, other in zip(ours, theirs, strict=True):
        # torch rounds a bf16 parameter twice a step, and AdamW's moments with it.
        rtol, atol = (1e-5, 1e-6) if exact else (8 * 2**-8, 4 * LR * 2**-6)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_muon_is_for_the_matrices_between_embedding_and_head() -> None:
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    names = {
        "model.layers.0.mlp.up_proj.weight": True,
        "model.layers.0.mlp.experts.down_proj": True,
        "model.embed_tokens.weight": False,
        "lm_head.weight": False,
        "model.layers.0.linear_attn.conv1d.weight": False,
    }
    assert {name: is_hidden_matrix(name, matrix) for name in names} == names
    assert not is_hidden_matrix("model.norm.weight", vector)
    with pytest.raises(ValueError, match="for matrices"):
        Muon([vector])


@pytest.mark.parametrize("maker", [Lion8bit, Adafactor, Muon])
def test_wrong_arguments_are_refused(maker: Callable[..., StepOptimizer]) -> None:
    with pytest.raises(ValueError, match="not be negative"):
        maker([nn.Parameter(torch.zeros(2, 2))], lr=-1.0)
    optimizer = maker([nn.Parameter(torch.zeros(4, 4).T[:2])])
    with pytest.raises(ValueError, match="contiguous"):
        optimizer.state_tensors()
