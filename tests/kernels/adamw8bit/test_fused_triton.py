"""The flat AdamW kernels against their torch reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.adamw8bit import fused_triton as adamw8bit_flat
from kernels.adamw8bit import launch as adamw8bit_launch
from kernels.adamw8bit.dynamic_map import FIRST_CELL, Rounding, magnitude_tables, midpoints
from optim import AdamW8bit

pytestmark = pytest.mark.usefixtures("triton_on")

SHAPES = [(64, 64), (1,), (257,), (63, 3), (41, 101), (4096 + 16,)]


def make_params(
    device: torch.device, dtype: torch.dtype = torch.float32, shapes: Sequence[Any] = SHAPES
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=draw) * 0.1 for shape in shapes]
    return [nn.Parameter(value.to(device, dtype)) for value in values]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    draw = torch.Generator().manual_seed(1000 + step)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=draw) * 10.0 ** -(i % 4)
        if i == 4:
            grad.view(-1)[:700] = 0.0
        param.grad = grad.to(param.device, param.dtype)


class Pair:
    """Two optimisers on equal parameters, one with the kernels and one with the reference."""

    def __init__(
        self,
        device: torch.device,
        monkeypatch: pytest.MonkeyPatch,
        params: Any = None,
        **options: Any,
    ) -> None:
        self.patch = monkeypatch
        make = params or (lambda: make_params(device))
        self.params, self.expected = make(), make()
        self.ours = AdamW8bit(self.params, lr=1e-2, **options)
        self.reference = AdamW8bit(self.expected, lr=1e-2, **options)

    def step(self, number: int, **options: Any) -> None:
        for params in (self.params, self.expected):
            if params[0].grad is None or number >= 0:
                set_grads(params, number)
        self.step_only(**options)

    def step_only(self, **options: Any) -> None:
        self.ours.step(**options)
        with self.patch.context() as patch:
            patch.setenv("ENGINE_REFERENCE", "1")
            self.reference.step(**options)

    def check(self, ulps: float = 4.0) -> None:
        for one, other in zip(self.params, self.expected, strict=True):
            # A step has a length of about lr, and its error is relative to that and to the result.
            eps = torch.finfo(one.dtype).eps
            torch.testing.assert_close(one, other, rtol=ulps * eps, atol=ulps * eps * 1e-2)
        ours, theirs = self.ours.state_tensors(), self.reference.state_tensors()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if tensor.is_floating_point():
                # Old and new terms of a moment may cancel.
                atol = 1e-6 * theirs[name].abs().max().item()
                torch.testing.assert_close(tensor, theirs[name], rtol=2e-6, atol=atol)
            elif tensor.dtype == torch.uint8:
                apart = (tensor.int() - theirs[name].int()).abs()
                assert apart.max() <= 1, name
                assert (apart != 0).double().mean() < 1e-3, name
            else:
                assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("rounding", ["nearest", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_equal_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rounding: Rounding, dtype: torch.dtype
) -> None:
    pair = Pair(
        device,
        monkeypatch,
        lambda: make_params(device, dtype),
        rounding=rounding,
    )
    for number in range(3):
        pair.step(number)
    pair.check(ulps=4.0 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("low_precision", ["master", "stochastic"])
def test_bf16_parameters_follow_as_in_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, low_precision: Any
) -> None:
    def make() -> list[Tensor]:
        return make_params(device, torch.bfloat16)

    pair = Pair(device, monkeypatch, make, low_precision=low_precision, seed=12345678901)
    start = [param.detach().clone() for param in pair.params]
    for number in range(2):
        pair.step(number)
    pair.check(ulps=1.0)
    same = [(one == other) for one, other in zip(pair.params, pair.expected, strict=True)]
    assert torch.cat([part.flatten() for part in same]).double().mean() > 0.999
    assert all((one != old).any() for one, old in zip(pair.params, start, strict=True))


def test_parameters_of_several_dtypes_and_groups_share_one_optimiser(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> list[Any]:
        wide, narrow = make_params(device), make_params(device, torch.bfloat16)
        return [
            {"params": [wide[0], narrow[0], wide[2]], "weight_decay": 0.3},
            {"params": [narrow[4], wide[1]], "lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6},
        ]

    ours, theirs = make(), make()
    optimizers = [AdamW8bit(groups, lr=1e-2) for groups in (ours, theirs)]
    params, expected = (
        [p for group in groups for p in group["params"]] for groups in (ours, theirs)
    )
    for number in range(2):
        set_grads(params, number)
        set_grads(expected, number)
        optimizers[0].step()
        with monkeypatch.context() as patch:
            patch.setenv("ENGINE_REFERENCE", "1")
            optimizers[1].step()
    for one, other in zip(params, expected, strict=True):
        eps = torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=8 * eps, atol=0.1 * eps)


def test_addresses_that_are_not_aligned_are_read_right(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> list[Tensor]:
        buffer = torch.linspace(-1, 1, 5001).to(device)
        return [nn.Parameter(buffer[1:4998]), nn.Parameter(buffer.clone()[1:301])]

    pair = Pair(device, monkeypatch, make)
    for number in range(2):
        pair.step(number)
    pair.check()


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("grad_scale", [1.0, 0.125])
def test_the_norm_is_measured_and_clipped_to(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, max_norm: float, grad_scale: float
) -> None:
    pair = Pair(device, monkeypatch)
    pair.step(0, max_norm=max_norm, grad_scale=torch.tensor(grad_scale, device=device))
    squares = [p.grad.double().square().sum().item() for p in pair.params if p.grad is not None]
    assert pair.ours.grad_norm is not None
    expected = math.sqrt(sum(squares)) * grad_scale
    assert pair.ours.grad_norm.item() == pytest.approx(expected, rel=1e-6)
    pair.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("where", [0, 1, 4])
def test_a_step_with_a_bad_gradient_changes_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, bad: float, where: int
) -> None:
    pair = Pair(device, monkeypatch)
    pair.step(0)
    before = [param.detach().clone() for param in pair.params]
    state = {name: tensor.clone() for name, tensor in pair.ours.state_tensors().items()}
    for params in (pair.params, pair.expected):
        set_grads(params, 1)
        grad = params[where].grad
        assert grad is not None
        grad.view(-1)[-1] = bad
    pair.step_only(max_norm=1.0 if not math.isfinite(bad) else math.inf)
    assert all(torch.equal(one, old) for one, old in zip(pair.params, before, strict=True))
    after = pair.ours.state_tensors()
    assert pair.ours.skipped_steps == 1
    assert all(torch.equal(after[name], state[name]) for name in state if name != "skipped_steps")
    pair.step(2)
    pair.check()


def test_a_damaged_moment_stops_the_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("exp_avg.absmax", "exp_avg_sq.float32"):
        pair = Pair(device, monkeypatch)
        pair.ours.state_tensors()[name].view(-1)[1] = float("inf")
        before = [param.detach().clone() for param in pair.params]
        set_grads(pair.params, 0)
        pair.ours.step()
        assert pair.ours.skipped_steps == 1
        assert all(torch.equal(one, old) for one, old in zip(pair.params, before, strict=True))


def test_a_parameter_without_gradient_stays_and_counts_its_own_steps(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(device, monkeypatch)
    for params in (pair.params, pair.expected):
        set_grads(params, 0)
        params[0].grad = params[2].grad = None
    pair.step_only()
    assert pair.ours.state_tensors()["steps"].tolist() == [0, 1, 0, 1, 1, 1]
    pair.step(1)
    pair.check()


def test_a_gradient_that_moved_in_memory_is_read_there(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(device, monkeypatch)
    old_gradients = []
    for number in range(2):
        pair.step(number)
        old_gradients.append([param.grad for param in pair.params])
    pair.check()


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a value from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host read a value from the device")
        return func(*args, **(kwargs or {}))


def test_a_step_never_reads_from_the_device(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(device, monkeypatch)
    set_grads(pair.params, 0)
    with NoWaiting():
        pair.ours.step(max_norm=1.0)
    with pytest.raises(AssertionError, match="read a value"), NoWaiting():
        _ = pair.ours.skipped_steps


@pytest.mark.parametrize("fault", ["dynamic_map", "magnitude_tables"])
def test_a_wrong_table_is_noticed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    true = getattr(adamw8bit_launch, fault)

    def wrong(signed: bool, where: torch.device) -> Any:
        tables = true(signed, where)
        return tables.flip(0) if isinstance(tables, Tensor) else (tables[0].roll(40), tables[1])

    monkeypatch.setattr(adamw8bit_launch, fault, wrong)
    pair = Pair(device, monkeypatch, rounding="nearest")
    for number in range(2):
        pair.step(number)
    with pytest.raises(AssertionError):
        pair.check()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total += value * value", "total += value"),
        ("tl.abs(scale)\n", "scale * 2.0\n"),
        ("max_norm / tl.maximum(norm, max_norm)", "max_norm / (norm + max_norm)"),
        ("base = base * base\n", "base = base * base * base\n"),
        ("-lr / (1.0 - _power(beta1, counted))", "-lr"),
        ("g * g * tl.load(factor + 7)", "g * g * tl.load(factor + 6)"),
        ("* decay + move\n        tl.store(master", "+ move\n        tl.store(master"),
        ("0x7FFF + (", "0x7FFFF + ("),
        ("(size == threshold)", "(size == 0.0)"),
        ("code = tl.load(cells + cell).to(tl.int32)", "code = tl.load(cells + cell // 2 * 2) + 0"),
        ("tl.store(v_absmax + scale_at, v_scale", "tl.store(v_absmax + scale_at, m_scale"),
        ("at = moment_row * 256", "at = row * 256"),
    ],
)
def test_a_planted_fault_in_the_kernels_is_noticed(
    old: str,
    new: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    changed = mutant(adamw8bit_flat, old, new)

    def make() -> list[Tensor]:
        return make_params(device, torch.bfloat16)

    def noticed() -> bool:
        # A factor off by an ulp may change the code of a moment whose terms cancel: the norm, and
        # the clipping to it, are looked at after a single step.
        for steps, options in ((2, {}), (1, {"max_norm": 0.5})):
            pair = Pair(device, monkeypatch, make, low_precision="master", rounding="nearest")
            for number in range(steps):
                pair.step(number, **options)
            try:
                pair.check()
            except AssertionError:
                return True
        return False

    assert not noticed()
    for name in ("grad_norm_kernel", "prepare_kernel", "adamw_kernel"):
        monkeypatch.setattr(adamw8bit_launch, name, getattr(changed, name))
    assert noticed()


@pytest.mark.parametrize("signed", [True, False])
def test_two_lookups_find_the_nearest_code_of_every_magnitude(signed: bool) -> None:
    cells, thresholds = magnitude_tables(signed)
    edges = (torch.arange(FIRST_CELL, 0x3F81, dtype=torch.int32) << 16).view(torch.float32)
    near = torch.cat([thresholds[:-1], edges])
    bits = near.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    values = torch.cat([bits.view(torch.float32).flatten(), torch.zeros(1), torch.rand(100_000)])
    values = values[values <= 1.0]
    number = (values.view(torch.int32) >> 16).clamp(min=FIRST_CELL) - FIRST_CELL
    code = cells[number.long()].long()
    code = code + (values > thresholds[code])
    expected = torch.bucketize(values, midpoints(signed)) - (127 if signed else 0)
    assert torch.equal(code, expected)
    inside = torch.bucketize(thresholds[:-1], edges)
    assert len(set(inside.tolist())) == len(inside)
