"""Steps in the backward pass give the bits of one step over everything, and hold one unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim import AdamW8bit, StepInBackward
from optim.clip import global_norm

# 8-bit and fp32 moments, and lengths that are no multiples of a row.
SHAPES = [(64, 64), (70,), (41, 101), (64, 3), (4097,), (1,)]
UNITS = [[4, 5], [2, 3], [1], [0]]
"""In the order of backward: the last parameters are used last. The first is used twice."""


def make_params(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(s, generator=draw) * 0.1).to(dtype)) for s in SHAPES]


def loss_of(params: Sequence[Tensor], step: int) -> Tensor:
    """A chain through all parameters, whose first one is read at its beginning and at its end."""
    draw = torch.Generator().manual_seed(100 + step)
    total = params[0].new_zeros(())
    for param in [*params, params[0]]:
        weights = torch.randn(param.shape, generator=draw).to(param.dtype)
        total = (param * weights).sum() + total.sin()
    return total


def build(
    dtype: torch.dtype, units: bool, **options: Any
) -> tuple[list[nn.Parameter], AdamW8bit, StepInBackward | None]:
    params = make_params(dtype)
    groups = [
        {"params": [params[i] for i in (0, 2, 3)], "weight_decay": 0.2},
        {"params": [params[i] for i in (1, 4, 5)], "lr": 3e-3},
    ]
    optimizer = AdamW8bit(groups, lr=1e-2, **options)
    made = StepInBackward(optimizer, [[params[i] for i in unit] for unit in UNITS])
    return params, optimizer, made if units else None


def advance(
    params: Sequence[nn.Parameter],
    optimizer: AdamW8bit,
    in_backward: StepInBackward | None,
    step: int,
) -> Tensor:
    """One step either way; its gradient norm."""
    loss = loss_of(params, step)
    if in_backward is not None:
        with in_backward.stepping():
            loss.backward()
        return in_backward.grad_norm()
    loss.backward()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    norm = global_norm([p.grad for p in order if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    return norm


def assert_same(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], one: AdamW8bit, other: AdamW8bit
) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert torch.equal(mine, yours)
    states = one.state_tensors(), other.state_tensors()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("way", ["reference", "kernels"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"low_precision": "stochastic", "seed": 12345678901}),
        (torch.bfloat16, {"low_precision": "master"}),
        (torch.float32, {"min_8bit_size": 1 << 62}),
    ],
)
def test_weights_and_state_are_those_of_a_step_at_once(
    dtype: torch.dtype, options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "kernels":
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
        monkeypatch.setenv("ENGINE_INTERPRET", "1")
    ours, one, in_backward = build(dtype, True, **options)
    theirs, other, _ = build(dtype, False, **options)
    before = [param.detach().clone() for param in ours]
    for step in range(3):
        norms = advance(ours, one, in_backward, step), advance(theirs, other, None, step)
        assert torch.equal(*norms)
        assert float(norms[0]) > 0
        if step == 0:
            assert all(not torch.equal(p, old) for p, old in zip(ours, before, strict=True))
    assert_same(ours, theirs, one, other)
    assert all(param.grad is None for param in ours)


def test_a_state_goes_on_the_other_way() -> None:
    ours, one, in_backward = build(torch.float32, True)
    theirs, other, second = build(torch.float32, True)
    for step in range(4):
        advance(ours, one, in_backward, step)
    for step in range(4):
        advance(theirs, other, second if step < 2 else None, step)
        if step == 1:
            saved = {name: tensor.clone() for name, tensor in other.state_tensors().items()}
            fresh, other, second = build(torch.float32, True)
            for param, value in zip(fresh, theirs, strict=True):
                param.data.copy_(value.data)
            theirs = fresh
            other.load_state_tensors(saved)
    assert_same(ours, theirs, one, other)


def test_the_gradients_of_one_unit_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer, in_backward = build(torch.float32, True)
    alive: list[set[int]] = []
    step = AdamW8bit.step

    def noted(self: AdamW8bit, *args: Any, **options: Any) -> Any:
        alive.append({i for i, param in enumerate(params) if param.grad is not None})
        return step(self, *args, **options)

    monkeypatch.setattr(AdamW8bit, "step", noted)
    advance(params, optimizer, in_backward, 0)
    assert alive == [set(unit) for unit in UNITS]


@pytest.mark.parametrize("way", ["reference", "kernels"])
def test_a_scale_that_is_not_finite_changes_nothing_and_is_one_skipped_step(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "kernels":
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
        monkeypatch.setenv("ENGINE_INTERPRET", "1")
    params, optimizer, in_backward = build(torch.float32, True)
    assert in_backward is not None
    advance(params, optimizer, in_backward, 0)
    before = [param.detach().clone() for param in params]
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    with in_backward.stepping(torch.tensor(float("nan"))):
        loss_of(params, 1).backward()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    after = optimizer.state_tensors()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(after[name], state[name]) for name in state if name != "skipped_steps")


def spoiled(gradient: Tensor) -> Tensor:
    return gradient * float("inf")


def test_a_gradient_that_is_not_finite_stops_its_own_unit() -> None:
    params, optimizer, in_backward = build(torch.float32, True)
    before = [param.detach().clone() for param in params]
    params[3].register_hook(spoiled)
    norm = advance(params, optimizer, in_backward, 0)
    moved = [i for i, old in enumerate(before) if not torch.equal(params[i], old)]
    assert moved == [0, 1, 4, 5]
    assert optimizer.skipped_steps == 1
    # In the order of the groups: the first, the third and the fourth parameter, then the others.
    assert optimizer.state_tensors()["steps"].tolist() == [1, 0, 0, 1, 1, 1]
    assert not bool(torch.isfinite(norm))


def test_a_parameter_without_gradient_is_left_out() -> None:
    ours, one, in_backward = build(torch.float32, True)
    theirs, other, _ = build(torch.float32, False)

    def partial(params: Sequence[Tensor]) -> Tensor:
        return (params[0] * params[2].sum() + params[1].sum()).square().sum()

    assert in_backward is not None
    with in_backward.stepping():
        partial(ours).backward()
    partial(theirs).backward()
    other.step()
    other.zero_grad()
    assert_same(ours, theirs, one, other)
    assert one.state_tensors()["steps"].tolist() == [1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("way", ["reference", "kernels"])
def test_a_step_of_some_neither_moves_nor_looks_at_the_others(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "kernels":
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
        monkeypatch.setenv("ENGINE_INTERPRET", "1")
    params, optimizer, _ = build(torch.float32, False)
    before = [param.detach().clone() for param in params]
    loss_of(params, 0).backward()
    assert params[3].grad is not None
    params[3].grad.fill_(float("nan"))
    optimizer.state_tensors()  # makes the state
    optimizer.state[params[2]]["exp_avg_absmax"].fill_(float("inf"))
    # Numbers are in the order of the groups: the first parameter, and the second and the last.
    optimizer.step(only=(0, 3, 5))
    moved = [i for i, old in enumerate(before) if not torch.equal(params[i], old)]
    assert moved == [0, 1, 5]
    assert optimizer.skipped_steps == 0
    optimizer.step(only=(1, 4))
    assert torch.equal(params[2], before[2]) and torch.equal(params[4], before[4])
    assert optimizer.skipped_steps == 1


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a value from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host read a value from the device")
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_nothing_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    monkeypatch.setenv("ENGINE_INTERPRET", "1")
    params, optimizer, in_backward = build(torch.float32, True)
    with NoWaiting():
        norm = advance(params, optimizer, in_backward, 0)
    with pytest.raises(AssertionError, match="read a value"), NoWaiting():
        norm.item()


def test_a_failed_pass_leaves_no_hook() -> None:
    params, _, in_backward = build(torch.float32, True)
    assert in_backward is not None
    with pytest.raises(ZeroDivisionError), in_backward.stepping():
        raise ZeroDivisionError
    before = [param.detach().clone() for param in params]
    loss_of(params, 0).backward()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    with pytest.raises(ValueError, match="clear the gradients"), in_backward.stepping():
        pass


@pytest.mark.parametrize(
    "change", [lambda u: u[1:], lambda u: [*u, u[0]], lambda u: [*u, [nn.Parameter(torch.ones(2))]]]
)
def test_units_must_be_the_parameters(change: Callable[[list[Any]], list[Any]]) -> None:
    params, optimizer, _ = build(torch.float32, False)
    with pytest.raises(ValueError, match="every parameter of the optimizer once"):
        StepInBackward(optimizer, change([[params[i] for i in unit] for unit in UNITS]))
