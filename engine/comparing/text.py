"""Tables and curves as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.comparing.runs import Comparison, Curve

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 32
_LONGEST = 40


def comparison_text(comparison: Comparison) -> str:
    """Settings that differ, curves and final figures, a column for each run."""
    names = [run.name for run in comparison.runs]
    states = [run.state for run in comparison.runs]
    parts = [table(["", *names], [["state", *states]])]
    settings = [[name, *map(shown, values)] for name, values in comparison.settings()]
    if settings:
        parts += ["Settings that differ", table(["", *names], settings)]
    else:
        parts.append("The runs have the same settings.")
    for figure in ("loss", "eval_loss"):
        curves = [(run.name, run.curves[figure]) for run in comparison.runs if figure in run.curves]
        if curves:
            parts += [f"{figure} over the steps", _curve_lines(curves)]
    figures = [[name, *map(shown, values)] for name, values in comparison.figures()]
    if figures:
        parts += ["Final figures", table(["", *names], figures)]
    return "\n\n".join(part.rstrip() for part in parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        first, *rest = (text for text in row)
        aligned = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def _curve_lines(curves: Sequence[tuple[str, Curve]]) -> str:
    """A line for each run, all on one scale of steps and values, with its first and last value."""
    every = [value for _, (_, values) in curves for value in values]
    last_step = max(steps[-1] for _, (steps, _) in curves)
    width = max(len(name) for name, _ in curves)
    bars = min(_WIDTH, max(len(steps) for _, (steps, _) in curves))
    return "\n".join(
        f"{name.ljust(width)}  {_bars(curve, (min(every), max(every)), last_step, bars)}  "
        f"{curve[1][0]:.4f} to {curve[1][-1]:.4f} at step {curve[0][-1]}"
        for name, curve in curves
    )


def _bars(curve: Curve, bounds: tuple[float, float], last_step: int, width: int) -> str:
    """The mean of each stretch of steps as a bar; a stretch without a value is a space."""
    buckets: list[list[float]] = [[] for _ in range(width)]
    for step, value in zip(*curve, strict=True):
        buckets[max(0, (step * width - 1) // last_step if last_step else 0)].append(value)
    least, span = bounds[0], (bounds[1] - bounds[0]) or 1.0
    heights = [
        None if not values else (sum(values) / len(values) - least) / span for values in buckets
    ]
    return "".join(
        " " if height is None else _BARS[min(int(height * len(_BARS)), len(_BARS) - 1)]
        for height in heights
    )


def shown(value: Any) -> str:
    """A value in a cell: numbers with a few digits, texts cut, `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
