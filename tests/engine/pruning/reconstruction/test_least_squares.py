"""The closed form against numpy's least squares, and the greedy order against trying everything."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.pruning.reconstruction.least_squares import (
    InputMoments,
    Regression,
    removal_order,
    repaired,
)

TOKENS, WIDTH, OUT, SIZE = 300, 24, 10, 4
UNITS = [torch.arange(start, start + SIZE) for start in range(0, WIDTH, SIZE)]
Matrix = npt.NDArray[np.float64]


def inputs() -> torch.Tensor:
    """Correlated inputs (TOKENS, WIDTH) whose means are not zero."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return wide @ mixing + torch.linspace(-2, 2, WIDTH, dtype=torch.float64)


def regression(ridge: float = 0.0, centred: bool = False) -> Regression:
    moments = InputMoments.empty(WIDTH)
    for part in inputs().split(70):
        moments.add(part)
    generator = torch.Generator().manual_seed(4)
    return Regression(torch.randn(OUT, WIDTH, generator=generator), moments, ridge, centred)


def solved(given: Regression, stay: list[int]) -> tuple[Matrix, float]:
    """numpy's coefficients (inputs, outputs), and the share of the output that is not met.

    The ridge is rows of its own, which ask for the weights as they are, and zero for what goes.
    """
    z, weight = inputs().numpy(), given.weight.double().numpy()
    if given.centred:
        z = z - z.mean(0)
    ridge = given.ridge * float((z**2).mean())
    z = np.concatenate([z, np.sqrt(ridge * TOKENS) * np.eye(WIDTH)])
    wanted = z @ weight.T
    answer = np.linalg.lstsq(z[:, stay], wanted, rcond=None)[0]
    return answer, float(((wanted - z[:, stay] @ answer) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_the_update_is_numpys_least_squares(ridge: float, centred: bool) -> None:
    given = regression(ridge, centred)
    going = torch.cat([UNITS[1], UNITS[4]])
    stay = [column for column in range(WIDTH) if column not in going.tolist()]
    weight, shift = repaired(given, torch.tensor(stay), going)
    expected, _ = solved(given, stay)
    assert np.abs(weight.numpy() - expected.T).max() < 1e-8
    outputs = inputs() @ given.weight.double().T
    left = outputs - inputs()[:, stay] @ weight.T - shift
    if centred:  # what is left has no mean: that is what the bias is for
        assert float(left.mean(0).abs().max()) < 1e-10
    else:
        assert bool((shift == 0).all())


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_every_step_takes_what_costs_least_and_tells_what_it_costs(
    ridge: float, centred: bool
) -> None:
    given = regression(ridge, centred)
    order, errors = removal_order(given, UNITS)
    assert sorted(order) == list(range(len(UNITS)))
    left, before = set(range(len(UNITS))), 0.0
    for number, error in zip(order[:-1], errors[:-1], strict=True):

        def cost(unit: int, left: set[int] = left) -> float:
            stay = [int(c) for other in sorted(left - {unit}) for c in UNITS[other]]
            return solved(given, stay)[1]

        assert number == min(left, key=cost)
        after = cost(number)
        assert error == pytest.approx(after - before, rel=1e-8)
        left.remove(number)
        before = after
    assert sum(errors) == pytest.approx(1.0, rel=1e-8)


def test_units_of_another_size_and_columns_of_nobody_are_allowed() -> None:
    """Columns that no unit has are of what was pruned: they neither go nor help."""
    given = regression()
    units = [torch.arange(0, 8), torch.arange(8, 12), torch.arange(16, 24)]
    weight = given.weight.clone()
    weight[:, 12:16] = 0
    order, errors = removal_order(Regression(weight, given.moments, 0.0), units)
    stay = [c for number in order[1:] for c in units[number].tolist()]
    _, share = solved(Regression(weight, given.moments, 0.0), sorted(stay))
    assert errors[0] == pytest.approx(share, rel=1e-8)


def test_fewer_tokens_than_columns_are_met_exactly() -> None:
    """With 9 tokens any 12 of the columns give the outputs; without a ridge nothing is lost."""
    moments, tokens = InputMoments.empty(WIDTH), inputs()[:9]
    moments.add(tokens)
    given = Regression(regression().weight, moments, 0.0)
    going, stay = torch.cat(UNITS[:3]), torch.cat(UNITS[3:])
    weight, _ = repaired(given, stay, going)
    wanted = tokens @ given.weight.double().T
    assert float((tokens[:, stay] @ weight.T - wanted).abs().max()) < 1e-4
    order, _ = removal_order(given, UNITS)
    assert sorted(order) == list(range(len(UNITS)))


def test_a_strong_ridge_leaves_the_weights_as_they_are() -> None:
    given = regression(ridge=1e9)
    going, stay = UNITS[0], torch.cat(UNITS[1:])
    weight, _ = repaired(given, stay, going)
    assert torch.allclose(weight, given.weight.double()[:, stay], atol=1e-6)


def test_groups_that_take_turns_cost_less_than_the_first_of_each_in_the_free_order() -> None:
    """The greedy cut of as many of each group, against what a free order would take of each."""
    given, groups = regression(1e-3), [0, 0, 0, 1, 1, 1]
    free, _ = removal_order(given, UNITS)
    order, errors = removal_order(given, UNITS, groups)
    assert sum(errors) == pytest.approx(1.0, rel=1e-8)

    def cost(going: set[int]) -> float:
        stay = [int(c) for unit in range(len(UNITS)) if unit not in going for c in UNITS[unit]]
        return solved(given, stay)[1]

    for count in (1, 2):
        taken = order[: 2 * count]
        assert sorted(groups[unit] for unit in taken) == [0] * count + [1] * count
        assert sum(errors[: 2 * count]) == pytest.approx(cost(set(taken)), rel=1e-8)
        of_each = [[unit for unit in free if groups[unit] == group][:count] for group in (0, 1)]
        assert cost(set(taken)) <= cost({unit for part in of_each for unit in part}) + 1e-12
    assert order[0] == free[0]


def test_the_second_turn_knows_what_went_in_the_first() -> None:
    """Heads 0 and 2 are the same input: each could go alone, but not both."""
    z = inputs()
    z[:, UNITS[2]] = z[:, UNITS[0]]
    moments = InputMoments.empty(WIDTH)
    moments.add(z)
    weight = torch.ones(OUT, WIDTH)
    weight[:, 2 * SIZE :] *= 3
    given = Regression(weight, moments, 1e-9)
    order, errors = removal_order(given, UNITS[:4], [0, 0, 1, 1])
    assert order[0] in (0, 2)
    assert order[1] == {0: 3, 2: 1}[order[0]]
    assert errors[0] < 1e-6 < errors[1]
