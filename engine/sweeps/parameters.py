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
_LARGEST = 1e300
_MOST_STEPS = 1 << 53


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
    least, most = (_end(given[key], where) for key in ("min", "max"))
    step = None if given.get("step") is None else _end(given["step"], where)
    scale = _DISTRIBUTIONS.get(str(given.get("scale", given.get("distribution", "linear"))).lower())
    if scale is None:
        raise ConfigError(f"{where}: `scale` is to be {' or '.join(_SCALES)}.")
    if not least < most or (step is not None and not 0 < step <= most - least):
        raise ConfigError(f"{where}: `min` is to be less than `max`, and `step` to lie between.")
    if step is not None and (most - least) / step > _MOST_STEPS:
        raise ConfigError(f"{where}: `step` is so small that the range has over 2^53 values.")
    if scale == "log" and (least <= 0 or step is not None):
        raise ConfigError(f"{where}: a range on a log scale begins above 0 and has no `step`.")
    return Parameter(name, (), least, most, scale == "log", step)


def _end(value: Any, where: str) -> int | float:
    """A number of a range."""
    if type(value) not in (int, float) or not -_LARGEST <= value <= _LARGEST:
        raise ConfigError(
            f"{where}: `min`, `max` and `step` are to be numbers, of at most {_LARGEST:g}."
        )
    number: int | float = value
    return number
