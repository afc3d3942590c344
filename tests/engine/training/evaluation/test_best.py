"""Which evaluation is the best, and when a run stops waiting for a better one."""

from typing import Any

import pytest

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.training.evaluation.best import BestRule, BestSoFar, require_metric

EVALUATED: dict[str, Any] = {"model": "m", "data": "d", "heldout": 0.1, "eval_every": 5}


def watch(values: list[float], rule: BestRule) -> tuple[list[bool], BestSoFar]:
    best = BestSoFar(rule)
    return [best.take(step, {rule.metric: value}) for step, value in enumerate(values, 1)], best


def test_the_lowest_loss_is_the_best_and_what_is_no_number_never_is() -> None:
    rule = BestRule("eval_loss", greatest=False)
    seen, best = watch([2.0, float("nan"), 1.5, 1.5, float("-inf"), 1.75], rule)
    assert seen == [True, False, True, False, False, False]
    assert best.facts() == {"metric": "eval_loss", "value": 1.5, "step": 3}
    assert not best.exhausted


def test_the_greatest_accuracy_is_the_best() -> None:
    seen, best = watch([0.1, 0.3, 0.2], BestRule("eval_accuracy", greatest=True))
    assert seen == [True, True, False]
    assert best.facts() == {"metric": "eval_accuracy", "value": 0.3, "step": 2}


def test_small_gains_make_a_best_checkpoint_and_do_not_hold_off_the_end() -> None:
    """Gains of 0.04 against a least one of 0.1: two are none, three together are one."""
    rule = BestRule("eval_loss", greatest=False, patience=3, least=0.1)
    seen, best = watch([1.0, 0.96, 0.92], rule)
    assert seen == [True, True, True]
    assert best.state.waited == 2
    best.take(4, {"eval_loss": 0.88})
    assert (best.state.waited, best.state.reference) == (0, 0.88)
    for step, value in ((5, 0.87), (6, 0.9), (7, 0.86)):
        assert not best.exhausted
        best.take(step, {"eval_loss": value})
    assert best.exhausted
    assert best.facts() == {"metric": "eval_loss", "value": 0.86, "step": 7}


def test_the_watch_goes_on_from_what_a_checkpoint_holds() -> None:
    rule = BestRule("eval_loss", greatest=False, patience=2)
    _, first = watch([1.0, 1.1], rule)
    second = BestSoFar(rule, first.saved())
    assert second.saved() == first.saved()
    second.take(3, {"eval_loss": 1.2})
    assert second.exhausted
    assert not BestSoFar(BestRule("eval_loss", False, 5), second.saved()).exhausted
    other = BestSoFar(BestRule("eval_perplexity", False, 2), second.saved())
    assert other.facts() is None and other.state.waited == 0


@pytest.mark.parametrize(
    ("given", "metric", "greatest"),
    [
        ({}, None, False),
        ({"save_best": "loss"}, "eval_loss", False),
        ({"save_best": True}, "eval_loss", False),
        ({"metric_for_best_model": "eval_perplexity"}, "eval_perplexity", False),
        ({"save_best": "eval_loss/category/accuracy"}, "eval_loss/category/accuracy", False),
        ({"save_best": "accuracy"}, "eval_accuracy", True),
        ({"save_best": "rewards/margins"}, "eval_rewards/margins", True),
        ({"save_best": "odd", "greater_is_better": False}, "eval_odd", False),
        ({"early_stopping": 3}, "eval_loss", False),
        ({"load_best_model_at_end": True}, "eval_loss", False),
        ({"save_best": "none"}, None, False),
    ],
)
def test_the_settings_name_figure_and_direction(
    given: dict[str, Any], metric: str | None, greatest: bool
) -> None:
    from engine.config.sources import TRAIN, build, gather

    words = [f"{name}={value}" for name, value in given.items()]
    overrides = ["model=m", "data=d", "heldout=0.1", "eval_every=5", *words]
    config = build(TrainConfig, gather(TRAIN, None, preset=None, flags={}, overrides=overrides))
    assert config.best_metric == metric
    assert BestRule.of(config) is None or config.best_is_greatest == greatest


@pytest.mark.parametrize("given", ["3", 3, "3,0", "3, 0.0", [3, 0.0], (3, 0.0)])
def test_early_stopping_takes_every_spelling(given: Any) -> None:
    assert TrainConfig(**EVALUATED, early_stopping=given).early_stopping == (3, 0.0)


@pytest.mark.parametrize("given", ["0", "x", "3,-1", "3,x", "3,nan", "3,0.1,2", -1, 2.5])
def test_early_stopping_refuses_what_is_no_patience(given: Any) -> None:
    with pytest.raises(ConfigError, match="such as 3 or 3"):
        TrainConfig(**EVALUATED, early_stopping=given)


def test_a_figure_that_no_evaluation_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"eval_los names no .* eval_loss, eval_perplexity"):
        require_metric("eval_los", ("eval_perplexity", "eval_loss"))
    with pytest.raises(ConfigError, match="none of them is left"):
        require_metric("eval_loss", ())
