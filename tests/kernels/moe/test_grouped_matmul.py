"""Grouped linear maps: values, gradients, every kind of weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.elementwise.dropout import Seed
from kernels.linear.adapters import Gradients
from kernels.linear.int8 import quantize_int8
from kernels.moe.gathered import Gathered
from kernels.moe.grouped_matmul import (
    ExpertProjection,
    ExpertWeights,
    Groups,
    adapter_inputs,
    expert_weight,
    grouped_matmul,
    grouped_outer,
    grouped_project,
    grouped_project_backward,
    planar_experts,
    weight_shape,
)
from kernels.nf4 import quantize

EXPERTS = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3, 3, 3, 3])
ROWS, COUNT, IN, OUT, RANK = 11, 5, 64, 6, 2


def groups() -> Groups:
    return Groups.from_sorted(EXPERTS, COUNT)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_groups_know_their_rows() -> None:
    made = groups()
    assert made.bounds == (0, 3, 3, 5, 11, 11)
    assert made.count == COUNT
    assert made.filled == [(0, slice(0, 3)), (2, slice(3, 5)), (3, slice(5, 11))]


def naive(x: Tensor, dense: Tensor) -> Tensor:
    return torch.stack([dense[e] @ row for e, row in zip(EXPERTS.tolist(), x, strict=True)])


def nf4_planar(w: Tensor) -> ExpertWeights:
    return planar_experts(quantize(w))


KINDS: dict[str, Callable[[Tensor], ExpertWeights]] = {
    "dense": lambda w: w,
    "dense list": lambda w: tuple(w.unbind()),
    "nf4": quantize,
    "nf4 single scales": lambda w: quantize(w, double_quant=False),
    "nf4 planar": nf4_planar,
    "nf4 list": lambda w: tuple(quantize(one) for one in w),
    "int8 list": lambda w: tuple(quantize_int8(one) for one in w),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_multiplies_forward_and_transposed(kind: str) -> None:
    weight = KINDS[kind](torch.randn(COUNT, OUT, IN))
    assert weight_shape(weight) == (COUNT, OUT, IN)
    dense = torch.stack([expert_weight(weight, e, torch.float32).clone() for e in range(COUNT)])
    x, dy = torch.randn(ROWS, IN), torch.randn(ROWS, OUT)
    torch.testing.assert_close(grouped_matmul(x, weight, groups()), naive(x, dense))
    back = grouped_matmul(dy, weight, groups(), transpose=True)
    torch.testing.assert_close(back, naive(dy, dense.mT))


def test_an_expert_of_a_fused_nf4_weight_decodes_as_its_slice() -> None:
    w = torch.randn(3, 10, 64)
    weight = quantize(w, double_quant=False)
    for e in range(3):
        alone = expert_weight((quantize(w[e], double_quant=False),), 0, torch.float32).clone()
        assert torch.equal(expert_weight(weight, e, torch.float32), alone)
        assert torch.equal(expert_weight(planar_experts(weight), e, torch.float32), alone)


def test_gathered_rows_scale_and_accumulation_into_columns() -> None:
    x, w = randn(4, IN), randn(COUNT, OUT, IN)
    rows = torch.randint(0, 4, (ROWS,))
    wide = randn(ROWS, 3 * OUT)
    before, target = wide.clone(), wide[:, OUT : 2 * OUT]
    grouped_matmul(Gathered(x, rows), w, groups(), out=target, accumulate=True, scale=0.5)
    want = before[:, OUT : 2 * OUT] + 0.5 * naive(x[rows], w)
    torch.testing.assert_close(target, want)
    assert torch.equal(wide[:, :OUT], before[:, :OUT])
    assert torch.equal(wide[:, 2 * OUT :], before[:, 2 * OUT :])


def test_outer_sums_the_rows_of_each_expert() -> None:
    a, b = randn(7, 3), randn(ROWS, 4)
    rows = torch.randint(0, 7, (ROWS,))
    want = torch.zeros(COUNT, 3, 4, dtype=torch.float64)
    for m, e in enumerate(EXPERTS.tolist()):
        want[e] += 2.0 * torch.outer(a[rows[m]], b[m])
    sums = grouped_outer(Gathered(a, rows), b, groups(), scale=2.0)
    torch.testing.assert_close(sums, want)
    assert not sums[1].any()


def projections(parts: int, dropout: float = 0.0) -> tuple[ExpertProjection, ...]:
    """`parts` maps with dense trainable weights, the last one without an adapter."""

    def one(adapter: bool) -> ExpertProjection:
        return ExpertProjection(
            randn(COUNT, OUT, IN).requires_grad_(),
            randn(COUNT, RANK, IN).requires_grad_() if adapter else None,
            randn(COUNT, OUT, RANK).requires_grad_() if adapter else None,
            0.7,
            dropout,
        )

    return tuple(one(part == 0 or part < parts - 1) for part in range(parts))


def textbook(x: Tensor, maps: tuple[ExpertProjection, ...]) -> Tensor:
    parts = []
    for p in maps:
        assert isinstance(p.weight, Tensor)
        y = naive(x, p.weight)
        if p.lora_a is not None and p.lora_b is not None:
            y = y + p.scale * naive(naive(x, p.lora_a), p.lora_b)
        parts.append(y)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_projection_equals_the_naive_loop_in_values_and_gradients(parts: int, keep: bool) -> None:
    maps = projections(parts)
    x, dy = randn(4, IN).requires_grad_(), randn(ROWS, parts * OUT)
    rows = torch.randint(0, 4, (ROWS,))
    want = textbook(x[rows], maps)
    leaves = [t for p in maps for t in p.trainable()]
    wanted = torch.autograd.grad(want, [x, *leaves], dy)
    grads: Gradients = {}
    with torch.no_grad():
        y, lows = grouped_project(Gathered(x, rows), maps, groups())
        dx = grouped_project_backward(
            dy, Gathered(x, rows), maps, groups(), grads, lows=lows if keep else None
        )
    torch.testing.assert_close(y, want)
    assert dx is not None
    torch.testing.assert_close(torch.zeros_like(x).index_add_(0, rows, dx), wanted[0])
    for leaf, exact in zip(leaves, wanted[1:], strict=True):
        torch.testing.assert_close(grads[id(leaf)], exact)


def test_gathered_output_gradients_equal_gathering_first() -> None:
    maps, dy = projections(1), randn(4, OUT)
    x, rows = randn(ROWS, IN), torch.randint(0, 4, (ROWS,))
    gathered: Gradients = {}
    direct: Gradients = {}
    with torch.no_grad():
        one = grouped_project_backward(Gathered(dy, rows), x, maps, groups(), gathered)
        two = grouped_project_backward(dy[rows], x, maps, groups(), direct)
    assert one is not None
    assert two is not None
    torch.testing.assert_close(one, two)
    for key, grad in direct.items():
        torch.testing.assert_close(gathered[key], grad)


def test_without_dx_the_parameter_gradients_are_the_same() -> None:
    maps, dy, x = projections(2), randn(ROWS, 2 * OUT), randn(ROWS, IN)
    full: Gradients = {}
    part: Gradients = {}
    with torch.no_grad():
        grouped_project_backward(dy, x, maps, groups(), full)
        assert grouped_project_backward(dy, x, maps, groups(), part, need_dx=False) is None
    assert full.keys() == part.keys()
    assert all(torch.equal(full[key], part[key]) for key in full)


def test_dropout_is_drawn_alike_in_both_directions() -> None:
    maps = projections(2, dropout=0.4)
    rows, seed = torch.randint(0, 4, (ROWS,)), Seed(5)
    x = randn(4, IN)
    with torch.no_grad():
        y, lows = grouped_project(Gathered(x, rows), maps, groups(), seed=seed)
        again = adapter_inputs(Gathered(x, rows), maps, groups(), seed=seed)
        plain, _ = grouped_project(Gathered(x, rows), maps, groups())
        for one, two in zip(lows, again, strict=True):
            assert one is two or (one is not None and two is not None and torch.equal(one, two))
        assert not torch.allclose(y, plain)
        # Linear in x for a fixed mask, so <dy, y(x)> = <dx, x> shows that dx used the same mask.
        dy = randn(ROWS, 2 * OUT)
        dx = grouped_project_backward(dy, Gathered(x, rows), maps, groups(), {}, seed=seed)
    assert dx is not None
    torch.testing.assert_close((dy * y).sum(), (dx * x[rows]).sum())


def test_listed_weights_get_one_gradient_for_every_expert_with_rows() -> None:
    dense = randn(COUNT, OUT, IN)
    listed = tuple(w.clone().requires_grad_() for w in dense)
    x, dy = randn(ROWS, IN), randn(ROWS, OUT)
    grads: Gradients = {}
    grouped_project_backward(dy, x, (ExpertProjection(listed),), groups(), grads)
    want = grouped_outer(dy, x, groups())
    for expert, weight in enumerate(listed):
        if expert in (1, 4):
            assert id(weight) not in grads
        else:
            torch.testing.assert_close(grads[id(weight)], want[expert])


def test_half_precision_inputs_take_fp32_adapters() -> None:
    adapter = torch.randn(COUNT, RANK, IN), torch.randn(COUNT, OUT, RANK)
    maps = ExpertProjection(quantize(torch.randn(COUNT, OUT, IN)), *adapter)
    x = torch.randn(ROWS, IN).bfloat16()
    y, _ = grouped_project(x, (maps,), groups())
    assert y.dtype == torch.bfloat16
    exact, _ = grouped_project(x.float(), (maps,), groups())
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.5)


def test_planar_experts_need_whole_blocks() -> None:
    with pytest.raises(ValueError, match="planar"):
        planar_experts(quantize(torch.randn(2, 3, 32)))
