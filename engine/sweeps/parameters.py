"""What is varied of a setting: values, or a range."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError

_RANGE = ("min", "max", "scale", "step")
_SCALES = ("linear", "log")
_DISTRIBUTIONS = {
    "uniform": "linear",
    "int_uniform": "linear",
    "q_uniform": "linear",
    "log_uniform": "log",
    "log_uniform_values": "log",
    "linear": "linear",
    "log": "log",
}


@dataclass(frozen=True)
class Parameter:
    """A setting with its `values`, or a range from `least` to `most` where there are none.

    A range between whole numbers gives whole numbers; `step` is the distance between those of a
    linear range that are drawn.
    """

    name: str
    values: tuple[Any, ...] = ()
    least: float = 0.0
    most: float = 0.0
    log: bool = False
    step: float | None = None

    def draw(self, key: str) -> Any:
        """A value, the same for every equal `key`."""
        source = random.Random(f"{key}:{self.name}")
        if self.values:
            return self.values[source.randrange(len(self.values))]
        part = source.random()
        if self.log:
            low, high = math.log(self.least), math.log(self.most)
            value = math.exp(low + part * (high - low))
        elif self.step is not None:
            count = int((self.most - self.least) / self.step + 1e-9) + 1
            value = self.least + self.step * min(int(part * count), count - 1)
        elif self._is_whole:
            value = self.least + int(part * (self.most - self.least + 1))
        else:
            value = self.least + part * (self.most - self.least)
        value = min(max(value, self.least), self.most)
        return round(value) if self._is_whole else float(f"{value:.6g}")

    @property
    def _is_whole(self) -> bool:
        bounds = (self.least, self.most, self.step or 1)
        return all(isinstance(bound, int) for bound in bounds)

    @property
    def is_range(self) -> bool:
        """Whether values are drawn from a range."""
        return not self.values


def read_parameter(name: str, given: Any, where: str) -> Parameter:
    """A list of values, `{values: [...]}`, or `{min: a, max: b, scale: log}`.

    Raises `ConfigError` naming what was expected.
    """
    if isinstance(given, Mapping) and set(given) & set(_RANGE):
        return _range(name, given, where)
    values = given
    if isinstance(given, Mapping):
        values = [given["value"]] if set(given) == {"value"} else given.get("values")
        if set(given) not in ({"values"}, {"value"}):
            values = None
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ConfigError(
            f"{where} is {str(given)[:60]!r}; a list of values was expected, or a range such as "
            "{min: 1e-5, max: 1e-3, scale: log}."
        )
    if len({repr(value) for value in values}) != len(values):
        raise ConfigError(f"{where} has a value twice; list every value once.")
    return Parameter(name, tuple(values))


def _range(name: str, given: Mapping[str, Any], where: str) -> Parameter:
    unknown = sorted(set(map(str, given)) - {*_RANGE, "distribution"})
    if unknown or "min" not in given or "max" not in given:
        what = f"has {', '.join(unknown)}" if unknown else "has only one end"
        raise ConfigError(f"{where} {what}; a range has `min`, `max`, and maybe `scale` or `step`.")
    least, most, step = (given.get(key) for key in ("min", "max", "step"))
    scale = _DISTRIBUTIONS.get(str(given.get("scale", given.get("distribution", "linear"))).lower())
    numbers = [x for x in (least, most, step) if x is not None]
    if any(type(x) not in (int, float) or not math.isfinite(x) for x in numbers):
        raise ConfigError(f"{where}: `min`, `max` and `step` are to be numbers.")
    assert isinstance(least, int | float) and isinstance(most, int | float)
    if scale is None:
        raise ConfigError(f"{where}: `scale` is to be {' or '.join(_SCALES)}.")
    if not least < most or (step is not None and not 0 < step <= most - least):
        raise ConfigError(f"{where}: `min` is to be less than `max`, and `step` to lie between.")
    if scale == "log" and (least <= 0 or step is not None):
        raise ConfigError(f"{where}: a range on a log scale begins above 0 and has no `step`.")
    return Parameter(name, (), least, most, scale == "log", step)
