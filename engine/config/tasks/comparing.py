"""Settings of engine sweep and engine compare."""

from pathlib import Path

from engine.config.settings import Settings, setting
from engine.config.tasks.inference import Paths


class CompareSettings(Settings):
    """`engine compare`."""

    runs: Paths = setting(
        ..., "Compare", "run directories, or names under runs/: engine compare RUN RUN", repeat=True
    )
    plot: Path | None = setting(None, "Compare", "picture of the curves (.png)")


class SweepSettings(Settings):
    """`engine sweep`."""

    file: str = setting(..., "Sweep", "YAML file of a sweep: engine sweep FILE")
    output_dir: Path | None = setting(
        None, "Sweep", "the sweep's directory, in place of the file's own"
    )
    trials: int | None = setting(
        None, "Sweep", "how many trials, in place of the file's own number", ge=1, le=10_000
    )
    dry_run: bool = setting(False, "Sweep", "check and list the trials, and run none")
