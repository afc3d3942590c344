"""The best evaluation so far, and when to stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from engine.config.train_config import TrainConfig
from engine.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass
class BestState:
    """What a checkpoint holds of the evaluations before it, as JSON values.

    `value` at `step` is the best of `metric`. `reference` is the value that the next one has to
    beat by the least improvement that counts; `waited` counts the evaluations since then.
    """

    metric: str
    step: int | None = None
    value: float | None = None
    reference: float | None = None
    waited: int = 0


@dataclass(frozen=True)
class BestRule:
    """Which figure is watched, which of two values is better, and when to stop.

    Without a `patience` nothing stops. As in Keras and PyTorch Lightning an evaluation counts as an
    improvement where it beats the last one that counted by more than `least`; the best checkpoint
    is the one with the best value, however little it is better.
    """

    metric: str
    greatest: bool
    patience: int | None = None
    least: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> BestRule | None:
        """What the settings ask for; None where nothing depends on evaluations."""
        if config.best_metric is None:
            return None
        patience, least = config.early_stopping or (None, 0.0)
        return cls(config.best_metric, config.best_is_greatest, patience, least)

    def beats(self, value: float, other: float | None, least: float = 0.0) -> bool:
        """Whether `value` is better than `other` by more than `least`."""
        if not math.isfinite(value):
            return False
        gain = math.inf if other is None else value - other if self.greatest else other - value
        return gain > least


class BestSoFar:
    """The best evaluation so far; `state` survives in the run's checkpoints.

    What a checkpoint holds of another metric is left: the watch begins anew then.
    """

    def __init__(self, rule: BestRule, saved: Mapping[str, Any] | None = None) -> None:
        self.rule = rule
        begun = saved is not None and saved.get("metric") == rule.metric
        self.state = BestState(**saved) if begun and saved is not None else BestState(rule.metric)

    def take(self, step: int, figures: Mapping[str, float]) -> bool:
        """Take in the evaluation after `step`; whether it is the best one so far.

        Raises `ConfigError` where it has no such figure.
        """
        rule, state = self.rule, self.state
        require_metric(rule.metric, figures)
        value = figures[rule.metric]
        best = rule.beats(value, state.value)
        if best:
            state.step, state.value = step, value
        if rule.beats(value, state.reference, rule.least):
            state.reference, state.waited = value, 0
        else:
            state.waited += 1
        return best

    @property
    def exhausted(self) -> bool:
        """Whether the evaluations that early stopping waits for have gone by."""
        return self.rule.patience is not None and self.state.waited >= self.rule.patience

    def saved(self) -> dict[str, Any]:
        """The state as JSON values."""
        return asdict(self.state)

    def facts(self) -> dict[str, Any] | None:
        """Metric, value and step of the best evaluation, for a manifest; None without one."""
        state = self.state
        if state.step is None:
            return None
        return {"metric": state.metric, "value": state.value, "step": state.step}


def require_metric(metric: str | None, names: Iterable[str]) -> None:
    """Raise `ConfigError` where no evaluation has the figure `metric`."""
    known = sorted(names)
    if metric is not None and not known:
        raise ConfigError(
            f"--save-best {metric} is a figure of held-out rows, and none of them is left to "
            "evaluate: look at them with `engine data validate`."
        )
    if metric is not None and metric not in known:
        shown = ", ".join(known[:20]) + (" ..." if len(known) > 20 else "")
        raise ConfigError(
            f"--save-best {metric} names no figure of this run's evaluations, which have: {shown}. "
            "Name one of them."
        )
