"""Intervals and verdicts: known distributions, chance against chance, and words."""

import math
from typing import Any

import numpy as np
import pytest

from engine.forging.verdict import Rows, difference, judged, perplexity_interval


def rows(mean: float, seed: int = 0, number: int = 200, noise: float = 0.5) -> Rows:
    """Rows of 10 tokens whose loss a token is `mean`, give or take."""
    generator = np.random.default_rng(seed)
    return [[10 * (mean + noise * float(x)), 10.0] for x in generator.standard_normal(number)]


def test_an_interval_is_that_of_the_mean() -> None:
    """200 draws of spread 0.5: the mean is known to 1.96 * 0.5 / sqrt(200) = 0.069."""
    low, high = perplexity_interval(rows(2.0))
    assert math.log(low) == pytest.approx(2.0 - 0.069, abs=0.05)
    assert math.log(high) - math.log(low) == pytest.approx(2 * 0.069, rel=0.15)
    assert perplexity_interval(rows(2.0)) == (low, high)


def test_a_row_counts_by_its_tokens() -> None:
    both = [[30.0, 10.0], [1.0, 1.0]]
    gap = difference(both, [[[20.0, 10.0], [1.0, 1.0]]])
    assert gap.mean == pytest.approx(10 / 11)


def test_what_is_hard_about_a_row_for_both_makes_no_noise() -> None:
    hard = rows(2.0, noise=3.0)
    worse = [[loss + 0.5, tokens] for loss, tokens in hard]
    gap = difference(worse, [hard])
    assert (gap.low, gap.high) == pytest.approx((0.05, 0.05))


@pytest.mark.parametrize(
    ("shift", "seeds", "verdict"),
    [
        (0.0, [0.0], "kept"),
        (-0.3, [0.0], "kept"),
        (0.015, [0.0], "kept"),
        (0.05, [0.0], "lost"),
        (0.05, [0.06, -0.06], "within noise"),
        (0.20, [0.06, -0.06], "lost"),
    ],
)
def test_verdicts(shift: float, seeds: list[float], verdict: str) -> None:
    base = rows(2.0)

    def moved(by: float) -> Rows:
        return [[loss + 10 * by, tokens] for loss, tokens in base]

    assert difference(moved(shift), [moved(seed) for seed in seeds]).verdict == verdict


def test_few_rows_say_nothing() -> None:
    assert difference(rows(2.05, 1, 8), [rows(2.0, 2, 8)]).verdict == "within noise"


def test_models_are_compared_on_the_same_rows() -> None:
    with pytest.raises(ValueError, match="the same rows"):
        difference(rows(2.0, number=5), [rows(2.0, number=6)])


def results(**changes: Any) -> dict[str, Any]:
    entry = {"trained": {"row_losses": rows(2.05)}}
    base = {"row_losses": rows(2.0)}
    return {"baseline": base, "cycles": [entry], "baseline_cycles": [], **changes}


def test_the_text_says_against_whom() -> None:
    alone = judged(results())
    assert alone is not None
    assert (alone["against"], alone["verdict"]) == ("untrained", "lost")
    assert "+5.1 %" in alone["text"] and "--baseline tells" in alone["text"]
    chain = [{"trained": {"row_losses": rows(2.05)}}]
    one = judged(results(baseline_cycles=chain))
    assert one is not None
    assert (one["against"], one["verdict"]) == ("baseline", "kept")
    assert "--baseline-seeds" in one["text"]
    other = [{"trained": {"row_losses": rows(2.0)}}]
    two = judged(results(baseline_cycles=chain, baseline_seeds=[other]))
    assert two is not None
    assert two["seeds"] == 2 and "2 seeds, which are 5.1 % apart" in two["text"]


def test_a_job_without_cycles_or_of_an_earlier_version_has_no_verdict() -> None:
    assert judged(results(cycles=[])) is None
    assert judged(results(cycles=[{"trained": {"perplexity": 7.0}}])) is None
