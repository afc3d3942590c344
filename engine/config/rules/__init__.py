"""Settings that exclude each other, or do not fit model or machine.

One table for everybody: `TrainConfig` reads it when it is made, training when model and machine are
known, and the memory planner before it proposes a setting.
"""

from __future__ import annotations

from typing import Any

from engine.config.rules.distributed_rules import DISTRIBUTED_RULES
from engine.config.rules.evaluation_rules import EVALUATION_RULES
from engine.config.rules.preference_rules import PREFERENCE_RULES
from engine.config.rules.recipe_rules import RECIPE_RULES
from engine.config.rules.rule import Facts, Rule, RunSettings
from engine.config.rules.run_rules import RUN_RULES, TIED_EMBEDDING
from engine.config.rules.scratch_rules import SCRATCH_RULES
from engine.errors import ConfigError

__all__ = ["RULES", "TIED_EMBEDDING", "Facts", "Rule", "RunSettings", "allows", "broken", "check"]

RULES = (
    *RUN_RULES,
    *EVALUATION_RULES,
    *RECIPE_RULES,
    *SCRATCH_RULES,
    *PREFERENCE_RULES,
    *DISTRIBUTED_RULES,
)


def broken(config: RunSettings, facts: Facts | None = None) -> list[Rule]:
    """The rules that these settings break, given what is known of model and machine."""
    return [rule for rule in RULES if rule.when(config, facts or Facts())]


def check(config: RunSettings, facts: Facts) -> None:
    """Raises `ConfigError` with the first rule that the settings break."""
    for rule in broken(config, facts):
        raise ConfigError(f"{rule.text(config, facts)}.")


def allows(config: RunSettings, facts: Facts | None = None, **changes: Any) -> bool:
    """Whether the settings in `changes` may be had with the others of `config`."""
    rules = broken(config.model_copy(update=changes), facts)
    return not any(rule.setting in changes for rule in rules)
