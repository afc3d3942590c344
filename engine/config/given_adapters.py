"""Adapters as settings name them: one or several, with weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from engine.storage.home import expanded

WeightedPath = tuple[str, float]


def weighted_path(value: Any) -> WeightedPath:
    """`runs/a`, `runs/a=0.5` or `("runs/a", 0.5)` as a path and a weight.

    What stands behind the last equals sign is a weight if it is a number, and no path of that name
    is there. Raises `ValueError`.
    """
    if isinstance(value, Mapping) and set(value) <= {"path", "weight"} and "path" in value:
        value = (value["path"], value.get("weight", 1.0))
    if isinstance(value, list | tuple):
        if len(value) != 2 or isinstance(value[1], bool):
            raise ValueError("an adapter with a weight is a pair (path, weight)")
        return str(value[0]), _weight(value[1])
    if not isinstance(value, str | Path):
        raise ValueError("an adapter is a path or hub id, or a pair (path, weight)")
    text = str(value)
    path, separator, number = text.rpartition("=")
    if not separator or not path or expanded(text).exists():
        return text, 1.0
    try:
        return path, _weight(number)
    except ValueError:
        if expanded(path).exists():
            raise
        return text, 1.0


def _weight(value: Any) -> float:
    weight = float(value)
    if not math.isfinite(weight):
        raise ValueError(f"the weight of an adapter should be a finite number, not {value}")
    return weight


def weighted_paths(value: Any) -> tuple[WeightedPath, ...]:
    """One adapter, several or none; a pair of a path and a number is one. Raises `ValueError`."""
    if value is None:
        return ()
    pair = (
        isinstance(value, list | tuple)
        and len(value) == 2
        and isinstance(value[1], int | float)
        and not isinstance(value[1], bool)
    )
    if pair or not isinstance(value, list | tuple):
        value = [value]
    return tuple(weighted_path(item) for item in value)


Adapters = Annotated[tuple[WeightedPath, ...], BeforeValidator(weighted_paths)]
"""Paths and weights; what they do is added up (`engine.model_sources.weighted_adapters`)."""
