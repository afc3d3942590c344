"""The losses against their papers' formulas, written plainly in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.training.objectives.answer_losses import (
    AnswerScores,
    LossSettings,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
)
from engine.training.objectives.pairs import PAIR_LOSSES

CHOSEN, REJECTED = (-12.5, -3.0, -0.7), (-11.0, -8.0, -40.0)
BY_CHOSEN, BY_REJECTED = (-13.0, -2.0, -1.5), (-10.0, -9.5, -30.0)
TOKENS = (5, 2, 3), (4, 3, 11)
HOW = LossSettings(beta=0.3, smoothing=0.1, margin=0.6)


def sides() -> tuple[AnswerScores, AnswerScores]:
    wide = [torch.tensor(x, dtype=torch.float64) for x in (CHOSEN, REJECTED)]
    reference = [torch.tensor(x, dtype=torch.float64) for x in (BY_CHOSEN, BY_REJECTED)]
    tokens = [torch.tensor(x, dtype=torch.float64) for x in TOKENS]
    return AnswerScores(wide[0], reference[0], tokens[0]), AnswerScores(
        wide[1], reference[1], tokens[1]
    )


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def smoothed(x: float, e: float = 0.1) -> float:
    return -(1 - e) * math.log(sigmoid(x)) - e * math.log(sigmoid(-x))


def by_pair(index: int) -> dict[str, float]:
    """What each loss is for one pair."""
    c, r, n, m = CHOSEN[index], REJECTED[index], TOKENS[0][index], TOKENS[1][index]
    d, e = c - BY_CHOSEN[index], r - BY_REJECTED[index]
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (c / n, r / m)]
    return {
        "dpo": smoothed(0.3 * (d - e)),
        "dpo normalised": smoothed(0.3 * (d / n - e / m)),
        "ipo": (d / n - e / m - 1 / 0.6) ** 2,
        "ipo whole": (d - e - 1 / 0.6) ** 2,
        "simpo": smoothed(0.3 * (c / n - r / m) - 0.6),
        "cpo": smoothed(0.3 * (c - r)),
        "cpo normalised": smoothed(0.3 * (c / n - r / m)),
        "orpo": -0.3 * math.log(sigmoid(math.log(odds[0] / odds[1]))),
    }


def test_every_pair_loss_is_its_formula() -> None:
    chosen, rejected = sides()
    normal = LossSettings(0.3, 0.1, 0.6, normalised=True)
    got = {
        "dpo": dpo_loss(chosen, rejected, HOW),
        "dpo normalised": dpo_loss(chosen, rejected, normal),
        "ipo": ipo_loss(chosen, rejected, normal),
        "ipo whole": ipo_loss(chosen, rejected, HOW),
        "simpo": simpo_loss(chosen, rejected, HOW),
        "cpo": cpo_loss(chosen, rejected, HOW),
        "cpo normalised": cpo_loss(chosen, rejected, normal),
        "orpo": orpo_loss(chosen, rejected, HOW),
    }
    for index in range(3):
        for name, want in by_pair(index).items():
            assert float(got[name][index]) == pytest.approx(want, rel=1e-12), (name, index)


def test_kto_is_its_formula() -> None:
    chosen, rejected = sides()
    good, baseline = torch.tensor([True, False, True]), torch.tensor(0.4, dtype=torch.float64)
    got = kto_loss(chosen, good, baseline, HOW)
    for index, is_good in enumerate(good.tolist()):
        gain = CHOSEN[index] - BY_CHOSEN[index] - 0.4
        want = 1 - sigmoid(0.3 * (gain if is_good else -gain))
        assert float(got[index]) == pytest.approx(want, rel=1e-12)
    assert rejected.policy.shape == got.shape


@pytest.mark.parametrize("objective", PAIR_LOSSES)
def test_gradients_pass_gradcheck(objective: str) -> None:
    chosen, rejected = sides()

    def loss(c: Tensor, r: Tensor) -> Tensor:
        sides = (
            AnswerScores(c, chosen.reference, chosen.tokens),
            AnswerScores(r, rejected.reference, rejected.tokens),
        )
        return PAIR_LOSSES[objective](*sides, HOW)

    inputs = chosen.policy.requires_grad_(True), rejected.policy.requires_grad_(True)
    assert torch.autograd.gradcheck(loss, inputs)


def test_odds_are_exact_for_answers_that_are_nearly_sure() -> None:
    sure = torch.tensor([-1e-7, -1e-3, -30.0, 0.0], requires_grad=True)
    unsure = torch.full((4,), -1.0)
    ones = torch.ones(4)
    loss = orpo_loss(
        AnswerScores(sure, ones, ones), AnswerScores(unsure, ones, ones), LossSettings(1.0)
    )
    wide = sure.detach().double()[:3]
    odds = wide - torch.log(-torch.expm1(wide))
    bad = -1.0 - math.log(1 - math.exp(-1.0))
    torch.testing.assert_close(
        loss[:3].double(), torch.nn.functional.softplus(-(odds - bad)), rtol=1e-5, atol=0
    )
    loss.sum().backward()
    assert sure.grad is not None
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(sure.grad).all())
