"""The roofline plot: operations per byte against operations per second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.benchmark.roofline import Roofline
from engine.benchmark.runner import Measurement
from engine.plots import new_figure, save_figure


def draw(rows: Sequence[Measurement], roofline: Roofline, title: str, target: Path) -> bool:
    """Draw the machine's two ceilings and a point per row; False without matplotlib."""
    figure = new_figure("roofline", 10, 6.5) if rows else None
    if figure is None:
        return False
    axes = figure.add_subplot()
    intensities = [row.flops / row.nbytes for row in rows]
    low, high = min(intensities) / 3, max(*intensities, 300.0) * 3
    for dtype, peak in roofline.flops.items():
        knee = peak / roofline.bandwidth
        bends = [low, max(knee, low), max(high, knee)]
        axes.plot(
            bends, [min(peak, x * roofline.bandwidth) for x in bends], label=f"limit, {dtype}"
        )
    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op]
        x, y = [row.flops / row.nbytes for row in own], [row.flops / row.seconds for row in own]
        axes.plot(x, y, linestyle="", marker="o", markersize=5)
        for row, across, up in zip(own, x, y, strict=True):
            axes.annotate(
                f"{op} {row.shape}", (across, up), fontsize=6, xytext=(4, 2),
                textcoords="offset points",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("operations per second")
    axes.set_title(title)
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.2)
    save_figure(figure, target, dots_per_inch=150)
    return True
