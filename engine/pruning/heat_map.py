"""A heat map of head importance.

A row is a layer, a column a head; pruned heads are crossed out. Where a few heads matter far more
than most, colours are those of orders of magnitude: else all but these few would look the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.plots import new_figure, save_figure
from engine.pruning.scores import LayerScores

HEAT_MAP = "head_importance.png"
_WIDE, _SPAN = 10, 1e4
"""How far the most is above the median where colours are of magnitudes; how far down they go."""


def draw(
    layers: list[LayerScores], pruned: Mapping[int, Sequence[int]], title: str, target: Path
) -> bool:
    """Write the picture to `target`. False, and a line in the log, without matplotlib.

    Heads that were pruned before the choice are left white.
    """
    width = max(s.heads.heads for s in layers)
    figure = new_figure("heat map", 2.5 + 0.3 * width, 1.5 + 0.25 * len(layers))
    if figure is None:
        return False
    rows = [
        [
            float(s.values[h]) if h < s.heads.heads and h not in s.pruned else float("nan")
            for h in range(width)
        ]
        for s in layers
    ]
    axes = figure.subplots()
    known = sorted(value for row in rows for value in row if not math.isnan(value))
    scale: dict[str, Any] = {}
    if known and 0 < _WIDE * known[len(known) // 2] < known[-1]:
        scale = {"norm": "log", "vmin": known[-1] / _SPAN, "vmax": known[-1]}
        rows = [[max(value, scale["vmin"]) for value in row] for row in rows]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest", **scale)
    crosses = [(h, row) for row, s in enumerate(layers) for h in pruned.get(s.heads.layer, ())]
    if crosses:
        axes.plot(*zip(*crosses, strict=True), "x", color="red", markersize=6, markeredgewidth=1.5)
    axes.set(xlabel="head", ylabel="layer", title=title)
    axes.set_yticks(range(len(rows)), [str(s.heads.layer) for s in layers])
    axes.set_xticks(range(width))
    axes.tick_params(labelsize=7)
    figure.colorbar(image, label="importance")
    save_figure(figure, target)
    return True
