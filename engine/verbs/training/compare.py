"""engine compare: runs side by side, from their files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.comparing.picture import draw_comparison
from engine.comparing.runs import Comparison, read_runs
from engine.errors import ConfigError
from engine.plots import refuse_foreign_picture
from engine.verbs.training.status import find_run

ROOT = Path("runs")


def compare(
    runs: Sequence[str | Path], *, plot: str | Path | None = None, root: Path = ROOT
) -> Comparison:
    """The settings, curves and final figures of some runs; `plot` is a picture to write.

    A run is its directory, or its name under `root`. Only reads, and takes no notice of whether a
    run still trains. Raises `ConfigError` for fewer than two runs and for what is none.
    """
    if isinstance(runs, str | Path) or len(runs) < 2:
        raise ConfigError("engine compare takes at least two runs: engine compare RUN RUN...")
    if plot is not None:
        refuse_foreign_picture(Path(plot))
    comparison = read_runs([find_run(str(run), root) for run in runs])
    if plot is not None:
        draw_comparison(comparison, Path(plot))
    return comparison
