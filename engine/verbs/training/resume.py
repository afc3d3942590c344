"""`engine resume`: go on with a run, by what its directory says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.runs.stored import resume_config
from engine.verbs.training.train import TrainResult, train


def resume(
    run: str | Path, *, console: bool = True, callbacks: Sequence[object] = (), **changes: Any
) -> TrainResult:
    """Go on with the run in directory `run`, or from a checkpoint in it.

    Everything comes from the run. `changes` are settings of `TrainConfig` that do not change what
    is learnt, and a higher `max_steps` or `epochs` where the schedule is constant. `callbacks` are
    those of `train`. Raises as
    `engine.verbs.training.train.train`; a run that cannot go on is left as it is.
    """
    return train(resume_config(run, **changes), console=console, callbacks=callbacks)
