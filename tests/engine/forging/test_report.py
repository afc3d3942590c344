"""The picture of a forge: perplexities are read off its axis as numbers."""

from pathlib import Path
from typing import Any

import pytest

from engine.forging.report import draw


def results(*perplexities: float | None) -> dict[str, Any]:
    first, *rest = ({"perplexity": value} for value in perplexities)
    pairs = zip(rest[::2], rest[1::2], strict=True)
    cycles = [
        {"prune": {"units": {"removed": 1}}, "pruned": pruned, "trained": trained}
        for pruned, trained in pairs
    ]
    return {"baseline": first, "cycles": cycles, "baseline_cycles": []}


@pytest.mark.parametrize(
    ("perplexities", "scale"),
    [((113.88, 113.57, 114.76), "linear"), ((20.0, 4000.0, 30.0), "log"), ((None,) * 3, "linear")],
)
def test_ticks_are_plain_numbers(
    perplexities: tuple[float | None, ...],
    scale: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("engine.forging.report.save_figure", lambda one, _: figures.append(one))
    assert draw(results(*perplexities), tmp_path / "forge.png")
    axes = figures[0].axes[0]
    figures[0].canvas.draw()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert axes.get_yscale() == scale
    assert len([float(label.replace(",", "").replace("\u2212", "-")) for label in labels]) > 1
