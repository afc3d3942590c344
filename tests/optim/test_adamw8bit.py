"""AdamW8bit as an optimiser: it moves what it is given, resumes bit for bit and skips bad steps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.adamw8bit import dynamic_map
from optim import AdamW8bit
from optim.flat_state import slabs

SHAPES = [(64, 64), (16, 576), (192, 16), (1,), (4095,), (4096,), (100, 101), (3, 5, 700)]


def make_params(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(shape, generator=draw) * 0.1).to(dtype)) for shape in shapes]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    draw = torch.Generator().manual_seed(1000 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=draw) * 10.0 ** -(i % 4)
        param.grad = grad.to(param.dtype)


def train(optimizer: AdamW8bit, params: Sequence[Tensor], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def assert_same_state(one: AdamW8bit, other: AdamW8bit) -> None:
    ours, theirs = one.state_tensors(), other.state_tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_same_values(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_every_parameter_itself_changes() -> None:
    params = make_params(SHAPES)
    before = [param.detach().clone() for param in params]
    storage = [param.data_ptr() for param in params]
    optimizer = AdamW8bit(params, lr=1e-3)
    train(optimizer, params, range(1))
    for param, old, address in zip(params, before, storage, strict=True):
        assert param.data_ptr() == address
        assert ((param - old).abs() > 1e-5).all()


def test_small_parameters_follow_torch_adamw() -> None:
    shapes = [(1,), (63,), (64, 63), (4095,)]
    ours, theirs = make_params(shapes), make_params(shapes)
    optimizer = AdamW8bit(ours, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(60):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_8_bit_parameters_stay_close_to_torch_adamw() -> None:
    ours, theirs = make_params([(128, 128)]), make_params([(128, 128)])
    optimizer = AdamW8bit(ours, lr=1e-3)
    reference = torch.optim.AdamW(theirs, lr=1e-3)
    start = ours[0].detach().clone()
    for step in range(60):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    moved = (theirs[0] - start).norm()
    assert (ours[0] - theirs[0]).norm() < 0.03 * moved


def test_the_size_decides_which_moments_are_8_bit() -> None:
    params = make_params([(4095,), (4096,), (64, 64), (63, 64)])
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(1))
    dtypes = [optimizer.state[param]["exp_avg"].dtype for param in params]
    assert dtypes == [torch.float32, torch.uint8, torch.uint8, torch.float32]
    few = AdamW8bit(make_params([(16,)]), min_8bit_size=1)
    assert few.state_tensors()["exp_avg.codes"].shape == (1, 256)


def test_a_parameter_has_the_codes_it_would_have_alone() -> None:
    together = make_params(SHAPES)
    optimizer = AdamW8bit(together)
    train(optimizer, together, range(3))
    for i in range(len(SHAPES)):
        alone = make_params(SHAPES)
        single = AdamW8bit([alone[i]])
        for step in range(3):
            set_grads(alone, step)
            single.step()
        assert torch.equal(alone[i], together[i])
        for name, tensor in single.state[alone[i]].items():
            assert torch.equal(tensor, optimizer.state[together[i]][name]), name


def test_slabs_cover_every_row_once_and_cut_large_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = make_params([(300, 257), *SHAPES])
    train(AdamW8bit(expected), expected, range(4))
    monkeypatch.setattr("optim.flat_state.SLAB_ROWS", 7)
    params = make_params([(300, 257), *SHAPES])
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(4))
    assert_same_values(params, expected)
    segments = optimizer._built().segments
    cut = slabs(sorted(segments, key=lambda s: (s.quantized, s.row)))
    assert max(slab.rows for slab in cut) == 7
    for segment in segments:
        pieces = [p for slab in cut for p in slab.pieces if p.index == segment.index]
        assert pieces[0].begin == 0
        assert pieces[-1].end == segment.numel
        assert all(a.end == b.begin for a, b in itertools.pairwise(pieces))


def through_dict(source: AdamW8bit, target: AdamW8bit) -> None:
    target.load_state_dict(copy.deepcopy(source.state_dict()))


def through_tensors(source: AdamW8bit, target: AdamW8bit) -> None:
    target.load_state_tensors({k: v.clone() for k, v in source.state_tensors().items()})


@pytest.mark.parametrize("carry", [through_dict, through_tensors])
@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_ends_with_the_same_bits(
    carry: Callable[[AdamW8bit, AdamW8bit], None], low_precision: Any, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "low_precision": low_precision, "seed": 5}
    whole = make_params(SHAPES, dtype)
    straight = AdamW8bit(whole, **options)
    train(straight, whole, range(12))
    params = make_params(SHAPES, dtype)
    first = AdamW8bit(params, **options)
    train(first, params, range(5))
    second_params = [nn.Parameter(param.detach().clone()) for param in params]
    second = AdamW8bit(second_params, **options)
    carry(first, second)
    train(second, second_params, range(5, 12))
    assert_same_values(second_params, whole)
    assert_same_state(second, straight)


def test_the_state_dict_carries_the_groups_hyper_parameters() -> None:
    params = make_params(SHAPES)
    optimizer = AdamW8bit(params, lr=1e-3)
    optimizer.param_groups[0]["lr"] = 5e-4
    other = AdamW8bit(make_params(SHAPES), lr=1e-3)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 5e-4


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    params = make_params(SHAPES)
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(2))
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    smaller = AdamW8bit(make_params(SHAPES[:-1]))
    with pytest.raises(ValueError, match="expected"):
        smaller.load_state_tensors(state)
    with pytest.raises(ValueError, match="groups"):
        smaller.load_state_dict(optimizer.state_dict())
    permuted = AdamW8bit(make_params([SHAPES[1], SHAPES[0], *SHAPES[2:]]))
    with pytest.raises(ValueError, match="other sizes"):
        permuted.load_state_tensors(state)
    assert not permuted.state_tensors()["exp_avg.absmax"].any()
    with pytest.raises(ValueError, match=r"one side only: exp_avg\.codes"):
        optimizer.load_state_tensors({k: v for k, v in state.items() if k != "exp_avg.codes"})
    poisoned = state | {"exp_avg.absmax": state["exp_avg.absmax"] * float("nan")}
    with pytest.raises(ValueError, match="NaN"):
        optimizer.load_state_tensors(poisoned)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", [0, 2, 7])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad: float, where: int) -> None:
    params = make_params(SHAPES)
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(2))
    before = [param.detach().clone() for param in params]
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    set_grads(params, 2)
    grad = params[where].grad
    assert grad is not None
    grad.view(-1)[-1] = bad
    optimizer.step()
    assert_same_values(params, before)
    assert optimizer.skipped_steps == 1
    after = optimizer.state_tensors()
    assert all(torch.equal(after[name], state[name]) for name in state if name != "skipped_steps")
    untouched = make_params(SHAPES)
    train(AdamW8bit(untouched), untouched, range(3))
    train(optimizer, params, range(2, 3))
    assert_same_values(params, untouched)


def test_a_damaged_moment_stops_every_update() -> None:
    params = make_params(SHAPES)
    optimizer = AdamW8bit(params)
    train(optimizer, params, range(1))
    optimizer.state_tensors()["exp_avg_sq.absmax"][3] = float("nan")
    before = [param.detach().clone() for param in params]
    train(optimizer, params, range(1, 2))
    assert_same_values(params, before)
    assert optimizer.skipped_steps == 1


def test_a_gradient_scale_equals_scaled_gradients() -> None:
    ours, theirs = make_params(SHAPES), make_params(SHAPES)
    one, other = AdamW8bit(ours), AdamW8bit(theirs)
    for step in range(3):
        set_grads(ours, step)
        set_grads(theirs, step)
        for param in theirs:
            assert param.grad is not None
            param.grad.mul_(0.25)
        one.step(grad_scale=torch.tensor(0.25))
        other.step()
    assert_same_values(ours, theirs)
    one.step(grad_scale=torch.tensor(float("nan")))
    assert one.skipped_steps == 1
    assert_same_values(ours, theirs)


def test_a_parameter_without_gradient_is_left_out_of_the_step() -> None:
    params, expected = make_params(SHAPES), make_params(SHAPES)
    optimizer, reference = AdamW8bit(params), AdamW8bit(expected)
    set_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert optimizer.state_tensors()["steps"].tolist() == [1, 0, *[1] * (len(SHAPES) - 2)]
    # Its own first step, a step later than the others', is an ordinary first step.
    set_grads(params, 0)
    optimizer.step()
    set_grads(expected, 0)
    reference.step()
    assert torch.equal(params[1], expected[1])


def test_groups_have_their_own_rate_and_decay() -> None:
    params = make_params([(64, 64), (64, 64)])
    params[1].data.copy_(params[0].data)
    groups = [{"params": [params[0]], "lr": 0.0}, {"params": [params[1]], "weight_decay": 0.0}]
    optimizer = AdamW8bit(groups, lr=1e-2, weight_decay=0.5)
    before = params[0].detach().clone()
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert torch.equal(params[1], before)
    decayed = make_params([(64, 64)])
    optimizer = AdamW8bit(decayed, lr=1e-2, weight_decay=0.5)
    decayed[0].grad = torch.zeros_like(decayed[0])
    before = decayed[0].detach().clone()
    optimizer.step()
    torch.testing.assert_close(decayed[0].detach(), before * (1 - 1e-2 * 0.5))


def test_parameters_added_later_leave_the_others_as_they_were() -> None:
    expected = make_params(SHAPES)
    train(AdamW8bit(expected[:5]), expected[:5], range(6))
    params = make_params(SHAPES)
    optimizer = AdamW8bit(params[:5])
    train(optimizer, params[:5], range(3))
    optimizer.add_param_group({"params": params[5:]})
    train(optimizer, params, range(3, 6))
    assert_same_values(params[:5], expected[:5])
    assert optimizer.state_tensors()["steps"].tolist() == [6] * 5 + [3] * 3


def test_an_fp32_master_keeps_updates_that_bf16_would_lose() -> None:
    options: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.0}
    shapes = [(64, 64)]
    plain, mastered, random = (make_params(shapes, torch.bfloat16) for _ in range(3))
    exact = [nn.Parameter(plain[0].detach().float())]
    roundings: list[Any] = ["nearest", "master", "stochastic"]
    optimizers = [
        AdamW8bit(params, low_precision=rounding, **options)
        for params, rounding in zip((plain, mastered, random), roundings, strict=True)
    ]
    reference = AdamW8bit(exact, **options)
    start = exact[0].detach().clone()
    for _ in range(200):
        for params in (plain, mastered, random, exact):
            params[0].grad = torch.ones_like(params[0])
        for optimizer in (*optimizers, reference):
            optimizer.step()
    moved = (exact[0] - start).mean().item()
    assert moved == pytest.approx(-200 * 1e-5, rel=0.01)
    assert torch.equal(mastered[0], exact[0].bfloat16())
    assert (random[0].float() - start).mean().item() == pytest.approx(moved, rel=0.05)
    assert abs((plain[0].float() - start).mean().item()) < 0.5 * abs(moved)


def test_the_closure_is_called_with_gradients_on() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (param < 1).all()


def test_wrong_arguments_are_refused() -> None:
    params = make_params([(4,)])
    for options in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"block_size": 128}, {"eps": -1e-8}):
        with pytest.raises(ValueError):
            AdamW8bit(params, **options)
    with pytest.raises(ValueError, match="low_precision"):
        AdamW8bit(params, low_precision="up")  # type: ignore[arg-type]
    strided = [nn.Parameter(torch.zeros(4, 6).t())]
    strided[0].grad = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="contiguous"):
        AdamW8bit(strided).step()


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 6000), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_any_set_of_sizes_gives_what_each_size_gives_alone(sizes: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = [torch.randn(size, generator=draw) for size in sizes]
    grads = [torch.randn(size, generator=draw) for size in sizes]
    together = [nn.Parameter(value.clone()) for value in values]
    alone = [nn.Parameter(value.clone()) for value in values]
    joint = AdamW8bit(together, lr=1e-2)
    single = [AdamW8bit([param], lr=1e-2) for param in alone]
    for _ in range(2):
        for one, other, grad in zip(together, alone, grads, strict=True):
            one.grad, other.grad = grad.clone(), grad.clone()
        joint.step()
        for optimizer in single:
            optimizer.step()
    assert_same_values(together, alone)


def test_a_wrong_code_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    true_map = dynamic_map.dynamic_map

    def wrong(signed: bool, device: torch.device | str = "cpu") -> Tensor:
        return true_map(signed, device) * 1.05

    monkeypatch.setattr(dynamic_map, "dynamic_map", wrong)
    with pytest.raises(AssertionError):
        test_8_bit_parameters_stay_close_to_torch_adamw()
