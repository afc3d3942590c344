"""Read a sweep from its file, every key checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.explain import Setting
from engine.config.sources import TRAIN, gather, output_in, read_mapping
from engine.config.training.evaluation import EVAL, metric_is_greatest
from engine.errors import ConfigError, listing
from engine.sweeps.parameters import Parameter, read_parameter

DEFAULT_METRIC = "heldout_loss"
METHODS = ("grid", "random")
MOST_TRIALS = 10_000
_KEYS = (
    "output_dir", "config", "preset", "with", "parameters", "method", "trials", "seed", "metric",
    "goal",
)  # fmt: skip
_OWN = ("output_dir", "run_id", "resume", "overwrite", "push_to_hub")
_GOALS = {"minimize": False, "min": False, "maximize": True, "max": True}


@dataclass(frozen=True)
class Sweep:
    """What a file says: `base` are the settings of every trial, `parameters` what is varied.

    `trials` is how many are drawn of a random sweep, and the most of a grid; None is all of a grid.
    """

    file: Path
    output_dir: Path
    base: Mapping[str, Setting]
    parameters: tuple[Parameter, ...]
    method: str
    trials: int | None
    seed: int
    metric: str
    greatest: bool


def read_sweep(file: Path, output_dir: Path | None = None, trials: int | None = None) -> Sweep:
    """The sweep in a YAML file; `output_dir` and `trials` stand in for its own.

    Raises `ConfigError` naming the key that cannot be used.
    """
    content = read_mapping(file)
    for key in content:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            meant = f"did you mean `{near[0]}`?" if near else f"a sweep has {listing(_KEYS)}."
            raise ConfigError(f"{file}: there is no key `{key}`; {meant}")
    method = str(content.get("method", "grid")).lower()
    if method not in METHODS:
        raise ConfigError(f"{file}: `method` is {method!r}; a sweep is grid or random.")
    parameters = _parameters(content.get("parameters"), file)
    if method == "grid" and (ranges := [p.name for p in parameters if not p.values]):
        raise ConfigError(
            f"{file}: a grid goes through values, and there is a range for {listing(ranges)}. List "
            "values, or write `method: random` with `trials:`."
        )
    wanted = trials if trials is not None else content.get("trials")
    if wanted is None and method == "random":
        raise ConfigError(f"{file}: a random sweep needs `trials`, the number of runs.")
    metric = _metric(str(content.get("metric", DEFAULT_METRIC)))
    return Sweep(
        file=file,
        output_dir=output_dir or output_in(file, content),
        base=_base(content, file),
        parameters=parameters,
        method=method,
        trials=None if wanted is None else _whole(wanted, "trials", file, 1, MOST_TRIALS),
        seed=_whole(content.get("seed", 0), "seed", file, 0, 1 << 63),
        metric=metric,
        greatest=_greatest(content.get("goal"), metric, file),
    )


def _metric(name: str) -> str:
    """A figure of summary.json; `eval_loss` of metrics.jsonl is `heldout_loss` there."""
    return f"heldout_{name.removeprefix(EVAL)}" if name.startswith(EVAL) else name


def _greatest(goal: Any, metric: str, file: Path) -> bool:
    if goal is None and metric == "best_value":
        raise ConfigError(
            f"{file}: which best_value is the best depends on the figure that --save-best names: "
            "write `goal: minimize` or `goal: maximize`."
        )
    if goal is None:
        return metric_is_greatest(metric.removeprefix("heldout_"))
    if str(goal).lower() not in _GOALS:
        raise ConfigError(f"{file}: `goal` is {goal!r}; write minimize or maximize.")
    return _GOALS[str(goal).lower()]


def _whole(value: Any, key: str, file: Path, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{file}: `{key}` is {value!r}; a whole number from {least} on is meant.")
    return value


def _parameters(given: Any, file: Path) -> tuple[Parameter, ...]:
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"{file}: `parameters` is to be a mapping of settings and their values, such as "
            "`learning_rate: [1e-4, 3e-4]`."
        )
    read = []
    for key, value in given.items():
        name = TRAIN.field_for(str(key), f"{file}: parameters")
        if name in _OWN:
            raise ConfigError(f"{file}: parameters: every trial has its own `{name}` already.")
        read.append(read_parameter(name, value, f"{file}: parameters: {key}"))
    names = [parameter.name for parameter in read]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{file}: parameters names {listing(twice)} twice; keep one of them.")
    return tuple(read)


def _base(content: Mapping[str, Any], file: Path) -> dict[str, Setting]:
    """The settings of every trial: of the preset, then `config`, then `with`."""
    config, preset = content.get("config"), content.get("preset")
    given = gather(
        TRAIN,
        None if config is None else Path(str(config)),
        preset=None if preset is None else str(preset),
    )
    own = content.get("with") or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"{file}: `with` is to be a mapping of settings of engine train.")
    for key, value in own.items():
        source = f"{file}: with: {key}"
        given[TRAIN.field_for(str(key), source)] = Setting(value, source)
    for name in _OWN:
        if name in given:
            if given[name].source.startswith(f"{file}: with"):
                raise ConfigError(f"{given[name].source}: every trial has its own `{name}`.")
            del given[name]
    return given
