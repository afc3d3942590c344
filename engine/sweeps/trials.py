"""Trials of a sweep: runs with values decided by their numbers alone."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.explain import Setting
from engine.config.sources import build
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.sweeps.recipe import MOST_TRIALS, Sweep

log = logging.getLogger(__name__)

_DRAWS = 200
"""Draws for a trial that differs from all before it."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, from 1 on: the `values` of what is varied, and all its settings."""

    number: int
    values: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name, and that of its folder."""
        return trial_name(self.number)

    @property
    def folder(self) -> Path:
        """The directory of its run."""
        return Path(str(self.settings["output_dir"]))


def trial_name(number: int) -> str:
    """The name of a trial by its number."""
    return f"trial-{number:03d}"


def trials_of(sweep: Sweep) -> list[Trial]:
    """All trials, their settings checked. Raises `ConfigError` naming the first that cannot be."""
    chosen = _grid(sweep) if sweep.method == "grid" else _drawn(sweep)
    trials = [_trial(sweep, number, values) for number, values in enumerate(chosen, start=1)]
    if sweep.metric.startswith("heldout_"):
        first = TrainConfig(**trials[0].settings)
        if not first.eval_data and not first.heldout:
            raise ConfigError(
                f"{sweep.file}: trials are ranked by {sweep.metric}, a figure of held-out rows, "
                "and there are none. Give `eval_data` or `heldout` under `with`, or another "
                "`metric`."
            )
    return trials


def _grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every combination, the last parameter changing fastest."""
    names = [parameter.name for parameter in sweep.parameters]
    every = itertools.product(*(parameter.values for parameter in sweep.parameters))
    limit = sweep.trials or MOST_TRIALS
    for count, values in enumerate(every):
        if count == limit:
            if sweep.trials is None:
                raise ConfigError(
                    f"{sweep.file}: the grid has more than {MOST_TRIALS:,} trials; list fewer "
                    "values, or write `method: random` with `trials:`."
                )
            return
        yield dict(zip(names, values, strict=True))


def _drawn(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Random values; a trial's do not depend on how many there are."""
    seen: set[str] = set()
    for number in range(1, (sweep.trials or 1) + 1):
        for draw in range(_DRAWS):
            key = f"{sweep.seed}:{number}:{draw}"
            values = {parameter.name: parameter.draw(key) for parameter in sweep.parameters}
            if repr(values) not in seen:
                seen.add(repr(values))
                yield values
                break
        else:
            log.info("%d trials have all the values there are; no more are drawn", number - 1)
            return


def _trial(sweep: Sweep, number: int, values: Mapping[str, Any]) -> Trial:
    name = trial_name(number)
    given = dict(sweep.base) | {
        key: Setting(value, f"{sweep.file}: parameters: {key}") for key, value in values.items()
    }
    own = {"output_dir": str(sweep.output_dir / name), "run_id": f"{sweep.output_dir.name}-{name}"}
    given |= {key: Setting(value, name) for key, value in own.items()}
    try:
        build(TrainConfig, given)
    except ConfigError as error:
        told = ", ".join(f"{key}={value}" for key, value in values.items())
        raise ConfigError(f"{sweep.file}: {name} ({told}): {error}") from error
    return Trial(number, values, {key: setting.value for key, setting in given.items()})
