"""Train in processes of this machine: what `--gpus N` starts."""

from __future__ import annotations

from typing import Any

from engine.config.train_config import TrainConfig
from engine.distributed.launch import Processes, run_group
from engine.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    GroupError,
    MemoryPlanError,
)
from engine.runs.signals import Interrupted

_ERRORS = {
    kind.__name__: kind
    for kind in (CheckpointError, ConfigError, DataError, EngineError, GroupError, MemoryPlanError)
}


def train_in_processes(config: TrainConfig, console: bool) -> dict[str, Any]:
    """Train with `config.gpus` processes; the `output`, `metrics` and `next` commands they left.

    Raises what the first of them raised, by its name and text; `GroupError` where one died.
    """
    # What was not given stays so: an earlier adapter, say, then decides it.
    settings = config.model_dump(mode="json", exclude_unset=True)
    job = {"settings": settings, "console": console}
    processes = Processes(config.gpus, config.max_restarts, config.threads)
    outcome = run_group("engine.verbs.worker", job, processes)
    told = outcome.told
    if told.get("signal") or outcome.signal is not None:
        number = int(told.get("signal") or outcome.signal or 0)
        raise Interrupted(number, told.get("error") or "", told.get("step"))
    if told.get("error"):
        raise _ERRORS.get(told["kind"], EngineError)(told["error"])
    return told
