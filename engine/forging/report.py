"""Results of `engine forge`: a table, and a plot of the perplexities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import gib
from engine.plots import new_figure, save_figure

PLOT = "forge.png"
_DECADE = 10
"""How far perplexities are apart where the axis is logarithmic, so that it has whole decades."""


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, heads pruned so far and assessment of every model, in order."""
    yield "baseline", "", results["baseline"]
    removed = 0
    for number, cycle in enumerate(results["cycles"], 1):
        removed += cycle["prune"].get("heads", cycle["prune"]["units"])["removed"]
        yield f"cycle {number}, pruned", str(removed), cycle["pruned"]
        yield f"cycle {number}, trained", str(removed), cycle["trained"]
    for number, entry in enumerate(results["baseline_cycles"], 1):
        yield f"baseline {number}, trained", "0", entry["trained"]
    for seed, chain in enumerate(results.get("baseline_seeds", []), 1):
        for number, entry in enumerate(chain, 1):
            yield f"baseline {number}, seed +{seed}", "0", entry["trained"]


def table(results: dict[str, Any]) -> str:
    """One line a model: perplexity against the baseline, heads, parameters, size, speed."""
    base = results["baseline"]["perplexity"]
    lines = [
        f"{'model':<20} {'perplexity':>10} {'95 % of draws':>17} {'change':>8} {'pruned':>10} "
        f"{'parameters':>12} {'on disk':>11} {'tokens/s':>8}"
    ]
    for name, removed, judged in _rows(results):
        value = judged["perplexity"]
        told = "infinite" if value is None else f"{value:.3f}"
        low, high = judged.get("interval") or (None, None)
        between = "" if low is None else f"{low:.3f} - {high:.3f}"
        change = "" if value is None or base is None else f"{100 * (value / base - 1):+.1f} %"
        size = "" if judged["bytes"] is None else gib(judged["bytes"])
        speed = "" if judged["tokens_per_second"] is None else f"{judged['tokens_per_second']:.1f}"
        lines.append(
            f"{name:<20} {told:>10} {between:>17} {change:>8} {removed:>10} "
            f"{judged['parameters']:>12,} {size:>11} {speed:>8}".rstrip()
        )
    return "\n".join(lines)


def samples(results: dict[str, Any]) -> str:
    """The answers of the baseline and of the last trained model, one under the other."""
    last = results["cycles"][-1]["trained"]["samples"]
    parts = []
    for before, after in zip(results["baseline"]["samples"], last, strict=True):
        parts.append(
            f"{before['prompt']}\n  before: {_indented(before['text'])}\n"
            f"  after:  {_indented(after['text'])}"
        )
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n          ")


def draw(results: dict[str, Any], target: Path) -> bool:
    """Write the picture. False, and a line in the log, without matplotlib."""
    points = [
        (name, entry["perplexity"])
        for name, _, entry in _rows(results)
        if not name.startswith("baseline ")
    ]
    figure = new_figure("plot", 2.5 + 1.1 * len(points), 4.5)
    if figure is None:
        return False
    axes = figure.subplots()
    axes.plot(range(len(points)), [value for _, value in points], "o-", label="pruned and trained")
    for index, (_, value) in enumerate(points):
        if value is not None:
            axes.annotate(f"{value:.2f}", (index, value), (0, 7), textcoords="offset points")
    baseline = [entry["trained"]["perplexity"] for entry in results["baseline_cycles"]]
    if baseline:
        cycles = [0, *(2 * number for number in range(1, len(baseline) + 1))]
        values = [results["baseline"]["perplexity"], *baseline]
        axes.plot(cycles, values, "s--", label="trained without pruning")
    axes.set_xticks(range(len(points)), [name.replace(", ", "\n") for name, _ in points])
    known = [value for _, value in points if value is not None]
    wide = bool(known) and max(known) > _DECADE * min(known)
    axes.set(ylabel="held-out perplexity", yscale="log" if wide else "linear")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, target)
    return True
