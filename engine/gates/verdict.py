"""Decide from what was measured which gates a model passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.config.tasks.gates import GateSettings
from engine.errors import DataError
from engine.storage.safe_files import read_json_object

RATES = ("parse_rate", "coverage", "pass_rate")


@dataclass(frozen=True)
class Gate:
    """One gate: a figure and its limit; a figure that could not be had is None and fails."""

    name: str
    value: float | None
    limit: float
    at_most: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the figure is inside the limit."""
        if self.value is None:
            return False
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def text(self) -> str:
        """The gate in a line."""
        value = "none" if self.value is None else f"{self.value:.4g}"
        sign = "at most" if self.at_most else "at least"
        word = "passed" if self.passed else "FAILED"
        note = f" ({self.note})" if self.note else ""
        return f"{word:6}  {self.name}: {value}, {sign} {self.limit:.4g}{note}"

    def facts(self) -> dict[str, Any]:
        """The gate as JSON has it."""
        return asdict(self) | {"passed": self.passed}


def decide(
    settings: GateSettings,
    figures: Mapping[str, float | None],
    base: Mapping[str, float | None] | None,
    earlier: Mapping[str, float | None] | None,
) -> list[Gate]:
    """Every gate that `settings` ask for, by the figures of the model, its base, an earlier one.

    A figure is `parse_rate`, `coverage`, `pass_rate`, `perplexity` or `pass_at_K`.
    """
    gates = [
        Gate(name, figures.get(name), limit)
        for name in RATES
        if (limit := getattr(settings, name)) is not None
    ]
    gates += [
        Gate(f"pass_at_{k}", figures.get(f"pass_at_{k}"), limit)
        for k, limit in sorted(settings.pass_at.items())
    ]
    if settings.perplexity is not None:
        gates.append(Gate("perplexity", figures.get("perplexity"), settings.perplexity, True))
    if base is not None:
        allowed = (settings.worse_than_base, settings.perplexity_over_base)
        gates += _against("base", figures, base, *allowed)
    if earlier is not None:
        allowed = (settings.worse_than_earlier, settings.perplexity_over_earlier)
        gates += _against("earlier", figures, earlier, *allowed)
    return gates


def _against(
    name: str,
    figures: Mapping[str, float | None],
    other: Mapping[str, float | None],
    worse: float | None,
    quotient: float | None,
) -> list[Gate]:
    """Gates on the loss of each rate that both have, and on the quotient of perplexities."""
    gates = []
    for rate in sorted({*figures} - {"perplexity"}) if worse is not None else ():
        mine, theirs = figures[rate], other.get(rate)
        if theirs is not None and worse is not None:
            loss = None if mine is None else theirs - mine
            note = f"{'none' if mine is None else f'{mine:.4g}'} after {theirs:.4g}"
            gates.append(Gate(f"{rate}_loss_from_{name}", loss, worse, True, note))
    mine, theirs = figures.get("perplexity"), other.get("perplexity")
    if quotient is not None and mine is not None and theirs is not None:
        note = f"{mine:.4g} after {theirs:.4g}"
        gates.append(Gate(f"perplexity_over_{name}", mine / theirs, quotient, True, note))
    return gates


def read_earlier(path: Path) -> dict[str, float | None]:
    """The figures of an earlier eval_results.json. Raises `DataError`."""
    advice = "Name the eval_results.json that an earlier `engine eval --gates` wrote."
    try:
        figures = read_json_object(path, DataError)["figures"]
        return {str(name): None if v is None else float(v) for name, v in figures.items()}
    except DataError as error:
        raise DataError(f"The earlier result cannot be read. {error} {advice}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path}: this is no result of an evaluation ({type(error).__name__}: {error}). "
            f"{advice}"
        ) from None
