"""Two results of `engine bench` side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.storage.safe_files import MIB, read_json_object

_KEY = ("op", "model", "shape", "dtype")


@dataclass(frozen=True)
class CaseTimes:
    """One case in both results: seconds, and memory; None where a result has none."""

    op: str
    model: str
    shape: str
    dtype: str
    seconds: tuple[float | None, float | None]
    memory_bytes: tuple[int | None, int | None]

    @property
    def ratio(self) -> float | None:
        """The first time over the second: above 1 the second is faster."""
        first, second = self.seconds
        return None if first is None or second is None else first / second

    def plain(self) -> dict[str, Any]:
        """What JSON holds."""
        return {**vars(self), "ratio": self.ratio}


def compare(first: Path, second: Path) -> tuple[list[CaseTimes], list[str]]:
    """Every case of two results, and how their machines differ, a line each.

    Each is a folder that `engine bench --output` wrote, or its ops.json. Raises `ConfigError`.
    """
    (left, machine), (right, other) = _read(first), _read(second)
    keys = list(dict.fromkeys([*left, *right]))
    rows = []
    for key in keys:
        pair = left.get(key, {}), right.get(key, {})
        times = pair[0].get("seconds"), pair[1].get("seconds")
        bytes_of = pair[0].get("memory_bytes"), pair[1].get("memory_bytes")
        rows.append(CaseTimes(*key, times, bytes_of))
    names = [name for name in machine if name not in ("time", "load_average")]
    differing = [
        f"{name}: {machine[name]} and {other.get(name)}"
        for name in names
        if machine[name] != other.get(name)
    ]
    return rows, differing


def _read(
    path: Path,
) -> tuple[dict[tuple[str, str, str, str], Mapping[str, Any]], Mapping[str, Any]]:
    file = path / "ops.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"--compare: {path} is neither a folder with an ops.json nor such a file; "
            "`engine bench --output FOLDER` writes one."
        )
    content = read_json_object(file, ConfigError, 64 * MIB)
    rows = content.get("rows")
    if not isinstance(rows, Sequence) or not all(
        isinstance(row, Mapping) and {*_KEY, "seconds"} <= row.keys() for row in rows
    ):
        raise ConfigError(f"--compare: {file} is no result of `engine bench`: it has no rows.")
    named = {(row["op"], row["model"], row["shape"], row["dtype"]): row for row in rows}
    return named, content.get("machine", {})
