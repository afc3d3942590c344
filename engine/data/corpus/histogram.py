"""A picture of how long rows are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from engine.plots import new_figure, save_figure


def save_histogram(path: Path, lengths: Sequence[int], unit: str, limit: int | None) -> None:
    """Write a histogram as PNG.

    Args:
        path: of the picture.
        lengths: of the rows.
        unit: what they are counted in.
        limit: length at which rows are cut, as a line; None for none.

    Raises:
        ConfigError: matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    figure = new_figure("histogram", 7, 3.5)
    if figure is None:
        raise ConfigError(
            "--plot draws with matplotlib, which is not installed: pip install "
            "'engine-trainer[plot]', or leave --plot out."
        )
    axes = figure.add_subplot()
    axes.hist(lengths, bins=min(60, max(len(set(lengths)), 5)), color="#3b6ea5")
    if limit is not None:
        axes.axvline(limit, color="#b5452c", linestyle="--", label=f"cut at {limit:,} {unit}")
        axes.legend()
    axes.set(xlabel=f"{unit} of a row", ylabel="rows")
    save_figure(figure, path)
